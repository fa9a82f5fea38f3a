"""Locks between processes: a file that is held as long as it is open, so that no crash leaves one.

flock on a file, not on a directory: network file systems lend exclusive locks on writable handles
only.
"""

import fcntl
import os
from pathlib import Path
from typing import BinaryIO


def lock_file(file: Path) -> BinaryIO | None:
    """Take the lock `file`; None where another process (or handle) holds it.

    Closing the handle gives the lock back. The holder may delete the file before it does.
    """
    while True:
        handle = file.open("ab")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.close()
            return None
        # Deleted between our opening and locking it, it is not the file that others will find.
        if _is_at(file, handle):
            return handle
        handle.close()


def _is_at(file: Path, handle: BinaryIO) -> bool:
    try:
        return os.path.samestat(file.stat(), os.fstat(handle.fileno()))
    except FileNotFoundError:
        return False
