"""The memory that a piece of a test takes is measured here."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PAGE = os.sysconf("SC_PAGE_SIZE")


def resident() -> int:
    """Returns the bytes that this process has in memory."""
    return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * PAGE


@contextmanager
def peak_growth() -> Iterator[Callable[[], int]]:
    """Yields a function that returns by how many bytes memory has grown at most."""
    before, ended = resident(), threading.Event()
    peak = before

    def look() -> None:
        nonlocal peak
        while not ended.wait(0.005):
            peak = max(peak, resident())

    watching = threading.Thread(target=look)
    watching.start()
    try:
        yield lambda: peak - before
    finally:
        ended.set()
        watching.join()
