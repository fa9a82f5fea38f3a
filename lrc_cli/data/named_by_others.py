"""Data that only an output names are opened by one rule, because a stranger may have made it."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from lrc_cli.data.kinds import TENSOR_SUFFIXES, TEXT_SUFFIXES, ending
from lrc_cli.errors import InputError
from lrc_cli.reading import check_on_disk, file_size, walk

MOST_BYTES, MOST_FILES = 10_000_000_000, 20_000
"""The most bytes and files of data that the output names and the user does not."""


def why_not_opened(path: Path) -> str | None:
    """Returns why data that only an output names are not opened; None: they are.

    The output may be a stranger's, and name any path. Nothing is opened to find out.
    """
    if not os.path.exists(path):
        return "the file is not there"
    is_file = ending(path) in TEXT_SUFFIXES | TENSOR_SUFFIXES
    if not is_file and not path.is_dir():
        return f"{path} is no kind of data that lrc reads"
    try:
        sizes = [file_size(path)] if is_file else _sizes(path)
        check_on_disk(path)
        return _why_too_much(sizes, path)
    except InputError as error:
        return error.message
    except OSError as error:  # a file has vanished since its folder was listed
        return f"{error.filename}: {error.strerror}"


def _sizes(path: Path) -> Iterator[int]:
    """Yields the bytes of every file in a folder and below."""
    for folder, _, names in walk(path):
        yield from (os.lstat(os.path.join(folder, name)).st_size for name in names)


def _why_too_much(sizes: Iterable[int], path: Path) -> str | None:
    total = 0
    for files, size in enumerate(sizes, start=1):
        total += size
        if files > MOST_FILES or total > MOST_BYTES:
            return f"{path} has more than {MOST_FILES:,} files or {MOST_BYTES:,} bytes"
    return None
