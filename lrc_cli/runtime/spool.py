"""Tensors in a file without a name, mapped: for formats whose own files cannot be mapped."""

import mmap
import os
import tempfile

import torch

from lrc_cli.errors import RunError


class Spool:
    """A temporary file (in TMPDIR) that is gone when the process ends."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the spool)
        self._size = 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor that is a view of the mapped file, to be filled; takes no private memory.

        Raises:
            RunError: the disk is full.
        """
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        if not num_bytes:
            return torch.empty(shape, dtype=dtype)
        offset = self._size + -self._size % mmap.ALLOCATIONGRANULARITY
        try:
            # Room that is only promised would end the process once it is written to.
            os.posix_fallocate(self._file.fileno(), offset, num_bytes)
        except OSError as error:
            raise RunError(
                f"{tempfile.gettempdir()}: the checkpoint cannot be put there ({error.strerror})",
                "set TMPDIR to a disk with room for all its tensors",
            ) from error
        self._size = offset + num_bytes
        pages = mmap.mmap(self._file.fileno(), num_bytes, offset=offset)
        return torch.frombuffer(pages, dtype=dtype).view(shape)
