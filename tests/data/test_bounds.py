"""Data files that claim more than they hold, or that nobody should open, are refused in seconds."""

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import soundfile
from memory_helpers import peak_growth
from PIL import Image
from pyarrow import parquet

from lrc_cli.data import folders, records
from lrc_cli.data import parquet as bounded
from lrc_cli.data.draw import Purpose, draw
from lrc_cli.data.folders import visible_files
from lrc_cli.data.processors import Processors
from lrc_cli.errors import InputError

Write = Callable[[Path], object]


class Standing:
    """Stands for a tokenizer and for processors, which no case comes to."""

    sampling_rate = 16000


class Given(Processors):
    """Processors that never open anything."""

    def images(self) -> Any:
        return Standing()

    def audio(self) -> Any:
        return Standing()


def draw_from(path: Path) -> None:
    purpose = Purpose(
        name="calibration", path=path, sequence_length=8, num_sequences=1, required=True
    )
    draw([purpose], processors=Given(tokenizer=Standing()), seed=0)


def holes(file: Path) -> None:
    file.write_bytes(b"text")
    os.truncate(file, 4 * 10**12)


def long_line(file: Path) -> None:
    """Writes a line of 540 MB, which holds nothing but a hole."""
    file.write_bytes(b'{"text": "w1"}\n{"text": "' if file.suffix == ".jsonl" else b'text\nw1\n"')
    os.truncate(file, 540_000_000)


def many_lines(file: Path) -> None:
    """Writes a field of a .csv that goes on for many lines."""
    file.write_bytes(b'text\nw1\n"' + b"w1 w2 w3\n" * 8_000_000)


def table(values: list[Any], **options: Any) -> Write:
    return lambda file: parquet.write_table(pyarrow.table({"text": values}), file, **options)


def claiming(old: int, new: int, values: list[Any]) -> Write:
    """Returns a writer of a table whose footer has another number in place of `old`."""

    def varint(number: int) -> bytes:
        number, out = number << 1, b""
        while number > 127:
            out, number = out + bytes([number & 127 | 128]), number >> 7
        return out + bytes([number])

    def write(file: Path) -> None:
        table(values)(file)
        raw = file.read_bytes()
        length = int.from_bytes(raw[-8:-4], "little")
        footer = raw[-8 - length : -8].replace(varint(old), varint(new))
        file.write_bytes(raw[: -8 - length] + footer + struct.pack("<I", len(footer)) + b"PAR1")

    return write


