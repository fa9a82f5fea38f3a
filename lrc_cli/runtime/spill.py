"""Tensors spill out of private memory here: between two segments, and for unmappable formats."""

import mmap
import os
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path

import torch

from lrc_cli.errors import RunError
from lrc_cli.runtime.files import tensor_bytes

ALIGNMENT = 64
"""The number of bytes to which torch aligns tensors in memory; rounding may depend on it."""


class HostMemory:
    """The host's memory for tensors; tensors that the limit leaves no room for go to files.

    Such a file has no name. It is gone with its tensor, and with the process.

    Args:
        limit: bytes that kept tensors may take together; None: no limit.
        directory: the directory of the files.
    """

    def __init__(self, limit: int | None, directory: Path) -> None:
        self.limit, self.directory = limit, directory
        self.held = 0
        """Bytes of private memory that kept tensors take now."""

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same numbers on the host, in separate memory: private, or a mapped file's.

        Raises:
            RunError: the disk is full.
        """
        tensor = tensor.detach()
        if not tensor.nbytes or (self.limit is not None and self.held + tensor.nbytes > self.limit):
            return self._in_file(tensor) if tensor.nbytes else tensor.cpu()
        whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
        kept = tensor.cpu() if whole else tensor.to("cpu", copy=True).contiguous()
        self.held += kept.nbytes
        weakref.finalize(kept.untyped_storage(), self._release, kept.nbytes)
        return kept

    def _release(self, num_bytes: int) -> None:
        self.held -= num_bytes

    def _in_file(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.hold({"": tensor})[""]

    def hold(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The same numbers in one file, without regard to the limit.

        Raises:
            RunError: the disk is full.
        """
        places: dict[str, int] = {}
        try:
            with tempfile.TemporaryFile(dir=self.directory) as file:
                for name, tensor in tensors.items():
                    file.write(bytes(-file.tell() % ALIGNMENT))
                    places[name] = file.tell()
                    file.write(tensor_bytes(tensor.cpu()))
                file.flush()
                # Python's mmap would keep a descriptor for each file, and a process has only 1024.
                name, size = f"/dev/fd/{file.fileno()}", file.tell()
                mapped = torch.from_file(name, size=size, dtype=torch.uint8)
        except (OSError, RuntimeError) as error:  # torch raises RuntimeError
            why = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
            raise RunError(
                f"{self.directory}: activations cannot be written ({why})",
                "make room on the disk, or raise runtime.memory_limit",
            ) from error
        return {
            name: mapped[start : start + tensors[name].nbytes]
            .view(tensors[name].dtype)
            .view(tensors[name].shape)
            for name, start in places.items()
        }


class Spool:
    """A temporary file (in TMPDIR) that is gone when the process ends."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the spool)
        self._size = 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor to be filled, a view of the mapped file that takes no private memory.

        Raises:
            RunError: the disk is full.
        """
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        if not num_bytes:
            return torch.empty(shape, dtype=dtype)
        offset = self._size + -self._size % mmap.ALLOCATIONGRANULARITY
        try:
            # Without this call a full disk would kill the process when it writes to the view.
            os.posix_fallocate(self._file.fileno(), offset, num_bytes)
        except OSError as error:
            raise RunError(
                f"{tempfile.gettempdir()}: the checkpoint cannot be put there ({error.strerror})",
                "set TMPDIR to a disk with room for all its tensors",
            ) from error
        self._size = offset + num_bytes
        pages = mmap.mmap(self._file.fileno(), num_bytes, offset=offset)
        return torch.frombuffer(pages, dtype=dtype).view(shape)
