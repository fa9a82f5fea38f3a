"""What users and strangers wrote is read within bounds, and refused in one sentence else."""

import json
import os
import re
from pathlib import Path

import pytest

from lrc_cli.errors import InputError
from lrc_cli.reading import (
    JSON_BYTES,
    check_size,
    file_size,
    open_regular,
    read_bytes,
    read_json,
    read_utf8,
)

PACKAGE = Path(__file__).resolve().parents[2] / "lrc_cli"

READ = {
    "an object": ('{"a": 1, "b": [1.5, null, "é"]}', {"a": 1, "b": [1.5, None, "é"]}),
    "an escaped pair": ('{"a": "\\ud83d\\ude00"}', {"a": "\U0001f600"}),
    "the same twice": ('{"a": 1, "a": 1}', {"a": 1}),
    "100 digits": (f'{{"a": {"9" * 100}}}', {"a": 10**100 - 1}),
    "infinity": ('{"a": [0.0, Infinity]}', {"a": [0.0, float("inf")]}),
    "deep enough": ('{"a": ' * 99 + "1" + "}" * 99, None),
    "the word of an escape": ('{"a": "\\\\ud800"}', {"a": "\\ud800"}),
}


@pytest.mark.parametrize("kind", READ)
def test_json_that_is_read(kind: str, tmp_path: Path) -> None:
    text, wanted = READ[kind]
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    found = read_json(tmp_path / "a.json")
    assert wanted is None or found == wanted


REFUSED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is not JSON"),
    "no object": (b"[1]", "is not a JSON object"),
    "a number": (b"3", "is not a JSON object"),
    "cut": (b'{"a": [1, 2', "is not JSON"),
    "a comma too many": (b'{"a": 1,}', "is not JSON"),
    "5000 digits": (b'{"a": ' + b"9" * 5000 + b"}", "a number of 5,000 digits"),
    "101 digits": (b'{"a": -' + b"9" * 101 + b"}", "digits"),
    "a million digits in a key's list": (b'{"a": [[' + b"1" * 10**6 + b"]]}", "digits"),
    "half of a character": (b'{"a": "x\\ud800y"}', "holds \\ud800, half of a character"),
    "half in a key": (b'{"\\udFFF": 1}', "holds \\udfff, half"),
    "half in a list": (b'{"a": [{"b": "\\uDC00\\uD800"}]}', "half of a character"),
    "twice": (b'{"a": 1, "a": 2}', "has a twice, in 1 and in 2"),
    "twice below": (b'{"w": {"k": "x", "k": "y"}}', "has k twice, in x and in y"),
    "101 levels": (b'{"a": ' * 101 + b"1" + b"}" * 101, "nested deeper than 100"),
    "a million levels": (b"[" * 10**6, "nested deeper than 100"),
    "a mark of byte order": (b'\xef\xbb\xbf{"a": 1}', "is not JSON"),
    "utf-16": ('{"a": 1}'.encode("utf-16"), "1: not UTF-8"),
    "latin": (b'{"a":\n "caf\xe9"}', "2: not UTF-8"),
    "null bytes": (b'{"a": "\0"}', "is not JSON"),
    "three million lists": (b'{"a": [' + b"[]," * 3_000_000 + b"[]]}", "objects and lists"),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", REFUSED)
def test_json_that_is_refused(kind: str, tmp_path: Path) -> None:
    data, piece = REFUSED[kind]
    file = tmp_path / "a.json"
    file.write_bytes(data)
    with pytest.raises(InputError) as caught:
        read_json(file)
    assert str(file) in str(caught.value) and piece in str(caught.value)
    assert "\n" not in str(caught.value) and caught.value.remedy
    assert len(str(caught.value)) < 400
    str(caught.value).encode()


def make_pipe(file: Path) -> None:
    os.mkfifo(file)


def link_to_a_pipe(file: Path) -> None:
    os.mkfifo(file.with_name("pipe"))
    file.symlink_to("pipe")


def make_large(file: Path) -> None:
    with file.open("wb") as handle:
        handle.truncate(JSON_BYTES + 1)  # takes no room on the disk


PLACES = {
    "a pipe": (make_pipe, "is a pipe"),
    "a link to a pipe": (link_to_a_pipe, "is a pipe"),
    "a directory": (lambda file: file.mkdir(), "is a directory"),
    "a link to a device": (lambda file: file.symlink_to("/dev/zero"), "is a device"),
    "a link to nothing": (lambda file: file.symlink_to("nothing"), "there is no such file"),
    "a link to itself": (lambda file: file.symlink_to(file.name), "cannot be read"),
    "nothing": (lambda file: None, "there is no such file"),
    "a large file": (make_large, "and at most 64,000,000 are read"),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", PLACES)
def test_only_regular_files_of_a_bounded_size_are_read(kind: str, tmp_path: Path) -> None:
    make, piece = PLACES[kind]
    file = tmp_path / "a.json"
    make(file)
    with pytest.raises(InputError, match=re.escape(piece)) as caught:
        read_json(file)
    assert str(file) in str(caught.value) and caught.value.remedy


def test_names_that_no_file_can_have(tmp_path: Path) -> None:
    for name in ("x" * 300, "a\0b"):
        with pytest.raises(InputError, match="cannot be read"):
            file_size(tmp_path / name)


def test_a_file_whose_size_the_system_does_not_tell_is_bounded_too() -> None:
    with pytest.raises(InputError, match="at most 10 are read"):
        read_bytes(Path("/proc/self/status"), 10)
    assert b"VmRSS" in read_bytes(Path("/proc/self/status"), 100_000)


def test_what_is_read_is_what_is_there(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbfa\r\n")
    assert file_size(file) == 6 and read_bytes(file, 6) == file.read_bytes()
    assert read_utf8(file, 6, "utf-8-sig") == "a\r\n"
    check_size(file, 6)
    with open_regular(file) as handle:
        assert handle.read() == file.read_bytes()


def test_nothing_else_in_the_package_parses_json_or_yaml_files() -> None:
    """One place reads JSON and one reads YAML, so that no bound is forgotten."""
    allowed = {
        "reading.py": {"json.loads("},
        "config/tree.py": {"yaml.compose("},
        "job/work.py": {"json.loads("},  # texts with checksums of lrc's own
    }
    pattern = re.compile(r"json\.loads?\(|yaml\.(?:safe_|full_)?load\w*\(|yaml\.compose\w*\(")
    for file in PACKAGE.rglob("*.py"):
        found = set(pattern.findall(file.read_text(encoding="utf-8")))
        assert found <= allowed.get(file.relative_to(PACKAGE).as_posix(), set()), file


def test_a_bounded_report_is_read_whole(tmp_path: Path) -> None:
    value = {str(i): [i, {"a": "b"}] for i in range(5_000)}
    (tmp_path / "a.json").write_text(json.dumps(value))
    assert read_json(tmp_path / "a.json") == value