EQUAL = "w1 " * 300_000
FILES: dict[str, tuple[str, Write, str]] = {
    "a text, a pipe": ("txt", lambda f: os.mkfifo(f), "a.txt"),
    "a text, a device": ("txt", lambda f: f.symlink_to("/dev/zero"), "a.txt"),
    "a text, a loop of links": ("txt", lambda f: f.symlink_to(f.name), "a.txt"),
    "a text, a directory": ("txt", lambda f: f.mkdir(), "a.txt"),
    "a text of terabytes of nothing": ("txt", holes, "are holes"),
    "records of terabytes of nothing": ("jsonl", holes, "are holes"),
    "a table of terabytes of nothing": ("csv", holes, "are holes"),
    "a parquet of terabytes of nothing": ("parquet", holes, "are holes"),
    "tensors of terabytes of nothing": ("safetensors", holes, "are holes"),
    "arrays of terabytes of nothing": ("npz", holes, "are holes"),
    "records, a device": ("jsonl", lambda f: f.symlink_to("/dev/zero"), "a.jsonl"),
    "a table, a device": ("csv", lambda f: f.symlink_to("/dev/zero"), "a.csv"),
    "a parquet, a device": ("parquet", lambda f: f.symlink_to("/dev/zero"), "a.parquet"),
    "a parquet, a pipe": ("parquet", lambda f: os.mkfifo(f), "a.parquet"),
    "records, a line of 540 MB": ("jsonl", long_line, "a.jsonl:2: a record of more than"),
    "a table, a line of 540 MB": ("csv", long_line, "a.csv:3: a record of more than"),
    "a table, a field of many lines": ("csv", many_lines, ": a record of more than"),
    "rows that are no rows": ("parquet", claiming(700, 10**12, ["w1"] * 700), "rows in"),
    "20 million equal rows": ("parquet", table([""] * 20_000_000), "claims 20,000,000 rows"),
    "gigabytes in one row": (
        "parquet",
        table(["x" * 30_000_000], compression="zstd", use_dictionary=False),
        "which no data of use does",
    ),
    "gigabytes in equal rows": (
        "parquet",
        table([EQUAL] * 100, compression="zstd"),
        "which no data of use does",
    ),
    "one row of a long text": (
        "parquet",
        table(["".join(chr(97 + i % 26) * 30 for i in range(2_200_000))], compression="none"),
        "record 1 has more than",
    ),
    "a list of equal numbers": (
        "parquet",
        table([[1] * 20_000_000], compression="zstd"),
        "claims 20,000,000 values",
    ),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", FILES)
def test_a_data_file_that_is_refused(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounded, "BOMB_BYTES", 20_000_000)  # tables of 500 MB take long to write
    suffix, write, piece = FILES[kind]
    file = tmp_path / f"a.{suffix}"
    write(file)
    with peak_growth() as grown, pytest.raises(InputError) as caught:
        draw_from(file)
    assert str(file) in str(caught.value) and piece in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value) and caught.value.remedy
    assert grown() < 1.5e9


def test_long_records_are_read(tmp_path: Path) -> None:
    text = "w1 w2 " * 300_000
    parquet.write_table(pyarrow.table({"text": [text, "b", text, text]}), tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text(f'text\n"{text}"\nb\n{text}\n"{text}"\n')
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{x}"}}\n' for x in [text, "b", text]))
    for name, count in (("a.parquet", 4), ("a.csv", 4), ("a.jsonl", 3)):
        found = [value for _, value in records.read_records(tmp_path / name, "text")]
        assert found == [text, "b", text, text][:count]


def test_records_that_are_long_together_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "MOST_IN_RECORD", 30)
    (tmp_path / "a.csv").write_text("text\n" + '"w1 w2\nw3 w4"\n' * 9)
    (tmp_path / "a.jsonl").write_text('{"text": "w1 w2"}\n\n' * 9)
    for name in ("a.csv", "a.jsonl"):
        assert len(list(records.read_records(tmp_path / name, "text"))) == 9


@pytest.mark.parametrize("encoding", ["PLAIN", "DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY"])
@pytest.mark.parametrize("values", [["a", "b"] * 400, [f"text {i}" for i in range(800)]])
def test_columns_of_any_encoding_are_read(values: list[str], encoding: str, tmp_path: Path) -> None:
    arrow = pyarrow.table({"text": values})
    file = tmp_path / "a.parquet"
    parquet.write_table(arrow, file, use_dictionary=False, column_encoding={"text": encoding})
    assert list(bounded.values_of(file, "text", 100)) == values
    parquet.write_table(arrow, file, row_group_size=7)
    assert list(bounded.values_of(file, "text", 100)) == values


# ---------------------------------------------------------------- folders


def png(width: int, height: int) -> Write:
    """Returns a writer of the header of an image, and of nothing else."""

    def chunk(name: bytes, content: bytes) -> bytes:
        sum_ = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", sum_)

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    raw = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 99))
    return lambda file: file.write_bytes(raw + chunk(b"IEND", b""))


def wav(claimed: int, channels: int = 1, held: int = 2000) -> Write:
    form = struct.pack("<HHIIHH", 1, channels, 16000, 32000 * channels, 2 * channels, 16)
    head = b"WAVEfmt " + struct.pack("<I", 16) + form + b"data" + struct.pack("<I", claimed)
    raw = b"RIFF" + struct.pack("<I", min(claimed + 36, 2**32 - 1)) + head
    return lambda file: file.write_bytes(raw + b"\1\2" * held)


