"""Independent solves side by side: on a CPU a small eigenproblem hardly uses a second core."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_parallel(
    function: Callable[[Item], Result], items: Sequence[Item], num_workers: int
) -> Iterator[Result]:
    """Results in the order of the items, by single-threaded workers; 1 runs them here, in turn.

    torch releases the interpreter's lock inside its operations, so threads are enough.
    """
    if num_workers == 1:
        yield from map(function, items)
        return
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(
            num_workers, initializer=lambda: torch.set_num_threads(1)
        ) as workers:
            yield from workers.map(function, items)
    finally:
        torch.set_num_threads(num_threads)
