"""Files that a user or a stranger made are opened and read here, within bounds.

Only regular files are opened, so that no pipe and no device can hold a command. Sizes are looked at
before anything is read. JSON has a bounded depth and bounded numbers, no text that UTF-8 cannot
hold, and no key with two values.
"""

import errno
import json
import os
import re
import stat
from collections.abc import Iterator
from functools import cache
from io import BufferedReader
from pathlib import Path
from typing import Any

from lrc_cli.errors import InputError

KINDS = (
    (stat.S_ISLNK, "a link"),
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
"""What a path may be beside a regular file, in words."""

JSON_BYTES = 64_000_000
"""The most bytes of a JSON file. The index of a checkpoint with 600,000 tensors takes as much."""
JSON_CONTAINERS = 2_000_000
"""The most objects and lists of a JSON file, which take more memory than their text."""
JSON_DEPTH = 100
"""The most lists and objects within one another."""
HOLE_BYTES, HOLE_TIMES = 1_000_000_000, 10
"""A file is refused that has more bytes than the first number and than the second number times what
lies on the disk: the rest are holes, which would be read for hours as zeros."""
DIGITS = 100
"""The most digits of a whole number. Python's float holds any number of so many digits."""
RESTORE = "restore the file"
SYSTEM = ("/proc", "/sys", "/dev")
"""The folders in which the system shows itself: what they hold comes, goes and blocks."""

_HALF = re.compile(r"\\u[dD][89a-fA-F]")


class _RefusedError(ValueError):
    """The JSON is well formed, and something in it is refused."""


def file_size(path: Path) -> int:
    """The size of a regular file in bytes; links are followed, and nothing is opened.

    Raises:
        InputError: there is no such file, or it is a directory, a pipe, a socket or a device.
    """
    try:
        return _checked(path, os.stat(path))
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def check_file_name(path: Path) -> None:
    """Raises InputError for a path that is not UTF-8, which no report and no hash can hold."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        shown = os.fsencode(path).decode(errors="backslashreplace")
        cause = f"{shown}: the name is not UTF-8"
        raise InputError(cause, "rename the file, or move it elsewhere") from error


def open_regular(path: Path) -> BufferedReader:
    """A regular file, opened for reading. Opening never waits, whatever takes the file's place.

    Raises:
        InputError: as `file_size`, the file cannot be opened, or nearly all of it are holes.
    """
    file_size(path)  # opening some devices has an effect by itself
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        handle = os.fdopen(descriptor, "rb")
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    size = _checked(path, os.fstat(handle.fileno()))
    if size > HOLE_BYTES and HOLE_TIMES * _held(handle.fileno(), size) < size:
        handle.close()
        raise InputError(
            f"{path}: nearly all of its {size:,} bytes are holes, which hold nothing",
            "copy it again, its transfer was not finished",
        )
    return handle


def check_regular(path: Path) -> None:
    """Raises InputError as `open_regular`; for files that a library opens by their names."""
    open_regular(path).close()


def walk(path: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """As os.walk, which passes over a folder that it cannot list. Hidden folders may be such.

    Raises:
        InputError: a folder cannot be listed, has vanished, or is the system's own.
    """
    hidden = f"{os.sep}."

    def refuse(error: OSError) -> None:
        if hidden not in str(error.filename).removeprefix(str(path)):
            raise _unreadable(Path(error.filename), error) from error

    for folder, folders, names in os.walk(path, onerror=refuse):
        check_on_disk(Path(folder))
        yield folder, folders, names


def check_on_disk(path: Path) -> None:
    """Raises InputError for data that the system shows of itself, or that are not there.

    The system's file systems are known by their devices, also where they are mounted elsewhere.
    """
    try:
        root = _system_devices().get(os.stat(path).st_dev)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    if root is not None:
        cause = f"{path}: is no data on a disk, but what the system shows of itself in {root}"
        raise InputError(cause, "give a file or a folder on a disk")


def files_below(path: Path, most: int) -> Iterator[Path]:
    """Yields all but the directories in a directory and below; links to directories do not count.

    Args:
        most: the most files that there may be.

    Raises:
        InputError: there are more, or as `walk`.
    """
    seen = 0
    for folder, _, names in walk(path):
        seen += len(names)
        if seen > most:
            cause = f"{path}: more than {most:,} files lie in it and in its folders"
            raise InputError(cause, "give the folder that holds nothing else")
        yield from (Path(folder, name) for name in names)


def read_bytes(path: Path, most: int) -> bytes:
    """The bytes of a regular file.

    Args:
        most: the most bytes that the file may have.

    Raises:
        InputError: as `open_regular`, the file is larger, or reading fails.
    """
    check_size(path, most)
    with open_regular(path) as handle:
        try:
            data = handle.read(most + 1)
        except OSError as error:
            raise _unreadable(path, error) from error
    if len(data) > most:  # files of /proc have a size of 0
        raise _too_large(path, len(data), most)
    return data


def check_size(path: Path, most: int) -> None:
    """Raises InputError for a file that is no regular file or has more than `most` bytes."""
    size = file_size(path)
    if size > most:
        raise _too_large(path, size, most)


def read_utf8(path: Path, most: int, encoding: str = "utf-8") -> str:
    """The text of a UTF-8 file.

    Args:
        most: the most bytes that the file may have.
        encoding: "utf-8", or "utf-8-sig" to pass over a byte order mark.

    Raises:
        InputError: as `read_bytes`, or the file is not UTF-8; the line is named.
    """
    data = read_bytes(path, most)
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: not UTF-8 text", "save the file as UTF-8") from error


def read_json(path: Path, most: int = JSON_BYTES) -> dict[str, Any]:
    """The JSON object that a file holds.

    Args:
        most: the most bytes that the file may have.

    Raises:
        InputError: as `read_utf8` and `parse_json`, or the file does not hold an object.
    """
    value = parse_json(read_utf8(path, most), str(path))
    if not isinstance(value, dict):
        raise InputError(f"{path} is not a JSON object", RESTORE)
    return value


def parse_json(text: str, name: str) -> Any:
    """The value of a JSON text. NaN and Infinity are read as Python writes them.

    Args:
        name: the file that messages name.

    Raises:
        InputError: the text is not JSON, holds a key twice with two values, a number of more than
            DIGITS digits, half of a character (a lone surrogate), or too much at too great a depth.
    """
    try:
        if text.count("{") + text.count("[") > JSON_CONTAINERS:
            raise _RefusedError(f"has more than {JSON_CONTAINERS:,} objects and lists")
        value = json.loads(text, object_pairs_hook=_object, parse_int=whole_number)
        if _is_deep(value):
            raise RecursionError
        if _HALF.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except _RefusedError as error:
        raise InputError(f"{name} {error}", RESTORE) from error
    except json.JSONDecodeError as error:
        raise InputError(f"{name} is not JSON: {error}", RESTORE) from error
    except UnicodeEncodeError as error:
        half = error.object[error.start].encode("unicode_escape").decode()
        cause = f"{name}: holds {half}, half of a character, which no UTF-8 file can hold"
        raise InputError(cause, RESTORE) from error
    except RecursionError as error:
        cause = f"{name} is not JSON that is read: nested deeper than {JSON_DEPTH} levels"
        raise InputError(cause, RESTORE) from error
    return value


def whole_number(digits: str) -> int:
    """The whole number of a text such as "-12".

    Raises:
        ValueError: the text is no whole number, or has too many digits.
    """
    if len(digits) > DIGITS:
        raise _RefusedError(f"holds a number of {len(digits):,} digits")
    return int(digits)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        first: dict[str, Any] = {}
        for key, value in pairs:
            if first.setdefault(key, value) != value:
                one, other = (str(x)[:80] for x in (first[key], value))
                raise _RefusedError(f"has {key} twice, in {one} and in {other}")
    return found


def _is_deep(value: Any) -> bool:
    """Whether lists and objects lie within one another more than JSON_DEPTH times."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(JSON_DEPTH):
        level = [child for container in level for child in _containers(container)]
    return bool(level)


def _containers(value: dict[str, Any] | list[Any]) -> list[Any]:
    children = value.values() if isinstance(value, dict) else value
    return [child for child in children if isinstance(child, dict | list)]


def _checked(path: Path, found: os.stat_result) -> int:
    """The size of what lies at a path; raises InputError where it is no regular file."""
    kind = next((words for is_kind, words in KINDS if is_kind(found.st_mode)), None)
    if kind is not None:
        raise InputError(f"{path}: is {kind}", "give the file itself, a regular file")
    return found.st_size


@cache
def _system_devices() -> dict[int, str]:
    """Returns the roots of the file systems that hold no user's files, by their device numbers.

    A root that is no file system of its own has its parent's number, and counts as a disk. So does
    /dev/shm, which is memory for users.
    """

    def numbers(roots: tuple[str, ...]) -> dict[int, str]:
        return {os.stat(root).st_dev: root for root in roots if os.path.isdir(root)}

    disks = numbers(("/", "/dev/shm"))
    return {number: root for number, root in numbers(SYSTEM).items() if number not in disks}


def _held(descriptor: int, size: int) -> int:
    """The bytes of an open file that are no holes; no more are counted than make a file whole."""
    held = place = 0
    try:
        while place < size and HOLE_TIMES * held < size:
            start = os.lseek(descriptor, place, os.SEEK_DATA)
            place = os.lseek(descriptor, start, os.SEEK_HOLE)
            held += place - start
    except OSError as error:
        if error.errno != errno.ENXIO:  # ENXIO: nothing but a hole is left
            held = size  # the file system knows of no holes
    os.lseek(descriptor, 0, os.SEEK_SET)
    return held


def _too_large(path: Path, size: int, most: int) -> InputError:
    return InputError(
        f"{path}: has {size:,} bytes, and at most {most:,} are read", "check that it is the file"
    )


def _unreadable(path: Path, error: OSError | ValueError) -> InputError:
    if isinstance(error, FileNotFoundError):
        return InputError(f"{path}: there is no such file", "check the path")
    why = error.strerror if isinstance(error, OSError) else str(error)
    return InputError(f"{path}: cannot be read ({why})", "check the file")
