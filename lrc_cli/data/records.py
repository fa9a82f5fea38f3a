"""Records of .jsonl, .csv and .parquet files are read here: one field, with its place."""

import csv
import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lrc_cli.errors import InputError

Record = tuple[str, Any]
"""The place of a record, as "FILE:LINE", and the value of the field."""


def read_text(path: Path) -> str:
    """The text of a UTF-8 file.

    Raises:
        InputError: the file cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error})", "convert it to UTF-8") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})", "check the file") from error


def read_records(path: Path, field: str) -> list[Record]:
    """The field's value of every record, in order.

    Raises:
        InputError: the file cannot be read, or a record has no such field.
    """
    return list(_READERS[path.suffix](path, field))


def _read_jsonl(path: Path, field: str) -> Iterator[Record]:
    # Only "\n" ends a record: `splitlines` would also cut at U+2028, which JSON may contain.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            cause = f"{place}: not valid JSON ({error.args[0]})"
            raise InputError(cause, "mend the line") from error
        if not isinstance(row, dict) or row.get(field) is None:
            raise _lacks(place, field, row if isinstance(row, dict) else {})
        yield place, row[field]


def _read_csv(path: Path, field: str) -> Iterator[Record]:
    csv.field_size_limit(sys.maxsize)  # the default cuts off at 128 KiB
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        for row in reader:
            place = f"{path}:{reader.line_num}"
            if row.get(field) is None:
                raise _lacks(place, field, row)
            yield place, row[field]
    except csv.Error as error:
        cause = f"{path}:{reader.line_num}: not valid CSV ({error})"
        raise InputError(cause, "mend the line") from error


def _read_parquet(path: Path, field: str) -> Iterator[Record]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise InputError(
            f"{path}: pyarrow is needed to read .parquet", "pip install 'lrc-cli[parquet]'"
        ) from error
    try:
        with parquet.ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                raise _lacks(str(path), field, file.schema_arrow.names)
            number = 0
            for batch in file.iter_batches(columns=[field]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    if value is None:
                        raise _lacks(f"{path}: record {number}", field, [field])
                    yield f"{path}: record {number}", value
    except (ArrowException, OSError) as error:
        cause = f"{path}: cannot be read as parquet ({' '.join(str(error).split())[:200]})"
        raise InputError(cause, "write it again") from error


def _lacks(place: str, field: str, fields: Any) -> InputError:
    others = ", ".join(repr(name) for name in fields if name != field)
    return InputError(
        f"{place}: no text under the key {field!r}",
        f"set text_field to the right key{f' (there are {others})' if others else ''}",
    )


_READERS: dict[str, Callable[[Path, str], Iterator[Record]]] = {
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
