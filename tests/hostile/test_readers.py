"""The readers of bytes take good files and refuse spoiled ones; `make fuzz` spoils many more."""

import base64
import json
import random
from pathlib import Path

import fuzz_bytes
import pico
import pytest
from hostile.properties import MANIFEST
from hostile.readers import READERS

from lrc_cli.checkpoint import side_files
from lrc_cli.checkpoint.source import open_source
from lrc_cli.data import parquet
from lrc_cli.errors import InputError

NUM_SPOILED = 40
PARQUET = READERS["parquet"].good()[1]


def manifest(name: str) -> bytes:
    """Returns a manifest of lrc's that names one more file."""
    return json.dumps({**MANIFEST, "files": {**MANIFEST["files"], name: "0" * 64}}).encode()


def torch_end(start: int, *spoiled: int) -> bytes:
    """Returns a file of torch.save with other bytes in the parts that end the archive."""
    raw = bytearray(READERS["torch"].good()[0])
    at = raw.rindex(b"PK\x06\x07") + start
    raw[at : at + len(spoiled)] = bytes(spoiled)
    return bytes(raw)


ABORTS = base64.b64decode(
    "UEFSMRUEFRwVHEwVBBUAEgAAAwAAAG9uZQMAAAB0d28VABUSFRIsFQYVEBUGFQYcNgAoA3R3bxgDb25lEREAAAACAAAA"
    "BgEBAwIVBBksNQAYBnNjaGVtYRUCABUMJT0YBHRleHQlAEwcAAAAFgYZHBkcJgAcFQwZNQAGEBkYBHRleHQVABYGFowB"
    "FowBJkAmCBw2ACgDdHdvGANvbmUREQAZLBUEFQAVAgAVABUQFQIAPBYSGQYZJgAGAAAAFowBFgYmCBaMAQAoIHBhcnF1"
    "ZXQtY3BwLZ6NjW93IHZlcnNpb24gMjYuMC4xGRwcAAAApgAAAFBBUjE="
)
"""A .parquet on whose footer pyarrow 26.0.1 ends the process."""

FOUND = {
    "torch: an archive on two disks": ("torch", torch_end(16, 2)),
    "torch: an archive on another disk": ("torch", torch_end(4, 1)),
    "torch: a directory at no place": ("torch", torch_end(8, *[255] * 8)),
    "torch: no directory": ("torch", torch_end(20, *[0] * 8)),
    "parquet: a value that is no text": ("parquet", PARQUET.replace(b"two", b"tw\x91")),
    "parquet: a column's name that is no text": ("parquet", PARQUET.replace(b"text", b"te\x91t")),
    "parquet: every text of the file is none": ("parquet", PARQUET.replace(b"e", b"\xff")),
    "parquet: a footer on which pyarrow ends the process": ("parquet", ABORTS),
    "manifest: a file elsewhere": ("manifest", manifest(__file__)),
    "manifest: a file above": ("manifest", manifest("../manifest.json/lrc.yaml")),
    "manifest: a file by two names": ("manifest", manifest("./lrc.yaml")),
    "manifest: a file by a doubled slash": ("manifest", manifest("a//../lrc.yaml")),
    "manifest: a name too long": ("manifest", manifest("a" * 300)),
    "manifest: a path too long": ("manifest", manifest("a/" * 3000 + "b")),
    "manifest: a name with a zero": ("manifest", manifest("a\0b")),
    "manifest: no name": ("manifest", manifest("")),
    "manifest: the folder itself": ("manifest", manifest(".")),
}
"""What was found once, and more of its kind."""


def spoiled(raw: bytes, chance: random.Random) -> bytes:
    """Returns bytes of which some are replaced, taken out and doubled."""
    for _ in range(chance.randint(1, 4)):
        at, end = sorted(chance.choices(range(len(raw) + 1), k=2))
        piece = chance.choice([b"", chance.randbytes(1), chance.randbytes(8), raw[at:end] * 2])
        raw = raw[:at] + piece + raw[chance.choice([at, at + 1, end]) :]
    return raw


@pytest.mark.parametrize("name", READERS)
def test_a_good_file_is_taken(name: str) -> None:
    for good in READERS[name].good():
        assert READERS[name].holds(good) is not None


@pytest.mark.parametrize("name", READERS)
def test_a_spoiled_file_is_taken_or_refused(name: str) -> None:
    chance = random.Random(name)
    for good in READERS[name].good():
        for _ in range(NUM_SPOILED):
            READERS[name].holds(spoiled(good, chance))


@pytest.mark.parametrize("case", FOUND)
def test_what_was_found_once_stays_mended(case: str) -> None:
    name, raw = FOUND[case]
    READERS[name].holds(raw)


def test_a_footer_that_ends_the_process_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program that ends by a signal stands for any pyarrow that aborts."""
    file = tmp_path / "a.parquet"
    file.write_bytes(PARQUET)
    ends = "import os, signal; os.kill(os.getpid(), signal.SIGABRT)"
    monkeypatch.setattr(parquet, "READ_FOOTER", ends)
    with pytest.raises(InputError, match=r"a\.parquet: .*ends on its footer"):
        parquet.column_names(file)


def test_a_file_elsewhere_is_none_of_an_output(tmp_path: Path) -> None:
    assert READERS["manifest"].holds(manifest("a/b.txt")) is not None
    for name in (str(tmp_path), "../a", "a/../../b", "./a", "a//b", "", "a/"):
        assert READERS["manifest"].holds(manifest(name)) is None, name


def test_a_spoiled_archive_beside_the_weights_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(side_files, "LARGE", 0)
    pico.write_model(tmp_path, "llama")
    (tmp_path / "old").mkdir()
    (tmp_path / "old/pytorch_model.bin").write_bytes(torch_end(4, 1))
    assert open_source(tmp_path).left_out == {"old/pytorch_model.bin": side_files.UNREAD}


def test_the_script_says_that_bytes_are_not_tried_without_atheris(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["fuzz_bytes.py"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert fuzz_bytes.main() == 0
    assert "atheris is not installed" in capsys.readouterr().out


@pytest.mark.long
def test_the_script_tries_a_reader_with_atheris(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("atheris")
    assert fuzz_bytes.tried("jsonl", 1)
    said = capsys.readouterr().out
    assert said.startswith("jsonl: ") and said.endswith(" inputs\n") and "jsonl: 0" not in said
