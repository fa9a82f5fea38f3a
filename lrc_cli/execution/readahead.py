"""The system reads a block's weights from the disk here while the neighbouring block runs.

Parameters are views of mapped files. Without this module, pages that are not in memory would be
read at the first touch, while the processor waits. Asked in time, the kernel reads them before.
"""

import ctypes
import mmap
from contextlib import suppress
from functools import cache
from typing import Any

from torch import nn


def read_ahead(module: nn.Module) -> None:
    """Asks the system to read a module's parameters on the CPU, and returns at once.

    Where the system takes no advice, pages are read when they are touched.
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
    """Returns the C library's madvise(address, bytes, advice), or None where it is missing."""
    with suppress(OSError, AttributeError):
        advise = ctypes.CDLL(None).madvise
        advise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        return advise
    return None
