"""Weight files that lie, or that nobody should open, are refused by name before they are read."""

import io
import json
import os
import pickle
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.serialization import MAGIC_NUMBER, PROTOCOL_VERSION

from lrc_cli.checkpoint.headers import check_table_form, parse_record
from lrc_cli.checkpoint.source import open_source
from lrc_cli.errors import InputError

STATE = {"0.weight": torch.arange(48.0).view(6, 8), "0.bias": torch.ones(6)}
Write = Callable[[Path], object]
CASES: dict[str, tuple[str, Write, str]] = {}


def case(name: str, suffix: str, piece: str) -> Callable[[Write], Write]:
    """Notes a way to write a file with this suffix, and what the refusal says."""

    def note(write: Write) -> Write:
        CASES[f"{suffix} {name}"] = (suffix, write, piece)
        return write

    return note


# ---------------------------------------------------------------- torch.save


def saved(**more: Tensor) -> Write:
    return lambda file: torch.save({**STATE, **more}, file)


def nested() -> Tensor:
    with warnings.catch_warnings(action="ignore"):
        return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


case("meta tensor", "pt", "x is a meta tensor")(saved(x=torch.ones(2, 2, device="meta")))
case("sparse tensor", "pt", "x is not a plain dense tensor")(saved(x=torch.eye(3).to_sparse()))
case("nested tensor", "pt", "x is not a plain dense tensor")(saved(x=nested()))
case("nested tensor first", "pt", "holds a nested tensor")(
    lambda file: torch.save({"x": nested(), **STATE}, file)
)
case("complex tensor", "pt", "tensor x is complex (complex64)")(saved(x=torch.ones(2, 2) * 1j))
case("float8 tensor", "pt", "x has dtype float8")(saved(x=torch.ones(2).to(torch.float8_e5m2)))
case("name with a null", "pt", "tensor name '\\x00.weight'")(saved(**{"\0.weight": torch.ones(2)}))
case("name with an escape", "pt", "tensor name")(saved(**{"\x1b[2J": torch.ones(2)}))
case("name of half a character", "pt", "tensor name '\\ud800'")(saved(**{"\ud800": torch.ones(2)}))
case("long name", "pt", "1,000,000 characters")(saved(**{"x" * 10**6: torch.ones(2)}))
case("nothing", "pt", "is empty")(lambda file: file.touch())
case("text", "bin", "cannot be read")(lambda file: file.write_text("hello"))
case("pipe", "pt", "is a pipe")(lambda file: os.mkfifo(file))
case("device", "pt", "is a device")(lambda file: file.symlink_to("/dev/zero"))


class _Rebuilt:
    """Pickles as a tensor of any shape on a storage that says any size."""

    def __init__(self, shape: Any, stride: Any, count: int, offset: int, key: str) -> None:
        self.arguments = (("storage of", key, count), offset, shape, stride, False, OrderedDict())

    def __reduce__(self) -> Any:
        return torch._utils._rebuild_tensor_v2, self.arguments


class _OldPickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, tuple) and value and value[0] == "storage of":
            return ("storage", torch.FloatStorage, value[1], "cpu", value[2], None)
        return None


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, tuple) and value and value[0] == "storage of":
            return ("storage", torch.FloatStorage, value[1], "cpu", value[2])
        return None


def crafted(
    shape: Any,
    stride: Any,
    count: int,
    *,
    offset: int = 0,
    key: str = "0",
    held: int = 192,
    packed: int = zipfile.ZIP_STORED,
) -> Write:
    """Returns a writer of a file of torch.save with one record of `held` bytes."""

    def write(file: Path) -> None:
        described = io.BytesIO()
        _Pickler(described, 2).dump({"0.weight": _Rebuilt(shape, stride, count, offset, key)})
        with zipfile.ZipFile(file, "w", packed) as archive:
            archive.writestr("a/data.pkl", described.getvalue())
            archive.writestr("a/byteorder", "little")
            archive.writestr("a/data/0", b"\1" * held)
            archive.writestr("a/version", "3\n")

    return write


