"""GGUF files are read here: a bounded reader of the header, and the package gguf's dequantisers.

The header of a stranger's file may claim anything, so every count is looked at before it is
believed, and nothing is read beyond the file. Tensors are multiplied out when somebody asks for
them, into a mapped temporary file.
"""

import struct
from collections import Counter
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lrc_cli.checkpoint.headers import TensorInfo, check_name
from lrc_cli.errors import InputError
from lrc_cli.reading import file_size, open_regular
from lrc_cli.runtime.spill import Spool

SUFFIX = ".gguf"
MAGIC = b"GGUF"
VERSIONS = (2, 3)
MOST_HEADER = 1 << 28
"""The most bytes of a header: tokenizers of a few hundred thousand tokens take ten million."""
MOST_KEYS, MOST_TENSORS, MOST_ITEMS = 10_000, 100_000, 4_000_000
MOST_DIMENSIONS = 4
CHUNK = 1 << 22
"""The number of entries that are multiplied out at a time."""
STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "?", 10: "<Q",
           11: "<q", 12: "<d"}  # fmt: skip
"""The struct format of each type of value that is no text and no list."""
RESTORE = "copy it again, or convert the model again"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """The header of one tensor: how and where its numbers lie."""

    shape: tuple[int, ...]
    """The shape as other formats have it: rows first."""
    kind: Any
    """The package's name of the way in which numbers are stored."""
    offset: int
    num_bytes: int


class GgufFile:
    """The tensors of a GGUF file under its own names, multiplied out to float32.

    Args:
        file: the file.

    Raises:
        InputError: the package gguf is missing, or the file is damaged or of another version.
    """

    def __init__(self, file: Path) -> None:
        try:
            import gguf
        except ImportError as error:
            raise InputError(
                f"{file}: GGUF files are read with the package gguf, which is not installed",
                "pip install 'lrc-cli[certify]'",
            ) from error
        self._gguf: Any = gguf
        self.files, self.place = [file], file
        self.metadata, self._entries = _read_header(file, gguf)
        self.tensors = {
            name: TensorInfo(file=file, shape=entry.shape, dtype=torch.float32)
            for name, entry in self._entries.items()
        }
        self._data = np.memmap(file, mode="r", dtype=np.uint8)
        self._spool = Spool()
        self._kept: dict[str, torch.Tensor] = {}

    @property
    def kinds(self) -> Counter[str]:
        """The number of tensors that are stored in each way."""
        return Counter(entry.kind.name for entry in self._entries.values())

    @property
    def num_bytes(self) -> int:
        """The bytes of all tensors as they are stored."""
        return sum(entry.num_bytes for entry in self._entries.values())

    def read(self, name: str) -> torch.Tensor:
        """Returns the tensor in float32, a view of a mapped temporary file.

        Raises:
            InputError: the package cannot multiply out numbers that are stored in this way.
            RunError: TMPDIR has no room for the tensor.
        """
        if name not in self._kept:
            self._kept[name] = self._dense(name)
        return self._kept[name]

    def _dense(self, name: str) -> torch.Tensor:
        entry = self._entries[name]
        tensor = self._spool.empty(entry.shape, torch.float32)
        rows = int(np.prod(entry.shape[:-1], dtype=np.int64)) if entry.shape else 1
        stored = self._data[entry.offset : entry.offset + entry.num_bytes].reshape(rows, -1)
        flat = tensor.view(rows, -1)
        step = max(1, CHUNK // max(1, flat.shape[1]))
        for start in range(0, rows, step):
            try:
                part = self._gguf.quants.dequantize(stored[start : start + step], entry.kind)
            except NotImplementedError as error:
                raise InputError(
                    f"{self.place}: {name} is stored as {entry.kind.name}, which the package gguf"
                    " cannot multiply out",
                    "upgrade gguf, or convert the model to another type",
                ) from error
            numbers = torch.from_numpy(np.array(part, dtype=np.float32))
            flat[start : start + step] = numbers.view(-1, flat.shape[1])
        return tensor


class _Header:
    """Reads the parts of a header one after another, within bounds."""

    def __init__(self, handle: BufferedReader, file: Path) -> None:
        self.handle, self.file, self.size = handle, file, file_size(file)

    def bytes(self, count: int) -> bytes:
        if count > min(MOST_HEADER, self.size) or self.handle.tell() + count > MOST_HEADER:
            raise self.damaged(f"it claims {count:,} bytes where there are not so many")
        found = self.handle.read(count)
        if len(found) < count:
            raise self.damaged("it ends early")
        return found

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.bytes(struct.calcsize(form)))[0]

    def count(self, most: int, what: str) -> int:
        found = int(self.number("<Q"))
        if found > most:
            raise self.damaged(f"it claims {found:,} {what}, and at most {most:,} are read")
        return found

    def text(self) -> str:
        found = self.bytes(self.count(MOST_HEADER, "bytes of a text"))
        return found.decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind != ARRAY:
            raise self.damaged(f"a value is of the unknown type {kind}")
        inner, length = int(self.number("<I")), self.count(MOST_ITEMS, "entries of a list")
        if inner == ARRAY:
            raise self.damaged("a list holds lists")
        if inner in SCALARS:
            size = struct.calcsize(SCALARS[inner])
            form = SCALARS[inner].removeprefix("<")
            return list(struct.unpack(f"<{length}{form}", self.bytes(length * size)))
        return [self.value(inner) for _ in range(length)]

    def damaged(self, why: str) -> InputError:
        return InputError(f"{self.file}: its GGUF header cannot be read: {why}", RESTORE)


