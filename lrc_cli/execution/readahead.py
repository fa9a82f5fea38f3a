"""Reading while computing: the system reads a block's weights while the block beside it runs.

Parameters are views of mapped files, so what is not in memory is read at the first touch, and the
processor waits for it. Asked in time, the kernel reads by itself.
"""

import ctypes
import mmap
from contextlib import suppress
from functools import cache
from typing import Any

from torch import nn


def read_ahead(module: nn.Module) -> None:
    """Begin to read the parameters that lie in mapped files; returns at once, whatever is asked.

    Advice only: where the system takes none, pages are read when they are touched.
    """
    advise = _advise()
    if advise is None:
        return
    for parameter in module.parameters():
        if parameter.device.type == "cpu" and parameter.numel():
            start = parameter.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
            advise(start, parameter.data_ptr() + parameter.nbytes - start, mmap.MADV_WILLNEED)


@cache
def _advise() -> Any:
    """The C library's madvise(address, bytes, advice); None where there is none."""
    with suppress(OSError, AttributeError):
        advise = ctypes.CDLL(None).madvise
        advise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        return advise
    return None
