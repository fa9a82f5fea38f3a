"""Tensor files of data are looked at before memory is taken for them."""

import io
import os
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lrc_cli.data import npz
from lrc_cli.data.rows import read_rows
from lrc_cli.errors import InputError

X = np.arange(32, dtype=np.float32).reshape(8, 4)
Write = Callable[[Path], object]


def arrays(**named: object) -> Write:
    return lambda file: np.savez(file, **named)


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def head(shape: str, data: bytes = b"", descr: str = "<f4", version: int = 1) -> bytes:
    """An .npy that says any shape."""
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H", len(text)) + text + data


def members(packed: int = zipfile.ZIP_STORED, **named: bytes) -> Write:
    def write(file: Path) -> None:
        with zipfile.ZipFile(file, "w", packed) as archive:
            for name, data in named.items():
                archive.writestr(name.replace("_", "."), data)

    return write


def encrypted(file: Path) -> None:
    np.savez(file, x=X)
    data = bytearray(file.read_bytes())
    data[6] |= 1
    data[data.index(b"PK\x01\x02") + 8] |= 1
    file.write_bytes(data)


def twice(file: Path) -> None:
    np.savez(file, x=X)
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(file, "a") as archive:
        archive.writestr("x.npy", npy(X + 1))


def damaged(file: Path) -> None:
    np.savez(file, x=X)
    data = bytearray(file.read_bytes())
    data[220] ^= 1
    file.write_bytes(data)


REFUSED: dict[str, tuple[Write, str]] = {
    "nothing": (lambda file: file.touch(), "cannot be read as .npz"),
    "text": (lambda file: file.write_text("hello"), "cannot be read as .npz"),
    "a pickle": (lambda file: file.write_bytes(b"\x80\x02K\x01."), "cannot be read as .npz"),
    "an npy": (lambda file: file.write_bytes(npy(X)), "cannot be read as .npz"),
    "cut short": (lambda file: (np.savez(file, x=X), os.truncate(file, 200)), "cannot be read"),
    "a pipe": (lambda file: os.mkfifo(file), "is a pipe"),
    "a device": (lambda file: file.symlink_to("/dev/zero"), "is a device"),
    "encrypted": (encrypted, "x.npy is encrypted"),
    "two of a name": (twice, "two arrays of one name"),
    "a flipped bit": (damaged, "cannot be read"),
    "another member": (members(x_npy=npy(X), note_txt=b"hi"), "note.txt is no array"),
    "objects": (arrays(x=np.array([{}, 1], dtype=object)), "x holds object, no numbers"),
    "objects beside numbers": (arrays(a=X, x=np.array([None] * 8)), "x holds object"),
    "texts": (arrays(x=np.array(["a", "b"])), "x holds <U1"),
    "dates": (arrays(x=np.array(["2020-01-01"], dtype="M8[D]")), "no numbers"),
    "complex numbers": (arrays(x=X.astype(np.complex64)), "complex64"),
    "records": (arrays(x=np.zeros(3, dtype=[("a", "f4")])), "no numbers"),
    "a scalar": (arrays(x=np.float32(3)), "first dimensions"),
    "no row": (arrays(x=np.zeros((0, 4))), "first dimensions"),
    "no array": (arrays(), "first dimensions"),
    "other lengths": (arrays(x=X, y=X[:3]), "first dimensions"),
    "infinity": (arrays(x=np.full((2, 2), np.inf)), "NaN or infinity"),
    "10^12 entries": (members(x_npy=head("(1000000, 1000000)")), "takes 4,000,000,000,000 bytes"),
    "10^40 entries": (members(x_npy=head(f"({10**20}, {10**20})")), "bytes, and the file holds 0"),
    "fewer than said": (members(x_npy=head("(8, 4)", b"\0" * 100)), "the file holds 100"),
    "more than said": (members(x_npy=head("(2, 4)", b"\0" * 100)), "the file holds 100"),
    "a negative shape": (members(x_npy=head("(-4, 4)")), "has the shape (-4, 4)"),
    "truth for a shape": (members(x_npy=head("(True, 4)", b"\0" * 16)), "has the shape"),
    "a broken header": (members(x_npy=head("(4, 4")), "cannot be read"),
    "code in the header": (members(x_npy=head("__import__('os')")), "cannot be read"),
    "a null in the header": (members(x_npy=head("(4,\0)")), "cannot be read"),
    "another version": (members(x_npy=head("(4,)", version=9)), "version (9, 0)"),
    "objects by the header": (members(x_npy=head("(1,)", b"\0" * 8, "|O")), "no numbers"),
    "a bomb that lies": (
        members(zipfile.ZIP_DEFLATED, x_npy=head("(1000000000,)", b"\0" * 10**6)),
        "the file holds 1,000,000",
    ),
    "a bomb": (
        members(zipfile.ZIP_DEFLATED, x_npy=head("(5000000,)", b"\0" * 20_000_000)),
        "which no data of use does",
    ),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", REFUSED)
def test_an_npz_that_is_refused(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(npz, "BOMB_BYTES", 10_000_000)
    write, piece = REFUSED[kind]
    file = tmp_path / "x.npz"
    write(file)
    with pytest.raises(InputError) as caught:
        read_rows(file)
    message = str(caught.value)
    assert str(file) in message and piece in message, message
    assert "\n" not in message and caught.value.remedy


READ = {
    "as written": X,
    "by columns": np.asfortranarray(X),
    "the other byte order": X.astype(">f4"),
    "half": X.astype(np.float16),
    "long double": X.astype(np.longdouble),
    "without signs": X.astype(np.uint64),
    "truth": X > 3,
    "small": X.astype(np.int8),
}


@pytest.mark.parametrize("kind", READ)
def test_an_npz_that_is_read(kind: str, tmp_path: Path) -> None:
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "x.npz", x=READ[kind])
        found = read_rows(tmp_path / "x.npz").tensors["x"]
        assert torch.equal(found.double(), torch.from_numpy(READ[kind].astype(np.float64)))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn])
def test_safetensors_of_other_numbers(dtype: torch.dtype, tmp_path: Path) -> None:
    save_file({"x": torch.ones(4, 4).to(dtype)}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="x holds"):
        read_rows(tmp_path / "x.safetensors")
    os.mkfifo(tmp_path / "y.safetensors")
    with pytest.raises(InputError, match="is a pipe"):
        read_rows(tmp_path / "y.safetensors")