ROWS = ((6, 8), (8, 1), 48)
case("record too short", "pt", "20 bytes long, and 192 bytes are needed")(crafted(*ROWS, held=20))
case("record too long", "pt", "200 bytes long, and 192")(crafted(*ROWS, held=200))
case("no such record", "pt", "data/7 is missing")(crafted(*ROWS, key="7"))
case("record outside", "pt", "data/../0 is missing")(crafted(*ROWS, key="../0"))
case("offset behind the end", "pt", "cannot be read")(crafted(*ROWS, offset=10**6))
case("negative shape", "pt", "cannot be read")(crafted((6, -8), (8, 1), 48))
case("negative count", "pt", "bytes are needed")(crafted((6, 8), (8, 1), -48))
case("shape beyond its storage", "pt", "cannot be read")(crafted((1000, 1000), (1000, 1), 48))
case("10^12 entries", "pt", "4,000,000,000,000 bytes are needed")(
    crafted((10**6, 10**6), (10**6, 1), 10**12)
)
case("10^10 entries in 48", "pt", "would have more bytes than the file")(
    crafted((10**5, 10**5), (0, 0), 48)
)
case("compressed records", "pt", "is compressed")(crafted(*ROWS, packed=zipfile.ZIP_DEFLATED))


@case("pickle of 100 MB", "pt", "is compressed")
def _(file: Path) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"\x80\x02]" + b"N" * 10**8)


@case("two records of a name", "pt", "two records of one name")
def _(file: Path) -> None:
    torch.save(STATE, file)
    with zipfile.ZipFile(file) as archive:
        name = archive.namelist()[-1]
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(file, "a") as archive:
        archive.writestr(name, b"x")


@case("cut short", "pt", "cannot be read")
def _(file: Path) -> None:
    torch.save(STATE, file)
    os.truncate(file, file.stat().st_size - 300)


@case("cut short, old format", "pt", "cannot be read")
def _(file: Path) -> None:
    torch.save(STATE, file, _use_new_zipfile_serialization=False)
    os.truncate(file, file.stat().st_size - 40)


def old(
    count: int, held: int, shape: Any = (6, 8), *, listed: tuple[str, ...] = ("0",), more: int = 0
) -> Write:
    """Returns a writer of an old file with a storage of `count` numbers, of which `held` lie in it.

    Args:
        listed: the storages that the list behind the pickle names.
        more: the bytes behind the storage.
    """

    def write(file: Path) -> None:
        with file.open("wb") as handle:
            for value in (MAGIC_NUMBER, PROTOCOL_VERSION, {"little_endian": True}):
                pickle.dump(value, handle, 2)
            _OldPickler(handle, 2).dump({"0.weight": _Rebuilt(shape, (8, 1), count, 0, "0")})
            pickle.dump(list(listed), handle, 2)
            handle.write(struct.pack("<q", held) + b"\1" * 4 * held + b"\1" * more)

    return write


case("old, storage not listed", "pt", "data/0 is missing")(old(48, 48, listed=()))
case("old, shape a row beyond its storage", "pt", "cannot be read")(old(48, 48, (7, 8)))
case("old, shape a row beyond, and more held", "pt", "224 bytes long, and 192 bytes")(
    old(48, 56, (7, 8))
)
case("old, shape beyond and nothing listed", "pt", "data/0 is missing")(
    old(48, 48, (7, 8), listed=(), more=5000)
)
case("old, fewer held", "pt", "cannot be read")(old(48, 40))
case("old, more held", "pt", "cannot be read")(old(48, 50))
case("old, another storage listed", "pt", "cannot be read")(old(48, 48, listed=("1",)))
case("old, 10^13 numbers", "pt", "cannot be read")(old(10**13, 48))
case("old, less than none", "pt", "cannot be read")(old(-48, -48))


