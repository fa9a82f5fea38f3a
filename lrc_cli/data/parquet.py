"""One column of a .parquet file is read as a stream, and no more than the file can honestly hold.

A few bytes of a file can stand for gigabytes: pages are packed, a dictionary's entry is repeated
for nothing, and the footer may claim any number of rows. The footer is compared with the file's
size before anything is read, and what comes out is counted while it is read.
"""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from lrc_cli.data.npz import BOMB_BYTES, BOMB_TIMES
from lrc_cli.errors import InputError
from lrc_cli.reading import check_regular, file_size

BUFFER = 1 << 18
"""Bytes of a file that are read at once."""
ROWS, ROWS_BYTES = 256, 1 << 24
"""The most rows that are unpacked at once, and about the most bytes."""
ODD_TIMES = 50
"""A column is read row by row if it unpacks to so many times its size."""
SPARE_ROWS, ROWS_A_BYTE = 1_000_000, 10
"""More rows than the first number, and than the second number times the file's bytes, are a
claim."""
SPARE_VALUES, VALUES_A_BYTE = 10_000_000, 100
"""The same for the numbers or texts in lists."""
WRITE_AGAIN = "write it again"
READ_FOOTER = """
import sys
from pyarrow import parquet
footer = parquet.read_metadata(sys.argv[1])
for group in map(footer.row_group, range(footer.num_row_groups)):
    for i in range(group.num_columns):
        group.column(i)
"""
"""The program that asks pyarrow for all that is in a footer."""


@contextmanager
def opened(path: Path, **options: Any) -> Iterator[Any]:
    """A pyarrow.parquet.ParquetFile, for reading one column.

    Raises:
        InputError: the file is no regular file or cannot be read, now or while it is read, or
            pyarrow is not installed.
    """
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(
            f"{path}: pyarrow is needed to read .parquet", "pip install 'lrc-cli[parquet]'"
        ) from error
    check_regular(path)
    state = path.stat()
    _check_footer(path, (state.st_size, state.st_mtime_ns, state.st_ino))
    try:
        # Without a buffer of its own size, pyarrow reads a row group of the column at once.
        with parquet.ParquetFile(path, buffer_size=BUFFER, pre_buffer=False, **options) as file:
            yield file
    except InputError:
        raise
    # On a file that pyarrow did not write, it fails in any way: also on bytes that are no text.
    except Exception as error:
        cause = f"{path}: cannot be read as parquet ({' '.join(str(error).split())[:200]})"
        raise InputError(cause, WRITE_AGAIN) from error


@lru_cache
def _check_footer(path: Path, state: tuple[int, ...]) -> None:
    """Raises InputError for a footer on which pyarrow ends the process, which no Python can catch.

    Args:
        state: what tells whether the file is still the same.
    """
    ended = subprocess.run([sys.executable, "-c", READ_FOOTER, path], capture_output=True)
    if ended.returncode < 0:
        cause = f"{path}: cannot be read as parquet (pyarrow ends on its footer)"
        raise InputError(cause, WRITE_AGAIN)


def column_names(path: Path) -> list[str]:
    """The names of the columns. Raises InputError as `opened`."""
    with opened(path) as file:
        return list(file.schema_arrow.names)


def values_of(path: Path, field: str, most: int) -> Iterator[Any]:
    """The values of a column in order, one at a time, as Python has them.

    Args:
        field: the name of a column that is there.
        most: the most characters or numbers of one value.

    Raises:
        InputError: as `opened`, the file claims more than it can hold or unpacks to more than data
            of use does, or a value is too long.
    """
    with opened(path) as file:
        rows, options = _way_to_read(path, file, field)
    packed, unpacked = file_size(path), 0
    with opened(path, **options) as file:
        batches = file.iter_batches(rows, columns=[field], use_threads=False)
        # Each value becomes Python's by itself, because equal texts of a dictionary do not share.
        values = (value.as_py() for batch in batches for value in batch.column(0))
        for number, value in enumerate(values, start=1):
            length = _length(value)
            unpacked += length
            if length > most:
                raise InputError(
                    f"{path}: record {number} has more than {most:,} characters or numbers",
                    "write it as several records, or give the text as a .txt, which has no limit",
                )
            if unpacked > BOMB_BYTES and unpacked > BOMB_TIMES * packed:
                raise _bomb(path, packed, f"more than {BOMB_TIMES} times as much")
            yield value


def _way_to_read(path: Path, file: Any, field: str) -> tuple[int, dict[str, Any]]:
    """Returns how many rows to unpack at once, and the options with which to open the file.

    Raises:
        InputError: the footer claims more than the file can hold.
    """
    packed, metadata = file_size(path), file.metadata
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    num_rows = max(metadata.num_rows, sum(group.num_rows for group in groups))
    if num_rows > SPARE_ROWS and num_rows > ROWS_A_BYTE * packed:
        raise _claims(path, packed, f"{num_rows:,} rows")
    total = num_values = 0
    mean, is_odd, has_dictionary = 1.0, False, False
    for group in groups:
        for column in _columns(group, field):
            total += column.total_uncompressed_size
            num_values += column.num_values
            mean = max(mean, column.total_uncompressed_size / max(1, group.num_rows))
            is_odd |= column.total_uncompressed_size > ODD_TIMES * column.total_compressed_size
            # The texts of this encoding share their beginnings, so pages say nothing of lengths.
            is_odd |= "DELTA_BYTE_ARRAY" in column.encodings
            has_dictionary |= bool(column.has_dictionary_page)
    if num_values > SPARE_VALUES and num_values > VALUES_A_BYTE * packed:
        raise _claims(path, packed, f"{num_values:,} values")
    if total > BOMB_BYTES and total > BOMB_TIMES * packed:
        raise _bomb(path, packed, f"{total:,}")
    is_flat = any(str(file.schema_arrow.field(field).type) == x for x in ("string", "binary"))
    # A dictionary's entry then stands once in memory, however many rows have it.
    options = {"read_dictionary": [field]} if is_flat and has_dictionary else {}
    return 1 if is_odd else int(max(1, min(ROWS, ROWS_BYTES // mean))), options


def _columns(group: Any, field: str) -> Iterator[Any]:
    """Yields what the footer says of the parts of a field in a row group."""
    for i in range(group.num_columns):
        column = group.column(i)
        if column.path_in_schema == field or column.path_in_schema.startswith(f"{field}."):
            yield column


def _length(value: Any) -> int:
    """The characters and numbers in a value."""
    if isinstance(value, dict):
        return sum(map(_length, value.values()))
    if isinstance(value, list):
        is_nested = bool(value) and isinstance(value[0], str | dict | list)
        return sum(map(_length, value)) if is_nested else len(value)
    return len(value) if isinstance(value, str | bytes) else 1


def _claims(path: Path, packed: int, what: str) -> InputError:
    return InputError(f"{path}: claims {what} in {packed:,} bytes", WRITE_AGAIN)


def _bomb(path: Path, packed: int, what: str) -> InputError:
    cause = f"{path}: {packed:,} bytes unpack to {what}, which no data of use does"
    return InputError(cause, "write it again without so many equal rows")
