"""Independent solves run side by side: on a CPU a small eigenproblem hardly uses a second core."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from lrc_cli.runtime.memory import give_back_freed_memory

Item = TypeVar("Item")
Result = TypeVar("Result")

TRIM_EVERY = 2.0
"""Seconds between two calls of malloc_trim. A call takes some 20 ms, and getting memory back takes
as long."""
_trimmed = -math.inf
"""The time of the last call, by time.monotonic()."""


def in_parallel(
    function: Callable[[Item], Result],
    groups: Iterable[Sequence[Item]],
    num_workers: int,
    *,
    cost: Callable[[Item], float] = lambda _: 0.0,
) -> Iterator[list[Result]]:
    """The results by group, from single-threaded workers; one worker runs here, in turn.

    While the caller stores one group's results, the next group is being solved. torch releases the
    interpreter's lock inside its operations, so threads are enough.

    Args:
        cost: the cost of an item. The dearest item of a group begins first, so that no worker has
            to finish it alone at the end.
    """

    if num_workers == 1:
        each: Iterable[list[Result]] = (list(map(function, group)) for group in groups)
    else:
        each = _by_threads(function, groups, num_workers, cost)
    _trim()
    for results in each:
        yield results
        del results  # what the caller has stored is freed before the next group is waited for
        _trim()


def _by_threads(
    function: Callable[[Item], Result],
    groups: Iterable[Sequence[Item]],
    num_workers: int,
    cost: Callable[[Item], float],
) -> Iterator[list[Result]]:
    num_threads = torch.get_num_threads()
    waiting: deque[list[Future[Result]]] = deque()

    def begin(group: Sequence[Item]) -> list[Future[Result]]:
        order = sorted(range(len(group)), key=lambda index: -cost(group[index]))
        begun = {index: workers.submit(function, group[index]) for index in order}
        return [begun[index] for index in range(len(group))]

    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(
            num_workers, initializer=lambda: torch.set_num_threads(1)
        ) as workers:
            try:
                for group in groups:
                    # Groups begin early enough that no worker waits, and no earlier: results take
                    # memory.
                    while waiting and sum(map(len, waiting)) - len(waiting[0]) >= num_workers:
                        yield [future.result() for future in waiting.popleft()]
                    waiting.append(begin(group))
                while waiting:
                    yield [future.result() for future in waiting.popleft()]
            finally:
                workers.shutdown(wait=False, cancel_futures=True)
    finally:
        torch.set_num_threads(num_threads)


def _trim() -> None:
    """Gives freed memory back, so that memory does not creep up from block to block.

    The call is not made after every solve: getting memory back costs as much as a fifth of a solve.
    """
    global _trimmed
    if time.monotonic() - _trimmed >= TRIM_EVERY:
        give_back_freed_memory()
        _trimmed = time.monotonic()
