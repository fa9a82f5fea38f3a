"""Frozen dataclasses are written as JSON and read back here.

The order of the fields is the order of the keys. The reader checks every value against the field's
type, and names the place of a value that does not fit.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import cache
from types import NoneType, UnionType
from typing import Any, Self, get_args, get_origin, get_type_hints

from lrc_cli.errors import InputError

NEEDED = {
    bool: "true or false is needed",
    int: "a whole number is needed",
    float: "a number is needed",
    str: "a string is needed",
}
FOUND = {
    NoneType: "null",
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
}


ABSENT = {"absent": True}
"""Metadata of a field whose key is left out of the JSON where its value is None."""
INLINE = {"inline": True}
"""Metadata of a field that is a record, whose keys stand among the keys of its owner."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class JsonRecord:
    """The base of every record, which is a frozen dataclass with keyword-only fields.

    Types of fields: bool, int, float, str, Any, records, `tuple[T, ...]` (a list), `Mapping[str,
    T]` (an object), and `T | None`. A field of another type has a function `read` of the value, the
    file and the path in its metadata.
    """

    def to_json(self) -> dict[str, Any]:
        """The record as plain values, which `json.dumps` takes."""
        found: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if "inline" in field.metadata:
                found |= value.to_json()
            elif value is not None or "absent" not in field.metadata:
                found[field.name] = _plain(value)
        return found

    @classmethod
    def from_json(cls, value: Any, file: str, path: str = "") -> Self:
        """The record of a parsed JSON object. Keys that are no fields are passed over.

        Args:
            value: as `json.loads` returns it.
            file: the file that was read, for the error.
            path: the place of the value in the file, for the error.

        Raises:
            InputError: a key is missing, or a value is of another type. The error names the place.
        """
        if not isinstance(value, dict):
            raise _unfit(file, path, "an object is needed", value)
        record: Any = cls
        found = {}
        for field, hint in _fields(record):
            if "inline" in field.metadata:
                found[field.name] = hint.from_json(value, file, path)
            elif field.name in value:
                read = field.metadata.get("read") or _reader(hint)
                found[field.name] = read(value[field.name], file, _below(path, field.name))
            elif _is_required(field):
                raise InputError(f"{file}: {_below(path, field.name)}: this key is missing")
        return cls(**found)


@cache
def _fields(record: type) -> list[tuple[dataclasses.Field[Any], Any]]:
    hints = get_type_hints(record)
    return [(field, hints[field.name]) for field in dataclasses.fields(record)]


def _is_required(field: dataclasses.Field[Any]) -> bool:
    missing = dataclasses.MISSING
    return field.default is missing and field.default_factory is missing


def _plain(value: Any) -> Any:
    if isinstance(value, JsonRecord):
        return value.to_json()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _reader(hint: Any) -> Callable[[Any, str, str], Any]:
    return lambda value, file, path: read_value(hint, value, file, path)


def read_value(hint: Any, value: Any, file: str, path: str) -> Any:
    """A value of any type that a field may have. Arguments and errors are as in `from_json`."""
    if hint is Any:
        return value
    if isinstance(hint, UnionType):
        (wanted,) = (option for option in get_args(hint) if option is not NoneType)
        return None if value is None else read_value(wanted, value, file, path)
    origin = get_origin(hint)
    if origin is tuple:
        if not isinstance(value, list):
            raise _unfit(file, path, "a list is needed", value)
        item = get_args(hint)[0]
        return tuple(read_value(item, x, file, f"{path}[{i}]") for i, x in enumerate(value))
    if origin is Mapping:
        if not isinstance(value, dict):
            raise _unfit(file, path, "an object is needed", value)
        item = get_args(hint)[1]
        return {key: read_value(item, x, file, _below(path, key)) for key, x in value.items()}
    if issubclass(hint, JsonRecord):
        return hint.from_json(value, file, path)
    if not _fits(hint, value):
        raise _unfit(file, path, NEEDED[hint], value)
    return value


def _fits(hint: type, value: Any) -> bool:
    # A whole number is a number too; true is 1 for Python, and for nobody else.
    kinds = (int, float) if hint is float else hint
    return isinstance(value, kinds) and (hint is bool or not isinstance(value, bool))


def _below(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _unfit(file: str, path: str, needed: str, value: Any) -> InputError:
    place = f"{file}: {path}" if path else file
    return InputError(f"{place}: {needed}, not {FOUND.get(type(value), type(value).__name__)}")
