"""A lock between processes is a file that is held as long as it is open: no crash leaves a lock.

The lock is flock on a file, not on a directory, because network file systems lend exclusive locks
on writable handles only.
"""

import fcntl
import os
from pathlib import Path
from typing import BinaryIO

from lrc_cli.runtime.places import open_to_append


def lock_file(file: Path) -> BinaryIO | None:
    """Take the lock `file`; None where another process (or handle) holds the lock.

    Closing the handle gives the lock back. The holder may delete the file before closing.

    Raises:
        InputError: a link, a pipe, a device or a directory has the name of the lock.
    """
    while True:
        handle = os.fdopen(open_to_append("lock", file), "ab")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.close()
            return None
        # The file may have been deleted before we locked it: others would find another file then.
        if _is_at(file, handle):
            return handle
        handle.close()


def _is_at(file: Path, handle: BinaryIO) -> bool:
    try:
        return os.path.samestat(file.stat(), os.fstat(handle.fileno()))
    except FileNotFoundError:
        return False
