"""What the files of a checkpoint say of themselves: names, shapes, dtypes, format version."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lrc_cli.errors import InputError

FORMAT_VERSION = 1
"""The newest on-disk format that this version reads, and the one it writes."""

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
    """Where one stored tensor lies, as its file's header says."""

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
    """A safetensors handle whose tensors are views of the mapped file.

    Raises:
        InputError: for a missing or truncated file, or one that is not safetensors.
    """
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        cause = f"{file} is not a readable safetensors file: {error}"
        raise InputError(cause, "copy it again, it may be truncated") from error


def read_headers(files: Iterable[str | Path]) -> dict[str, TensorInfo]:
    """Every stored tensor by its key, in file order; reads no tensor data.

    Raises:
        InputError: for a file that is not safetensors, or a dtype this version does not read.
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
    """The weight files of one format in a directory, by its index where it has one; may be empty.

    Args:
        single: name of the file where there is one.
        index: name of the index where there are several.
        suffixes: of files that are taken by any name where neither is there.

    Raises:
        InputError: a shard that the index names is missing, the index is none, or several files
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
    """Parse a JSON object.

    Raises:
        InputError: the file cannot be read, is not UTF-8 JSON, or not an object.
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
