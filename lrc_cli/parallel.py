"""Independent solves side by side: on a CPU a small eigenproblem hardly uses a second core."""

import ctypes
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_parallel(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    num_workers: int,
    *,
    cost: Callable[[Item], float] = lambda _: 0.0,
) -> Iterator[Result]:
    """Results in the order of the items, by single-threaded workers; 1 runs them here, in turn.

    torch releases the interpreter's lock inside its operations, so threads are enough.

    Args:
        cost: what takes most begins first, so that no worker is left with it at the end.
    """

    def solve(item: Item) -> Result:
        result = function(item)
        _trim()
        return result

    if num_workers == 1:
        yield from map(solve, items)
    else:
        yield from _by_threads(solve, items, num_workers, cost)


def _by_threads(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    num_workers: int,
    cost: Callable[[Item], float],
) -> Iterator[Result]:
    num_threads = torch.get_num_threads()
    order = sorted(range(len(items)), key=lambda index: -cost(items[index]))
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(
            num_workers, initializer=lambda: torch.set_num_threads(1)
        ) as workers:
            futures = {index: workers.submit(function, items[index]) for index in order}
            try:
                yield from (futures[index].result() for index in range(len(items)))
            finally:
                for future in futures.values():
                    future.cancel()
    finally:
        torch.set_num_threads(num_threads)


def _trim() -> None:
    """Give what was freed back to the system; without, memory creeps up from block to block.

    glibc keeps it, scattered among what is still used; other allocators have no such call.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
