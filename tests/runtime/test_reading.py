"""What users and strangers wrote is read within bounds, and refused in one sentence else."""

import json
import os
import re
import shutil
from collections import deque
from collections.abc import Callable
from pathlib import Path

import pytest

from lrc_cli.data.folders import visible_files
from lrc_cli.data.named_by_others import why_not_opened
from lrc_cli.errors import InputError
from lrc_cli.reading import (
    JSON_BYTES,
    check_size,
    file_size,
    open_regular,
    read_bytes,
    read_json,
    read_utf8,
    walk,
)
from lrc_cli.runtime.files import hash_path
from lrc_cli.verify.files.manifest import data_sha256

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


# ---------------------------------------------------------------- listings

LISTINGS: dict[str, Callable[[Path], object]] = {
    "walk": lambda path: deque(walk(path), maxlen=0),
    "visible files": lambda path: deque(visible_files(path), maxlen=0),
    "the hash": hash_path,
    "verify's hash": data_sha256,
}
FIRST, LATER = "a.png", "later"


def vanish(monkeypatch: pytest.MonkeyPatch, folder: Path, change: Callable[[], object]) -> None:
    """Lets a change happen as soon as a folder has been listed."""
    plain = os.scandir

    def scandir(path: str | int) -> object:
        found = plain(path)
        if isinstance(path, int) or Path(path) != folder:
            return found
        with found:
            entries = list(found)
        change()
        return _Listed(entries)

    monkeypatch.setattr(os, "scandir", scandir)


class _Listed(list):  # type: ignore[type-arg]
    """What os.scandir returns, listed already."""

    def __init__(self, entries: list[os.DirEntry[str]]) -> None:
        super().__init__(entries)
        self._rest = iter(entries)

    def __enter__(self) -> "_Listed":
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def __next__(self) -> os.DirEntry[str]:
        return next(self._rest)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Returns a folder with a file, a folder with a file, and a hidden folder."""
    for name in (FIRST, f"{LATER}/b.png", ".hidden/c.png"):
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / name).write_bytes(b"x")
    return tmp_path / "d"


@pytest.mark.parametrize("listing", LISTINGS)
def test_a_folder_that_vanishes_while_it_is_listed_is_a_sentence(
    listing: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vanish(monkeypatch, folder, lambda: shutil.rmtree(folder / LATER))
    with pytest.raises(InputError, match=rf"{LATER}: "):
        LISTINGS[listing](folder)


def test_a_file_that_vanishes_from_a_strangers_folder_is_a_reason(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vanish(monkeypatch, folder, (folder / FIRST).unlink)
    assert f"{FIRST}: No such file" in str(why_not_opened(folder))


def test_a_folder_that_vanishes_from_a_strangers_folder_is_a_reason(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vanish(monkeypatch, folder, lambda: shutil.rmtree(folder / LATER))
    assert f"{LATER}: " in str(why_not_opened(folder))


@pytest.mark.parametrize("listing", LISTINGS)
@pytest.mark.parametrize("name", [LATER, ".hidden"])
def test_a_folder_that_may_not_be_listed_is_refused_unless_it_is_hidden(
    listing: str, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = os.scandir

    def scandir(path: str) -> object:
        if Path(path).name == name:
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path)

    monkeypatch.setattr(os, "scandir", scandir)
    if name == LATER:
        with pytest.raises(InputError, match=rf"{LATER}: cannot be read \(Permission denied\)"):
            LISTINGS[listing](folder)
    else:
        LISTINGS[listing](folder)


@pytest.mark.parametrize("listing", LISTINGS)
@pytest.mark.parametrize(
    "place", ["/proc", "/proc/self", "/proc/self/fdinfo", "/sys", "/sys/class", "/dev", "/dev/"]
)
def test_what_the_system_shows_of_itself_is_no_data(listing: str, place: str) -> None:
    with pytest.raises(InputError, match="what the system shows of itself in /"):
        LISTINGS[listing](Path(place))
    assert "what the system shows" in str(why_not_opened(Path(place)))


@pytest.mark.parametrize("file", ["/proc/version", "/proc/kmsg", "/proc/self/maps"])
def test_a_link_into_the_system_is_no_data(file: str, tmp_path: Path) -> None:
    (tmp_path / "t.txt").symlink_to(file)
    for listing in (hash_path, data_sha256):
        with pytest.raises(InputError, match=r"t\.txt: .*what the system shows of itself in /proc"):
            listing(tmp_path / "t.txt")
    assert "what the system shows" in str(why_not_opened(tmp_path / "t.txt"))


def test_the_memory_for_users_is_a_disk() -> None:
    if Path("/dev/shm").is_dir():
        deque(walk(Path("/dev/shm")), maxlen=0)
