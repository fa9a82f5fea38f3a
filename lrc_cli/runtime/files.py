"""Files are flushed, copied, hashed and written as JSON here, and places are tried for writing."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from lrc_cli.errors import InputError
from lrc_cli.reading import check_file_name, check_on_disk, open_regular, walk


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a CPU tensor as safetensors stores them (row-major, little-endian)."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().data


def canonical_json(value: Any) -> str:
    """The JSON of a value with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def write_json(path: Path, value: Any) -> None:
    """Write readable JSON (two spaces, a newline at the end) and flush it to the disk."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text and flush it to the disk."""
    with writing(path) as handle:
        handle.write(text.encode())


@contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """A new file, flushed to the disk at the end. Errors of the system get the file's name."""
    try:
        with path.open("wb") as handle:
            yield handle
            sync(handle)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's bytes, making its directory, and flush them to the disk."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as reader, writing(target) as writer:
        shutil.copyfileobj(reader, writer, 1 << 20)


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
    """The sha256 of a file's bytes, in hexadecimal. Raises InputError if it is no regular file."""
    with open_regular(path) as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def hash_path(path: Path) -> str:
    """The sha256 of a file or a folder.

    The hash of a folder is taken of the list that `sha256sum` makes of its files. Hidden files do
    not count, and the list is sorted by name.

    Raises:
        InputError: a name is not UTF-8, a file cannot be read, or as `walk`.
    """
    check_on_disk(path)
    if not path.is_dir():
        return hash_file(path)
    names: dict[str, Path] = {}
    for folder, folders, inside in walk(path):
        for name in (*folders, *inside):
            check_file_name(Path(folder, name))
        folders[:] = [name for name in folders if not name.startswith(".")]
        files = (Path(folder, name) for name in inside if not name.startswith("."))
        names |= {file.relative_to(path).as_posix(): file for file in files if file.is_file()}
    lines = [f"{hash_file(names[name])}  {name}\n" for name in sorted(names)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def check_writable(directory: Path, key: str) -> None:
    """Raise InputError if nothing can be made in the directory; the error names the config's key.

    Where the directory is absent its nearest existing parent is tried.
    """
    place = directory.absolute()
    while not os.path.lexists(place):
        place = place.parent
    problem = why_not_writable(place)
    if problem is not None:
        raise InputError(
            f"{key}: {place} is not a writable directory ({problem})", f"choose another {key}"
        )


def why_not_writable(directory: Path) -> str | None:
    """The system's message if nothing can be made in a directory; None: something can be made.

    A directory is made for a trial, because os.access lets root write everywhere, also in /proc and
    on read-only disks.
    """
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".lrc-", dir=directory))
    except OSError as error:
        return error.strerror
    return None
