"""Tensors in a file without a name, mapped: for formats whose own files cannot be mapped."""

import mmap
import tempfile

import torch

from lrc_cli.checkpoint.headers import tensor_bytes
from lrc_cli.errors import RunError


class Spool:
    """A temporary file (in TMPDIR) that is gone when the process ends."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the spool)

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same numbers as a view of the mapped file.

        Raises:
            RunError: the disk is full.
        """
        if not tensor.numel():
            return tensor
        start = self._file.seek(0, 2)
        offset = start + -start % mmap.ALLOCATIONGRANULARITY
        try:
            self._file.seek(offset)
            self._file.write(tensor_bytes(tensor))
            self._file.flush()
        except OSError as error:
            raise RunError(
                f"{tempfile.gettempdir()}: the checkpoint cannot be put there ({error.strerror})",
                "set TMPDIR to a disk with room for all its tensors",
            ) from error
        pages = mmap.mmap(
            self._file.fileno(), tensor.nbytes, access=mmap.ACCESS_COPY, offset=offset
        )
        return torch.frombuffer(pages, dtype=tensor.dtype).view(tensor.shape)
