"""Files: flushed, hashed, written as JSON."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a CPU tensor as safetensors stores them (row-major, little-endian)."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().data


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def write_json(path: Path, value: Any) -> None:
    """Write readable JSON (two spaces, a newline at the end) and flush it to the disk."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text and flush it to the disk."""
    with _writing(path) as handle:
        handle.write(text.encode())


@contextmanager
def _writing(path: Path) -> Iterator[BinaryIO]:
    """A new file, flushed to the disk at the end; what the system complains of has its name."""
    try:
        with path.open("wb") as handle:
            yield handle
            sync(handle)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def sync(handle: BinaryIO) -> None:
    """Flush a file to the disk, so that a rename after it never shows an empty one."""
    handle.flush()
    os.fsync(handle.fileno())


def sync_directory(path: Path) -> None:
    """Flush a directory's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hash_file(path: Path) -> str:
    """sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def hash_path(path: Path) -> str:
    """Of a file `hash_file`; of a folder that of the list which `sha256sum` makes of its files.

    Hidden files do not count; the list is sorted by name.
    """
    if not path.is_dir():
        return hash_file(path)
    names = {file.relative_to(path).as_posix(): file for file in path.rglob("*") if file.is_file()}
    lines = [
        f"{hash_file(names[name])}  {name}\n"
        for name in sorted(names)
        if not any(part.startswith(".") for part in name.split("/"))
    ]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