def long_wav(file: Path) -> None:
    wav(800_000_000, held=4)(file)
    os.truncate(file, 800_000_044)


def flac(file: Path) -> None:
    """Writes a recording whose header states 2^36 - 1 samples."""
    soundfile.write(file, [0.1, -0.1] * 2000, 16000)
    raw = bytearray(file.read_bytes())
    raw[21] |= 0x0F
    raw[22:26] = b"\xff" * 4
    file.write_bytes(bytes(raw))


def postscript(file: Path) -> None:
    file.write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(ran) (w) file closefile\n%%EOF\n"
    )


def rare(file: Path) -> None:
    Image.new("RGB", (9, 9)).save(file, format="PCX")


IN_FOLDERS: dict[str, tuple[str, Write, str]] = {
    "an image, a pipe": ("png", lambda f: os.mkfifo(f), "is a pipe"),
    "an image, a device": ("png", lambda f: f.symlink_to("/dev/zero"), "is a device"),
    "an image, a link to nothing": ("png", lambda f: f.symlink_to("x"), "there is no such file"),
    "an image, a loop of links": ("png", lambda f: f.symlink_to(f.name), "cannot be read"),
    "an image of terabytes of nothing": ("png", holes, "are holes"),
    "100 million pixels": ("png", png(10_000, 10_000), "has more than 89,478,485 pixels"),
    "a billion pixels": ("png", png(10**5, 10**4), "has more than 89,478,485 pixels"),
    "10^18 pixels": ("png", png(10**9, 10**9), "has more than 89,478,485 pixels"),
    "a program of PostScript": ("png", postscript, "cannot be read as an image"),
    "a kind that is not said to be read": ("png", rare, "cannot be read as an image"),
    "a recording, a pipe": ("wav", lambda f: os.mkfifo(f), "is a pipe"),
    "a recording, a device": ("flac", lambda f: f.symlink_to("/dev/zero"), "is a device"),
    "a recording of terabytes of nothing": ("wav", holes, "are holes"),
    "2 GB of samples": ("wav", wav(2 * 10**9), "is cut short"),
    "four hours of samples": ("wav", long_wav, "has 400,000,000 samples"),
    "2^36 samples": ("flac", flac, "has 68,719,476,735 samples"),
}


@pytest.mark.timeout(30)
@pytest.mark.parametrize("kind", IN_FOLDERS)
def test_a_file_of_a_folder_that_is_refused(kind: str, tmp_path: Path) -> None:
    suffix, write, piece = IN_FOLDERS[kind]
    file = tmp_path / f"a.{suffix}"
    write(file)
    with peak_growth() as grown, pytest.raises(InputError) as caught:
        draw_from(tmp_path)
    assert str(file) in str(caught.value) and piece in str(caught.value), str(caught.value)
    assert caught.value.remedy and grown() < 1e9


def test_a_recording_of_unknown_length_is_read_to_its_end(tmp_path: Path) -> None:
    wav(2**32 - 1)(tmp_path / "a.wav")
    samples, _ = folders.read_audio(tmp_path / "a.wav")
    assert len(samples) == 2000


@pytest.mark.timeout(60)
def test_a_folder_of_other_files_is_not_walked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "MOST_OTHERS", 50)
    for folder in range(9):
        (tmp_path / f"{folder}").mkdir()
        for i in range(9):
            (tmp_path / f"{folder}" / f"{i}.o").touch()
    with pytest.raises(InputError, match="more than 50 files that are no data"):
        draw_from(tmp_path)
    for i in range(9):
        (tmp_path / "0" / f"{i}.png").touch()
    assert len(list(visible_files(tmp_path / "0"))) == 18
