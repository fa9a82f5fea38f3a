"""The arrays of an .npz file are checked by their headers before any memory is taken for them."""

import math
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lrc_cli.errors import InputError
from lrc_cli.reading import file_size, open_regular
from lrc_cli.runtime.memory import available_bytes, private_bytes

BOMB_BYTES, BOMB_TIMES = 500_000_000, 200
"""More bytes than the first number, and than the second number times the file's, are a zip bomb."""
WRITE_AGAIN = "write it again with numpy.savez"


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of numbers by name.

    Raises:
        InputError: the file is no .npz, is encrypted or damaged, holds anything beside arrays of
            numbers, or would take more memory than there is.
    """
    with open_regular(path) as handle:
        try:
            return _read(path, handle)
        except InputError:
            raise
        # On a file that numpy did not write, zipfile and numpy fail in any way.
        except Exception as error:
            cause = f"{path}: cannot be read as .npz ({' '.join(str(error).split())[:200]})"
            raise InputError(cause, WRITE_AGAIN) from error


def _read(path: Path, handle: BinaryIO) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(handle) as archive:
        infos = archive.infolist()
        sizes = {info.filename: _checked_size(path, archive, info) for info in infos}
    if len(sizes) < len(infos):
        raise InputError(f"{path}: holds two arrays of one name", WRITE_AGAIN)
    total, packed = sum(sizes.values()), file_size(path)
    if total > BOMB_BYTES and total > BOMB_TIMES * packed:
        raise InputError(
            f"{path}: {packed:,} bytes unpack to {total:,}, which no data of use does",
            "write it with numpy.savez, which does not pack",
        )
    room = max(0, available_bytes() - private_bytes())
    if total > room:
        raise InputError(
            f"{path}: its arrays take {total:,} bytes, and {room:,} are free",
            "give fewer rows, or a .safetensors file, which need not fit into memory",
        )
    handle.seek(0)
    with np.load(handle, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def _checked_size(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> int:
    """Returns the bytes of an array, by its header."""
    if info.flag_bits & 1:
        raise InputError(f"{path}: {info.filename} is encrypted", WRITE_AGAIN)
    if not info.filename.endswith(".npy"):
        raise InputError(f"{path}: {info.filename} is no array (.npy)", "leave it out")
    with archive.open(info) as member:
        shape, dtype = _header(member)
        begin = member.tell()
    name = info.filename.removesuffix(".npy")
    if dtype.kind not in "biuf":
        cause = f"{path}: {name} holds {dtype}, no numbers"
        raise InputError(cause, "leave it out, or write numbers")
    if not all(type(n) is int and n >= 0 for n in shape):
        raise InputError(f"{path}: {name} has the shape {shape}", WRITE_AGAIN)
    size = math.prod(shape) * dtype.itemsize
    if begin + size != info.file_size:
        raise InputError(
            f"{path}: {name} of shape {shape} takes {size:,} bytes, and the file holds"
            f" {info.file_size - begin:,}",
            WRITE_AGAIN,
        )
    return size


def _header(member: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(member)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in read:
        raise ValueError(f"version {version} of .npy")
    shape, _, dtype = read[version](member)
    return shape, dtype
