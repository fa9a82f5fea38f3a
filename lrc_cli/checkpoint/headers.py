"""This module reads what weight files say of themselves: names, shapes, dtypes, format version."""

import json
from collections.abc import Iterable
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

    A key that several files hold counts once, from the first file.

    Raises:
        InputError: a file is not safetensors, has a dtype that this version does not read, or holds
            other numbers than an earlier file for one key.
    """
    headers: dict[str, TensorInfo] = {}
    for file in files:
        for key, info in file_headers(file).items():
            first = headers.setdefault(key, info)
            if first is not info and not _is_same(key, first.file, info.file):
                raise differ(key, first.file, key, info.file)
    return headers


def file_headers(file: str | Path) -> dict[str, TensorInfo]:
    """Reads the header of every tensor of one file, by key and in file order.

    Raises:
        InputError: the file is not safetensors, or has a dtype that this version does not read.
    """
    headers = {}
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


def _is_same(key: str, first: Path, second: Path) -> bool:
    with open_tensors(first) as one, open_tensors(second) as other:
        return has_same_bytes(one.get_tensor(key), other.get_tensor(key))


def has_same_bytes(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Returns whether two tensors have one shape, one dtype and the same bytes.

    Every NaN equals itself, and -0 is not 0.
    """
    if first.shape != second.shape or first.dtype != second.dtype or first.is_quantized:
        return False
    flat = (tensor.detach().contiguous().flatten() for tensor in (first, second))
    one, other = (tensor.view(torch.uint8) for tensor in flat)
    return torch.equal(one, other)


def differ(first: str, first_file: Path, second: str, second_file: Path) -> InputError:
    """Returns the refusal of two stored tensors that stand for one and have other numbers."""
    one, other = f"{first} in {first_file}", f"{second} in {second_file}"
    return InputError(
        f"{one} and {other} are one tensor, and their numbers differ",
        "remove the wrong one from the checkpoint",
    )


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
