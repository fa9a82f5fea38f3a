"""Every leaf of a report.json is changed here, and pages and manifest are made to agree with it."""

import contextlib
import copy
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import damage

from lrc_cli.errors import LrcError
from lrc_cli.verify.files.certificate import check_certificate
from lrc_cli.verify.files.figures import check_figures
from lrc_cli.verify.files.weights import check_weights
from lrc_cli.verify.files.written import Written, disk_names, form_problem
from lrc_cli.verify.statements import Findings

SPOILT = (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError)
"""What rendering a spoilt report may raise."""

Place = tuple[str | int, ...]
"""The keys and the indices on the way to a value."""


@dataclass(frozen=True, kw_only=True)
class Attack:
    """Holds one change of a report."""

    place: Place
    """The value that is changed."""
    how: str
    """The kind of the change."""
    leaf: str
    """The place with names and indices left out, so that alike places have one name."""
    change: Callable[[Any], Any]
    """Changes the owner of the value in place."""

    @property
    def name(self) -> str:
        """The name of the kind of leaf, with the change."""
        return f"{self.leaf}: {self.how}"

    def apply(self, report: dict[str, Any]) -> dict[str, Any]:
        """Returns a changed copy of a report."""
        changed = copy.deepcopy(report)
        owner: Any = changed
        for key in self.place[:-1]:
            owner = owner[key]
        self.change(owner)
        return changed


def attacks_on(report: dict[str, Any]) -> list[Attack]:
    """Returns every change of every leaf, list and object of a report."""
    return [
        Attack(place=place, how=how, leaf=_leaf(report, place), change=change)
        for place, value in _values(report, ())
        for how, change in _changes(place[-1], value)
        if changes_something(value, change, place[-1])
    ]


def changes_something(value: Any, change: Callable[[Any], None], key: str | int) -> bool:
    """Returns whether a change leaves a value that is written differently."""
    owner: Any = [None] * (key + 1) if isinstance(key, int) else {}
    owner[key] = copy.deepcopy(value)
    change(owner)
    still = key < len(owner) if isinstance(key, int) else key in owner
    return not still or json.dumps(owner[key]) != json.dumps(value)


def sampled(attacks: list[Attack]) -> list[Attack]:
    """Returns the first attack of each name."""
    return list({attack.name: attack for attack in reversed(attacks)}.values())[::-1]


def findings_on(written: Written, report: dict[str, Any]) -> Findings:
    """Returns what the files alone tell of another report, whose pages and hashes would agree."""
    findings = Findings()
    if findings.judge("report.open", "report.json can be read", form_problem(report)):
        changed = replace(written, report=report)
        with findings.guard("layers.names", "the report's layers are named like tensors"):
            changed = replace(changed, keys=disk_names(report, written.source))
        check_weights(changed, findings)
        check_figures(changed, findings)
        check_certificate(changed, findings)
    return findings


def hide(output: Path, report: dict[str, Any]) -> None:
    """Writes a report with pages and a manifest that agree with it, as an attacker does."""
    damage.write_report(output, report)
    with contextlib.suppress(LrcError, *SPOILT):  # no page can say such a thing: the old ones stay
        damage.rewrite_pages(output)
    damage.rewrite_manifest(output)


def _values(value: Any, place: Place) -> Iterator[tuple[Place, Any]]:
    if place:
        yield place, value
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _values(item, (*place, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _values(item, (*place, index))


def _changes(key: str | int, value: Any) -> Iterator[tuple[str, Callable[[Any], None]]]:
    """Yields the changes of one value, each with its kind."""

    def put(new: Any) -> Callable[[Any], None]:
        def change(owner: Any) -> None:
            owner[key] = new

        return change

    def drop(owner: Any) -> None:
        del owner[key]

    yield "dropped", drop
    if value is not None:
        yield "null", put(None)
    if isinstance(value, bool):
        yield "turned round", put(not value)
        yield "a number", put(int(value))
    elif isinstance(value, int | float):
        yield "larger", put(value + 1 if isinstance(value, int) else value * 1.25 + 1e-3)
        yield "smaller", put(value - 1 if isinstance(value, int) else value * 0.75)
        yield "negative", put(-abs(value) - 1)
        yield "NaN", put(float("nan"))
        yield "infinite", put(float("inf"))
        yield "a text", put("small")
    elif isinstance(value, str):
        yield "other words", put("provably lossless")
        yield "words more", put(f"{value}, provably lossless")
        yield "empty", put("")
        yield "a number", put(3)
    elif value is None:
        yield "a figure", put(0.5)
        yield "words", put("provably lossless")
    elif isinstance(value, list):
        yield "emptied", put([])
        if value:
            yield "last one dropped", put(value[:-1])
            yield "first one twice", put([*value, copy.deepcopy(value[0])])
        if len(value) > 1:
            yield "turned round", put(value[::-1])
    elif isinstance(value, dict):
        yield "emptied", put({})
        yield "a key more", put({**value, "provably": "lossless"})


def _leaf(report: dict[str, Any], place: Place) -> str:
    """Returns a place's name without the names of layers, tensors, files and texts."""
    parts, value = [], report
    for depth, key in enumerate(place):
        if isinstance(key, int):
            parts.append("[]")
        elif (depth and place[:depth] in NAMED) or _is_series(place[:depth]):
            parts.append("*")
        else:
            parts.append(str(key))
        value = value[key]
    name = ".".join(parts)
    if place[0] == "layers" and len(place) > 1:
        row = report["layers"][place[1]]
        form = row["storage"] if not row["fallback"] else "fallen"
        sequential = ", sequential" if row.get("sequential") else ""
        return f"{name} ({row['method']}, {form}{sequential})"
    if place[:2] == ("certificate", "statements") and len(place) > 2:
        statement = report["certificate"]["statements"][place[2]]
        quantity = re.sub(r"\..*", "", statement["quantity"])
        return f"{name} ({quantity}, {statement['kind']})"
    return name


NAMED: frozenset[Place] = frozenset(
    {
        ("copies",),
        ("fused",),
        ("certificate", "tolerances"),
        ("certificate", "values", "layers"),
        ("provenance", "checkpoint_sha256"),
        ("provenance", "data_files_sha256"),
    }
)
"""The objects whose keys are names."""


def _is_series(place: Place) -> bool:
    return False