# ---------------------------------------------------------------- safetensors


def header(text: str | bytes, data: bytes = b"", length: int | None = None) -> Write:
    raw = text if isinstance(text, bytes) else text.encode()
    size = len(raw) if length is None else length
    return lambda file: file.write_bytes(struct.pack("<Q", size) + raw + data)


def tensors(*entries: tuple[str, str, list[int], list[int]], more: str = "") -> str:
    items = (
        f"{json.dumps(key)}:{json.dumps({'dtype': d, 'shape': s, 'data_offsets': o})}"
        for key, d, s, o in entries
    )
    return "{" + ",".join([*([more] if more else []), *items]) + "}"


SOUND = ("a", "F32", [2], [0, 8])


def terabytes(file: Path) -> None:
    """Writes a header of one tensor of 4 TB, and a hole."""
    header(tensors(("a", "F32", [10**12], [0, 4 * 10**12])))(file)
    os.truncate(file, file.stat().st_size + 4 * 10**12)


SAFE: dict[str, tuple[Write, str]] = {
    "terabytes of nothing": (terabytes, "are holes"),
    "nothing": (lambda file: file.touch(), "is empty"),
    "length of 2^63": (header("{}", length=2**63), "not a readable"),
    "length of 2^64 - 1": (header("{}", length=2**64 - 1), "not a readable"),
    "length beyond the file": (header("{}", length=1000), "not a readable"),
    "no JSON": (header("hello..."), "not a readable"),
    "deep": (header("[" * 100_000), "not a readable"),
    "not UTF-8": (header(b'{"\xff": 1}'), "not a readable"),
    "hole": (header(tensors(("a", "F32", [2], [8, 16])), b"\0" * 16), "not a readable"),
    "overlap": (
        header(tensors(SOUND, ("b", "F32", [2], [4, 12])), b"\0" * 12),
        "not a readable",
    ),
    "data behind the end": (header(tensors(("a", "F32", [4], [0, 16])), b"\0" * 8), "not a"),
    "more data": (header(tensors(SOUND), b"\0" * 80), "not a readable"),
    "shape and bytes differ": (header(tensors(("a", "F32", [3], [0, 8])), b"\0" * 8), "not a"),
    "10^12 entries": (header(tensors(("a", "F32", [10**12], [0, 4 * 10**12]))), "not a"),
    "shape overflow": (header(tensors(("a", "F32", [2**63, 4], [0, 8])), b"\0" * 8), "not a"),
    "negative shape": (header(tensors(("a", "F32", [-2], [0, 8])), b"\0" * 8), "not a"),
    "unknown dtype": (header(tensors(("a", "F31", [2], [0, 8])), b"\0" * 8), "not a readable"),
    "float8": (header(tensors(("a", "F8_E4M3", [8], [0, 8])), b"\0" * 8), "F8_E4M3"),
    "one name with two shapes": (
        header(tensors(SOUND, ("a", "F32", [1, 2], [0, 8])), b"\0" * 8),
        "has a twice",
    ),
    "name with a null": (header(tensors(("a\0", "F32", [2], [0, 8])), b"\0" * 8), "tensor name"),
    "name with an escape": (header(tensors(("\x1b[2J", "F32", [2], [0, 8])), b"\0" * 8), "name"),
    "long name": (header(tensors(("a" * 10**6, "F32", [2], [0, 8])), b"\0" * 8), "1,000,000 char"),
    "half a character": (
        header(tensors(("\ud800", "F32", [2], [0, 8])), b"\0" * 8),
        "not a",
    ),
    "metadata of numbers": (header(tensors(SOUND, more='"__metadata__":{"a":1}'), b"\0" * 8), ""),
    "metadata no object": (header(tensors(SOUND, more='"__metadata__":[]'), b"\0" * 8), "not a"),
    "pipe": (lambda file: os.mkfifo(file), "is a pipe"),
    "device": (lambda file: file.symlink_to("/dev/zero"), "is a device"),
    "link to itself": (lambda file: file.symlink_to(file.name), ""),
}
for _name, (_write, _piece) in SAFE.items():
    case(_name, "safetensors", _piece)(_write)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("kind", CASES)