def _read_header(file: Path, gguf: Any) -> tuple[dict[str, Any], dict[str, Entry]]:
    """Returns the file's metadata, and where each tensor lies."""
    with open_regular(file) as handle:
        header = _Header(handle, file)
        if header.size < 24 or header.bytes(4) != MAGIC:
            raise InputError(f"{file}: is no GGUF file, which begins with GGUF", "check the path")
        version = header.number("<I")
        if version not in VERSIONS:
            raise header.damaged(f"its version is {version}, and versions 2 and 3 are read")
        num_tensors = header.count(MOST_TENSORS, "tensors")
        metadata: dict[str, Any] = {}
        for _ in range(header.count(MOST_KEYS, "keys")):
            key = header.text()
            if key in metadata:
                raise header.damaged(f"it has the key {key[:80]!r} twice")
            metadata[key] = header.value(int(header.number("<I")))
        infos = [_read_info(header, gguf) for _ in range(num_tensors)]
        end = handle.tell()
    align = metadata.get("general.alignment", 32)
    if not isinstance(align, int) or align < 1 or align > 1 << 20 or align & (align - 1):
        raise header.damaged(f"its alignment is {align!r}")
    start = end + -end % align
    entries: dict[str, Entry] = {}
    for name, entry in infos:
        check_name(name, file)
        if name in entries:
            raise header.damaged(f"it has the tensor {name} twice")
        if start + entry.offset + entry.num_bytes > header.size:
            raise header.damaged(f"the tensor {name} lies beyond the end of the file")
        entries[name] = Entry(
            shape=entry.shape,
            kind=entry.kind,
            offset=start + entry.offset,
            num_bytes=entry.num_bytes,
        )
    if not entries:
        raise InputError(f"{file}: holds no tensor", RESTORE)
    return metadata, entries


def _read_info(header: _Header, gguf: Any) -> tuple[str, Entry]:
    name = header.text()
    dimensions = int(header.number("<I"))
    if not 1 <= dimensions <= MOST_DIMENSIONS:
        raise header.damaged(f"the tensor {name[:80]!r} has {dimensions} dimensions")
    shape = tuple(header.count(header.size * 64, "entries") for _ in range(dimensions))[::-1]
    number = int(header.number("<I"))
    try:
        kind = gguf.GGMLQuantizationType(number)
        block, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError) as error:
        raise header.damaged(f"the tensor {name[:80]!r} is stored as type {number}") from error
    numbers = 1
    for length in shape:
        numbers *= length
    if not numbers or shape[-1] % block or numbers > header.size * 64:
        raise header.damaged(f"the tensor {name[:80]!r} has shape {shape}")
    entry = Entry(
        shape=shape,
        kind=kind,
        offset=header.count(header.size, "bytes before a tensor"),
        num_bytes=numbers // block * num_bytes,
    )
    return name, entry
