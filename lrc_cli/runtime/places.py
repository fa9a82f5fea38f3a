"""Places decide what may be written where. Every decision is made on paths, before any work.

Two rules hold for every path that lrc writes, replaces or deletes. Nothing is written into what a
job reads. Nothing is replaced or deleted that lrc did not make, and a name alone proves nothing.
"""

import errno
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lrc_cli.errors import InputError
from lrc_cli.reading import KINDS

Identity = tuple[int, int]
"""The device and the inode of a file: equal for all names of one file."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """A path and the words that name the path in messages."""

    name: str
    """A key of the config, an option, or words such as "the checkpoint"."""
    path: Path
    """The absolute path without links."""


def place_to_read(name: str, path: str | Path) -> Place | None:
    """The place of something that a job reads; None for a path that no system call takes."""
    try:
        return Place(name=name, path=Path(os.path.realpath(path)))
    except (OSError, ValueError):  # whoever reads the path says what is wrong with it
        return None


def check_name(name: str, path: str | Path) -> None:
    """Checks that a path can be asked for, whatever lies there.

    Args:
        name: the words for the path in messages, such as a key of the config.
        path: any path.

    Raises:
        InputError: a name in the path is too long, or holds a null character.
    """
    try:
        os.lstat(path)
    except ValueError as error:
        raise _unusable(name, Path(path), "a name holds no null character") from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise _unusable(name, Path(path), "File name too long") from error


def place_to_write(name: str, path: str | Path) -> Place:
    """The place of something that a job writes.

    Raises:
        InputError: the path is no UTF-8, holds a null character, is too long, or cannot be asked
            for.
    """
    kind_of(name, Path(path))
    return Place(name=name, path=Path(os.path.realpath(path)))


def kind_of(name: str, path: Path) -> str | None:
    """What lies at a path, in words, without following a link; None where nothing lies there.

    Args:
        name: the words for the path in messages, such as a key of the config.

    Returns:
        "a file", or the words of KINDS.

    Raises:
        InputError: no file can have this path.
    """
    try:
        str(path).encode()
        mode = os.lstat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except UnicodeEncodeError as error:
        raise _unusable(name, path, "the name is not UTF-8") from error
    except ValueError as error:
        raise _unusable(name, path, "a name holds no null character") from error
    except OSError as error:
        raise _unusable(name, path, error.strerror or str(error)) from error
    return next((words for is_kind, words in KINDS if is_kind(mode)), "a file")


def _unusable(name: str, path: Path, why: str) -> InputError:
    shown = os.fsencode(path).decode(errors="backslashreplace").replace("\0", "\\0")
    if len(shown) > 200:
        shown = f"{shown[:150]}...{shown[-40:]}"
    return InputError(f"{name}: {shown} cannot be used ({why})", f"choose another {name}")


def check_apart(written: Place, others: Iterable[Place]) -> None:
    """Checks that a place to write neither is, nor lies in, nor holds one of other places.

    Paths count, and so does the identity of files: a hard link or a second mount is no way around.

    Args:
        written: the place to write.
        others: the places that must stay as they are.

    Raises:
        InputError: both places are named.
    """
    check_outside(written, others)
    for other in others:
        if _lies_in(other.path, written.path):
            raise _together(written, other)


def check_outside(written: Place, others: Iterable[Place]) -> None:
    """Checks that a place to write neither is nor lies in one of other places; see `check_apart`.

    Raises:
        InputError: both places are named.
    """
    for other in others:
        if _is_same(written.path, other.path):
            raise InputError(
                f"{written.name}: {written.path} is {other.name} itself",
                f"choose another {written.name}",
            )
        if _lies_in(written.path, other.path):
            raise _together(written, other)


def _together(written: Place, other: Place) -> InputError:
    return InputError(
        f"{written.name}: {written.path} and {other.name} {other.path} lie in one another",
        f"choose another {written.name}",
    )


def _lies_in(inner: Path, outer: Path) -> bool:
    """Whether `outer` is above `inner`, by its path or as the same directory."""
    return any(_is_same(parent, outer) for parent in inner.parents)


def _is_same(one: Path, other: Path) -> bool:
    if one == other:
        return True
    identity = _identity(one)
    return identity is not None and identity == _identity(other)


def _identity(path: Path) -> Identity | None:
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino


def check_plain(name: str, file: Path, *, shared: bool = True) -> None:
    """Checks that a file that lrc will write is absent, or is a regular file.

    Args:
        name: the words for the file in messages.
        file: the path, of which no link is followed.
        shared: whether the file may have several names, which is harmless unless it is written to.

    Raises:
        InputError: a link, a pipe, a device, a socket or a directory lies there.
    """
    kind = kind_of(name, file)
    if kind not in (None, "a file"):
        raise InputError(f"{name}: {file} is {kind}", f"remove it, or choose another {name}")
    if kind is not None and not shared and os.lstat(file).st_nlink > 1:
        raise InputError(
            f"{name}: {file} is a hard link: the file has another name too",
            f"remove it, or choose another {name}",
        )


def open_to_append(name: str, file: Path) -> int:
    """A descriptor that appends to a regular file; opening never waits and follows no link.

    Args:
        name: the words for the file in messages.
        file: made when absent.

    Raises:
        InputError: as `check_plain`.
        OSError: the file cannot be opened.
    """
    check_plain(name, file)
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    return os.open(file, flags, 0o666)


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A new file beside `file`, under a name that nobody has, renamed to `file` at the end.

    Yields:
        The path of the new file, which is empty; it is deleted when the context fails.
    """
    aside = file.with_name(f".lrc-{secrets.token_hex(8)}.partial")
    os.close(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
    try:
        yield aside
        aside.rename(file)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