def test_a_weight_file_that_is_refused(kind: str, tmp_path: Path) -> None:
    suffix, write, piece = CASES[kind]
    file = tmp_path / f"model.{suffix}"
    write(file)
    with pytest.raises(InputError) as caught:
        open_source(file)
    message = str(caught.value)
    assert str(file) in message and piece in message, message
    assert "\n" not in message and caught.value.remedy
    message.encode()


SOUND_FILES: dict[str, Write] = {
    "plain": saved(),
    "views": lambda file: torch.save({"a": (x := torch.arange(9.0))[:6].view(2, 3), "b": x}, file),
    "transposed": saved(x=torch.arange(6.0).view(2, 3).T),
    "expanded": saved(x=torch.ones(1).expand(3, 4)),
    "without entries": saved(x=torch.empty(0, 5)),
    "every dtype": saved(
        a=torch.ones(2).half(), b=torch.ones(2).bfloat16(), c=torch.ones(2).double()
    ),
    "whole numbers": saved(a=torch.ones(2, dtype=torch.int8), b=torch.ones(3, dtype=torch.bool)),
    "a parameter": saved(x=torch.nn.Parameter(torch.ones(2, 2))),
    "old format with views": lambda file: torch.save(
        {"a": (x := torch.arange(9.0))[:6].view(2, 3), "b": x, "c": torch.ones(2).half()},
        file,
        _use_new_zipfile_serialization=False,
    ),
    "old format": lambda file: torch.save(STATE, file, _use_new_zipfile_serialization=False),
}


@pytest.mark.parametrize("kind", SOUND_FILES)
def test_a_sound_file_of_torch_save_is_read(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    SOUND_FILES[kind](file)
    expected, source = torch.load(file), open_source(file)
    assert set(source.tensors) == set(expected)
    for key, tensor in expected.items():
        assert torch.equal(source.read(key), tensor)


# ---------------------------------------------------------------- what lrc notes in metadata

RECORDS = {
    "no JSON": "left-right",
    "empty": "",
    "a list": "[]",
    "a number": "3",
    "a text": '"x"',
    "null": "null",
    "deep": "[" * 100_000,
    "deep objects": '{"layers": ' * 200 + "1" + "}" * 200,
    "digits": '{"format_version": ' + "9" * 5000 + "}",
    "half a character": '{"factory": "\\ud800"}',
    "factory no text": '{"format_version": 1, "factory": 3}',
    "layers a list": '{"format_version": 1, "layers": []}',
    "layers null": '{"format_version": 1, "layers": null}',
    "an entry no object": '{"format_version": 1, "layers": {"a": 3}}',
    "an entry without storage": '{"format_version": 1, "layers": {"a": {}}}',
    "a storage no text": '{"format_version": 1, "layers": {"a": {"storage": ["low_rank"]}}}',
    "a version no number": '{"format_version": "1", "layers": {}}',
    "a later version": '{"format_version": 99, "layers": {}}',
    "no version": '{"layers": {}}',
}


@pytest.mark.timeout(30)
@pytest.mark.parametrize("kind", RECORDS)
def test_a_strangers_metadata_is_refused(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file(STATE, file, {"lrc": RECORDS[kind]})
    with pytest.raises(InputError) as caught:
        open_source(file, factorised=True)
    assert str(file) in str(caught.value) and caught.value.remedy
    assert len(str(caught.value)) < 400


def test_what_is_not_lrcs_is_no_record(tmp_path: Path) -> None:
    assert parse_record({"format": "pt"}, tmp_path) == {}
    assert parse_record({"lrc": '{"format_version": 1}'}, tmp_path) == {"format_version": 1}
    check_table_form({"a": {"storage": "low_rank", "rank": 3}}, "x")
