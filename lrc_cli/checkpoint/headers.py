"""This module reads what weight files say of themselves: names, shapes, dtypes, format version."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lrc_cli.checkpoint.foreign import explain_file, not_dense
from lrc_cli.errors import InputError
from lrc_cli.reading import check_regular, open_regular, parse_json

FORMAT_VERSION = 1
"""The on-disk format that this version writes, and the newest format that this version reads."""

UPGRADE = "upgrade it with: pip install --upgrade lrc-cli"
"""The remedy for a checkpoint that is newer than this version."""

MOST_HEADER = 100_000_000
"""The most bytes of a header that safetensors reads."""
MOST_IN_NAME = 1000
"""The most characters of a tensor's name."""

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
    check_regular(Path(file))
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        known = explain_file(Path(file))
        if known is not None:
            raise known from error
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
        _check_header(Path(file))
        for key in handle.offset_keys():
            check_name(key, file)
            entry = handle.get_slice(key)
            name = entry.get_dtype()
            if name not in DTYPES:
                raise not_dense(Path(file), key, name)
            headers[key] = TensorInfo(
                file=Path(file), shape=tuple(entry.get_shape()), dtype=DTYPES[name]
            )
    return headers


def _check_header(file: Path) -> None:
    """Raises InputError for a header that has a name twice, which safetensors lets pass."""
    with open_regular(file) as handle:
        length = int.from_bytes(handle.read(8), "little")
        header = handle.read(min(length, MOST_HEADER))
    parse_json(header.decode(), f"{file}: its header")


def check_name(key: str, file: str | Path) -> None:
    """Raises InputError for a tensor's name that no file or message should repeat."""
    try:
        key.encode()
        is_text = all(character >= " " and character != "\x7f" for character in key)
    except UnicodeEncodeError:
        is_text = False
    if not is_text or len(key) > MOST_IN_NAME:
        shown = key.encode("unicode_escape")[:60].decode()
        raise InputError(
            f"{file}: the tensor name '{shown}' ({len(key):,} characters) is too long or holds"
            " characters that are no text",
            "rename the tensor",
        )


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


def parse_record(metadata: Mapping[str, str], file: Path) -> dict[str, Any]:
    """Reads what lrc noted in the metadata of a safetensors file (version, layer table, factory).

    Returns:
        The record; empty where the file is not lrc's.

    Raises:
        InputError: the metadata has a key "lrc" with something that lrc does not write.
    """
    where = f"{file}: the metadata `lrc`"
    record = parse_json(metadata.get("lrc", "{}"), where)
    if not isinstance(record, dict) or not isinstance(record.get("factory", ""), str | None):
        raise InputError(f"{where} is not what lrc writes", "write the checkpoint again")
    check_table_form(record.get("layers", {}), where)
    return record


def check_table_form(table: object, where: str) -> None:
    """Raises InputError for a layer table that is not {disk name: {"storage": a name, ...}}."""
    entries = table.values() if isinstance(table, dict) else [None]
    if not all(isinstance(x, dict) and isinstance(x.get("storage"), str) for x in entries):
        raise InputError(
            f"{where}: `layers` is no layer table, which has a storage for each layer",
            "write the checkpoint again, it is damaged",
        )


def check_version(version: object, where: str) -> None:
    """Raises InputError for a format version that this lrc does not read."""
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise InputError(f"{where} has format_version {version!r}", "write the checkpoint again")
    if version > FORMAT_VERSION:
        raise InputError(
            f"{where} has format_version {version}, and this lrc reads up to {FORMAT_VERSION}",
            UPGRADE,
        )
