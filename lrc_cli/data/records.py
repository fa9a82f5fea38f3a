"""Texts, and records of .jsonl, .csv and .parquet files, are read here as streams.

A record is one field, with its place. No more than one record, or a chunk of a text, is held.
"""

import csv
import json
import sys
from codecs import getincrementaldecoder
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Any, TextIO

from lrc_cli.data.parquet import column_names, values_of
from lrc_cli.errors import InputError
from lrc_cli.reading import check_size, open_regular, parse_json

Record = tuple[str, Any]
"""The place of a record, as "FILE:LINE", and the value of the field."""
TOOLS = "tools"
"""The field beside a conversation that describes the tools which its turns may call."""


@dataclass(frozen=True, kw_only=True)
class WithTools:
    """A conversation, and the tools that stand beside it in the record."""

    messages: Any
    tools: Any


CHUNK = 1 << 16
"""Characters of a text, or bytes of a file, that are read at once."""
MOST_IN_RECORD = 64_000_000
"""The most characters of a record, which is held in memory whole."""
SPLIT = "write it as several records"

ONE_A_LINE = "jq -c '.[]' OLD.json > NEW.jsonl"
"""The command that writes the records of a JSON array one a line."""


def stream_text(path: Path) -> Iterator[str]:
    """The text of a UTF-8 file, a chunk at a time; every end of a line is "\\n".

    Raises:
        InputError: the file cannot be read, or is not UTF-8.
    """
    with _opened(path) as file:
        while text := file.read(CHUNK):
            yield text


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, whole. Raises InputError as `stream_text` does, or for its size."""
    check_size(path, MOST_IN_RECORD)
    return "".join(stream_text(path))


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    try:
        with open_regular(path) as raw, TextIOWrapper(raw, encoding="utf-8-sig") as file:
            yield file
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise InputError(
            f"{path}:{_first_invalid_line(path)}: not UTF-8 text (byte 0x{byte:02x}:"
            f" {error.reason})",
            "convert it to UTF-8",
        ) from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})", "check the file") from error


def _first_invalid_line(path: Path) -> int:
    """The number of the first line that is not UTF-8; a decoder knows only the place in a chunk."""
    decoder, line = getincrementaldecoder("utf-8")(), 1
    with open_regular(path) as file:
        while chunk := file.read(CHUNK):
            try:
                decoder.decode(chunk)
            except UnicodeDecodeError as error:
                # What was left of the chunk before has no end of a line in it.
                return line + error.object.count(b"\n", 0, error.start)
            line += chunk.count(b"\n")
    return line


def read_records(path: Path, field: str, *, with_tools: bool = False) -> Iterator[Record]:
    """The field's value of every record, in order, one at a time.

    Args:
        with_tools: whether the value becomes `WithTools` where a record has tools, too.

    Raises:
        InputError: the file cannot be read, or a record has no such field.
    """
    return _READERS[path.suffix.lower()](path, field, with_tools)


class _Lines:
    """The lines of a file, which counts the characters of the record that is being read.

    Only "\\n" ends a line: `splitlines` would also cut at U+2028, which JSON may contain.
    """

    def __init__(self, path: Path, file: TextIO) -> None:
        self._path, self._file = path, file
        self._number = self._length = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._file.readline(MOST_IN_RECORD + 1)
        if not line:
            raise StopIteration
        self._number += 1
        self._length += len(line)
        if self._length > MOST_IN_RECORD:
            raise _too_long(self.place)
        return line

    @property
    def place(self) -> str:
        """The file with the number of the last line."""
        return f"{self._path}:{self._number}"

    def begin_record(self) -> None:
        """The next line begins another record."""
        self._length = 0


def _too_long(place: str) -> InputError:
    cause = f"{place}: a record of more than {MOST_IN_RECORD:,} characters"
    return InputError(cause, f"{SPLIT}, or give the text as a .txt, which has no limit")


def _read_jsonl(path: Path, field: str, with_tools: bool) -> Iterator[Record]:
    with _opened(path) as file:
        lines = _Lines(path, file)
        for line in lines:
            lines.begin_record()
            if not line.strip():
                continue
            place = lines.place
            try:
                row = parse_json(line, place)
            except InputError as error:
                why = error.message.removeprefix(place).removeprefix(" is not JSON").lstrip(" :")
                is_opened = line.strip() in ("[", "{", "[{")
                remedy = f"write one record a line: {ONE_A_LINE}" if is_opened else "mend the line"
                raise InputError(f"{place}: not valid JSON ({why})", remedy) from error
            yield place, _value(place, row, field, with_tools)


def _read_csv(path: Path, field: str, with_tools: bool) -> Iterator[Record]:
    csv.field_size_limit(sys.maxsize)  # the default cuts off at 128 KiB
    with _opened(path) as file:
        lines = _Lines(path, file)
        reader = csv.DictReader(lines, strict=True)
        try:
            if (reader.fieldnames or []).count(field) > 1:
                cause = f"{path}:1: two columns are called {field!r}"
                raise InputError(cause, "rename one of them, or leave one out")
            for row in reader:
                lines.begin_record()
                place = lines.place
                yield place, _value(place, row, field, with_tools)
        except csv.Error as error:
            # A DictReader counts the lines of whole records only.
            cause = f"{path}:{reader.reader.line_num}: not valid CSV ({error})"
            raise InputError(cause, "mend the line") from error


def _read_parquet(path: Path, field: str, with_tools: bool) -> Iterator[Record]:
    names = column_names(path)
    if field not in names:
        raise _lacks(str(path), field, dict.fromkeys(names))
    fields = [field, TOOLS] if with_tools and TOOLS in names else [field]
    columns = (values_of(path, name, MOST_IN_RECORD) for name in fields)
    for number, values in enumerate(zip(*columns, strict=True), start=1):
        place = f"{path}: record {number}"
        row = dict(zip(fields, values, strict=True))
        yield place, _value(place, row, field, with_tools)


def _value(place: str, row: Any, field: str, with_tools: bool) -> Any:
    """Returns the field's value of a record; raises InputError where there is none."""
    if isinstance(row, list):
        raise InputError(
            f"{place}: holds an array of {len(row)}, not a record",
            f"write one record a line: {ONE_A_LINE}",
        )
    if not isinstance(row, dict):
        raise InputError(
            f"{place}: holds {json.dumps(row)[:40]}, not a record",
            f'write one record a line, such as {{"{field}": "..."}}',
        )
    if field not in row:
        raise _lacks(place, field, row)
    if row[field] is None:
        raise InputError(
            f"{place}: no text under the key {field!r}, which is null or has no value",
            "leave the record out, or give it a text (an empty one is taken)",
        )
    if with_tools and row.get(TOOLS):
        return WithTools(messages=row[field], tools=row[TOOLS])
    return row[field]


def _lacks(place: str, field: str, row: Mapping[str, Any]) -> InputError:
    others = [repr(name) for name in row if name and name != field]
    inner = next((key for key, x in row.items() if isinstance(x, dict) and field in x), None)
    if inner is not None:
        return InputError(
            f"{place}: no text under the key {field!r}, which is inside {inner!r}",
            f"write it at the top of the record: {{{field!r}: ...}}",
        )
    more = [f"{len(others) - 5} more"] if len(others) > 5 else []
    there = f" (there are {', '.join([*others[:5], *more])})" if others else ""
    return InputError(
        f"{place}: no text under the key {field!r}", f"set text_field to the right key{there}"
    )


_READERS: dict[str, Callable[[Path, str, bool], Iterator[Record]]] = {
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
