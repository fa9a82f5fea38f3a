"""Data that only an output names are opened by one rule, because a stranger may have made it."""

import os
from pathlib import Path

from lrc_cli.data.kinds import TENSOR_SUFFIXES, TEXT_SUFFIXES
from lrc_cli.errors import InputError
from lrc_cli.reading import file_size

MOST_BYTES, MOST_FILES = 10_000_000_000, 20_000
"""The most bytes and files of data that the output names and the user does not."""


def why_not_opened(path: Path) -> str | None:
    """Returns why data that only an output names are not opened; None: they are.

    The output may be a stranger's, and name any path. Nothing is opened to find out.
    """
    if not os.path.exists(path):
        return "the file is not there"
    if path.suffix in TEXT_SUFFIXES | TENSOR_SUFFIXES:
        try:
            size = file_size(path)
        except InputError as error:
            return error.message
        return None if size <= MOST_BYTES else _too_much(path)
    if not path.is_dir():
        return f"{path} is no kind of data that lrc reads"
    files = total = 0
    for folder, _, names in os.walk(path):
        files += len(names)
        if files <= MOST_FILES:
            total += sum(os.lstat(os.path.join(folder, name)).st_size for name in names)
        if files > MOST_FILES or total > MOST_BYTES:
            return _too_much(path)
    return None


def _too_much(path: Path) -> str:
    return f"{path} has more than {MOST_FILES:,} files or {MOST_BYTES:,} bytes"
