"""The states of files tell whether an input still is what it was when the work began.

Size, times and inode of a file are noted before the file is read, and compared later.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from lrc_cli.errors import ChangedInput
from lrc_cli.runtime.files import hash_file


class State(NamedTuple):
    """What tells one version of a file from another without reading the file."""

    size: int
    mtime_ns: int
    inode: int
    inode_ns: int
    """The time of the last change of bytes, mode or names, which no program can set."""


States = Mapping[Path, State | None]
"""The state of each file; None: there is no such file."""


def states_of(files: Iterable[Path]) -> dict[Path, State | None]:
    """Returns the state of every file."""
    return {file: state_of(file) for file in files}


def state_of(file: Path) -> State | None:
    """Returns the state of a file; None: there is no such file."""
    try:
        found = file.stat()
    except OSError:
        return None
    return State(found.st_size, found.st_mtime_ns, found.st_ino, found.st_ctime_ns)


def check_state(
    file: Path, before: State | None, now: State | None, sha256: str | None = None
) -> None:
    """Raises ChangedInput if a file is not what it was.

    Args:
        sha256: the hash that tells where the states leave it open; None: the file passes then.
    """
    if before == now:
        return
    if before is None:
        what = "appeared"
    elif now is None:
        what = "was deleted"
    elif before.inode != now.inode:
        what = "was replaced"
    elif before.size != now.size:
        what = f"was changed from {before.size} to {now.size} bytes"
    elif before.mtime_ns != now.mtime_ns:
        what = "was written to"
    elif sha256 is None or hash_file(file) == sha256:
        return
    else:
        what = "was written to, and its time was set back,"
    raise ChangedInput(f"{file} {what}")
