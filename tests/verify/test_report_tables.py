"""The tables of what a report may hold name every field of the record."""

import dataclasses
from collections.abc import Iterator, Mapping
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

import pytest

from lrc_cli.quality.certificate_record import Certificate
from lrc_cli.report.record import Record
from lrc_cli.verify.files.fields import ENUMERATED, KEYS, NUMBERS, OPAQUE, WORDS, Range
from lrc_cli.verify.files.presence import PRESENT


def fields_of(record: type, path: str = "") -> Iterator[tuple[str, Any, bool]]:
    """Yields the path of every field below a record, its type, and whether it may be missing."""
    hints = get_type_hints(record)
    for field in dataclasses.fields(record):  # type: ignore[arg-type]
        hint = Certificate if field.name == "certificate" else hints[field.name]
        place = path if "inline" in field.metadata else f"{path}.{field.name}".lstrip(".")
        if record.__name__ == "SequenceValues":
            yield from types_below(f"{path}.layers.*[]", float, False)
            continue
        yield from types_below(place, hint, False)


def types_below(place: str, hint: Any, optional: bool) -> Iterator[tuple[str, Any, bool]]:
    """Yields a value's path with its type, and the paths of all values below it."""
    if isinstance(hint, UnionType):
        (inner,) = (x for x in get_args(hint) if x is not NoneType)
        yield from types_below(place, inner, True)
        return
    yield place, hint, optional
    if place in OPAQUE:
        return
    if get_origin(hint) is tuple:
        yield from types_below(f"{place}[]", get_args(hint)[0], False)
    elif get_origin(hint) is Mapping:
        yield from types_below(f"{place}.*", get_args(hint)[1], False)
    elif dataclasses.is_dataclass(hint):
        yield from fields_of(hint, place)  # type: ignore[arg-type]


FIELDS = list(fields_of(Record))


def test_every_value_that_may_be_missing_is_in_the_table() -> None:
    optional = {place for place, _, missing in FIELDS if missing}
    nested = {"certificate.values.layers"}  # the values read themselves
    assert optional | nested == set(PRESENT)


def test_every_text_and_every_free_key_is_in_the_tables() -> None:
    texts = {place for place, hint, _ in FIELDS if hint is str}
    assert texts == set(WORDS)
    free = {place for place, hint, _ in FIELDS if get_origin(hint) is Mapping} - set(OPAQUE)
    assert free | {"certificate.values", "certificate.values.layers"} == set(KEYS)
    assert set(ENUMERATED) <= set(KEYS)


def test_every_range_is_a_number_s() -> None:
    numbers = {place for place, hint, _ in FIELDS if hint in (int, float)}
    assert set(NUMBERS) - {"certificate.values.loss_difference[]"} <= numbers


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), -1, -0.5])
def test_a_size_is_a_finite_number_from_zero_up(value: float) -> None:
    assert Range().problem(value) is not None
    assert Range().problem(0) is None and Range().problem(1e300) is None
