"""This module reads what weight files say of themselves: names, shapes, dtypes, format version."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lrc_cli.errors import InputError

FORMAT_VERSION = 1
"""The on-disk format that this version writes, and the newest format that this version reads."""

UPGRADE = "upgrade it with: pip install --upgrade lrc-cli"
"""The remedy for a checkpoint that is newer than this version."""

DEQUANTISE = "dequantise it first, or run lrc on the checkpoint it came from"
"""The remedy for quantised weights."""

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
FLOAT_DTYPES = frozenset(dtype for dtype in DTYPES.values() if dtype.is_floating_point)


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """The header of one stored tensor: its file, its shape and its dtype."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_elements(self) -> int:
        """Number of entries."""
        return torch.Size(self.shape).numel()

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor's data."""
        return self.num_elements * self.dtype.itemsize


def open_tensors(file: str | Path) -> Any:
    """Opens a safetensors file; the handle's tensors are views of the mapped file.

    Raises:
        InputError: the file is missing, truncated or not safetensors.
    """
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        cause = f"{file} is not a readable safetensors file: {error}"
        raise InputError(cause, "copy it again, it may be truncated") from error


def read_headers(files: Iterable[str | Path]) -> dict[str, TensorInfo]:
    """Reads the header of every stored tensor, by key and in file order, and no tensor data.

    Raises:
        InputError: a file is not safetensors, or has a dtype that this version does not read.
    """
    headers = {}
    for file in files:
        with open_tensors(file) as handle:
            for key in handle.offset_keys():
                entry = handle.get_slice(key)
                name = entry.get_dtype()
                if name not in DTYPES:
                    cause = f"{file}: tensor {key} has dtype {name}, which is not a dense weight's"
                    raise InputError(cause, DEQUANTISE)
                headers[key] = TensorInfo(
                    file=Path(file), shape=tuple(entry.get_shape()), dtype=DTYPES[name]
                )
    return headers


def weight_files(path: Path, *, single: str, index: str, suffixes: Sequence[str]) -> list[Path]:
    """Returns the weight files of one format in a directory; the list may be empty.

    The index decides if there is an index, then the single file. Otherwise a file of any name
    counts if its suffix fits.

    Args:
        single: the name of a single file.
        index: the name of the index of several files.
        suffixes: the suffixes of files with any name.

    Raises:
        InputError: a shard that the index names is missing, the index is damaged, or several files
            have no index.
    """
    if (path / index).exists():
        weight_map = read_json(path / index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(name, str) for name in weight_map.values()
        ):
            cause = f"{path / index}: weight_map does not name a file by tensor"
            raise InputError(cause, "restore it")
        names = sorted(set(weight_map.values()))
        missing = [name for name in names if not (path / name).is_file()]
        if missing:
            raise InputError(
                f"{path}: {index} names {missing[0]}, which is missing", "copy all shards"
            )
        return [path / name for name in names]
    if (path / single).is_file():
        return [path / single]
    files = sorted(file for file in path.iterdir() if file.suffix in suffixes and file.is_file())
    if len(files) > 1:
        raise InputError(
            f"{path}: several {files[0].suffix} files and no {index}",
            "add the index, or give the one file that holds the weights",
        )
    return files


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON object from a file.

    Raises:
        InputError: the file cannot be read, is not UTF-8 JSON, or does not hold an object.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{file} is not JSON: {error}", "restore the file") from error
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})", "check the file") from error
    if not isinstance(value, dict):
        raise InputError(f"{file} is not a JSON object", "restore the file")
    return value


def check_version(version: object, where: str) -> None:
    """Raises InputError for a format version that this lrc does not read."""
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise InputError(f"{where} has format_version {version!r}", "write the checkpoint again")
    if version > FORMAT_VERSION:
        raise InputError(
            f"{where} has format_version {version}, and this lrc reads up to {FORMAT_VERSION}",
            UPGRADE,
        )
