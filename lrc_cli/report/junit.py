"""A run is written as JUnit XML for CI systems: what was promised, and what was not kept."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from lrc_cli.errors import InputError, RunError
from lrc_cli.quality.certificate_record import CERTIFIED
from lrc_cli.report.facts import gate_missed, not_as_asked
from lrc_cli.report.record import Record
from lrc_cli.runtime.files import why_not_writable, write_text
from lrc_cli.runtime.places import check_plain, replacing
from lrc_cli.text import visible

SUITE = "lrc"
RATIOS = ("kept_compressible", "kept_checkpoint", "kept_parameters")
PERPLEXITIES = ("perplexity_before", "perplexity_after")
HEAD_BYTES = 1 << 10
OWN = re.compile(
    rb'<\?xml version="1\.0" encoding="utf-8"\?>\n(<testsuites>\s*)?<testsuite name="lrc[ "]'
)
"""The beginning of every file that `render_junit` makes: the suites are named for lrc."""
_NOT_XML = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True, kw_only=True)
class Case:
    """Holds one test case."""

    group: str
    """The last part of the case's class."""
    name: str
    failure: str | None = None
    """Why it failed; None: it did not."""
    skipped: str | None = None
    """Why nothing can be said; None: something can."""


def render_junit(*records: Record, strict: bool = False) -> str:
    """Returns a test suite for every report.

    A suite has a case for each gate, the target, the layers that fell back and the certificate.

    Args:
        records: the records of one or several jobs, with gates as checked now.
        strict: whether a layer that fell back counts as a failure (`--strict`).

    Returns:
        XML text. A statement that could not be certified is skipped, not failed.
    """
    suites = [_suite(record, strict=strict) for record in records]
    root = suites[0]
    if len(suites) > 1:
        root = ElementTree.Element("testsuites")
        for suite, record in zip(suites, records, strict=True):
            suite.set("name", f"{SUITE} {record.target.name} {record.target.value:g}")
            root.append(suite)
    return _xml(root)


def render_suite(cases: Sequence[Case]) -> str:
    """Returns a test suite with these cases as XML text."""
    return _xml(_suite_of(cases, {}, 0.0))


def _xml(root: ElementTree.Element) -> str:
    ElementTree.indent(root)
    text = ElementTree.tostring(root, encoding="unicode")
    return f'<?xml version="1.0" encoding="utf-8"?>\n{text}\n'


def _suite(record: Record, *, strict: bool) -> ElementTree.Element:
    cases = [
        Case(
            group="gates",
            name=f"{gate.name} <= {gate.limit:g}",
            failure=None if gate.met else gate_missed(gate),
        )
        for gate in record.gates
    ]
    if strict:
        cases.append(Case(group="strict", name="no layer fell back", failure=_fallen(record)))
    target = record.target
    name = f"{target.name} {target.value:g}"
    missed = None if target.met else f"compression.{name} is missed"
    cases.append(Case(group="target", name=name, failure=missed))
    for statement in record.certificate.statements:
        skipped = None if statement.status == CERTIFIED else statement.text
        cases.append(Case(group="certificate", name=statement.id, skipped=skipped))
    return _suite_of(cases, _properties(record), sum(record.timing.values()))


def _suite_of(
    cases: Sequence[Case], properties: Mapping[str, str], seconds: float
) -> ElementTree.Element:
    suite = ElementTree.Element("testsuite", name=SUITE, time=f"{seconds:.3f}")
    facts = ElementTree.SubElement(suite, "properties")
    for name, value in properties.items():
        ElementTree.SubElement(facts, "property", name=_clean(name), value=_clean(value))
    for case in cases:
        _add(suite, case)
    suite.set("tests", str(len(cases)))
    suite.set("failures", str(sum(case.failure is not None for case in cases)))
    suite.set("errors", "0")
    suite.set("skipped", str(sum(case.skipped is not None for case in cases)))
    return suite


def check_junit_path(path: Path) -> None:
    """Checks that a JUnit file can be written, and that nothing of another kind is replaced.

    Raises:
        InputError: nothing can be made there, or something lies there that lrc did not write.
    """
    path = path.absolute()
    check_plain("--junit", path)
    if path.exists() and not _is_own(path):
        raise InputError(
            f"--junit: {path} exists and is not a JUnit file of lrc's", "give another path"
        )
    if why_not_writable(path.parent) is not None:
        raise InputError(
            f"--junit: {path.parent} is not a writable directory", "make it, or give another path"
        )


def _is_own(file: Path) -> bool:
    """Whether a file is empty or begins as `render_junit` does."""
    with file.open("rb") as handle:
        head = handle.read(HEAD_BYTES)
    return not head or OWN.match(head) is not None


def write_junit(path: Path, records: Sequence[Record], *, strict: bool = False) -> None:
    """Writes `render_junit` whole or not at all; errors as in `write_junit_text`."""
    write_junit_text(path, render_junit(*records, strict=strict))


def write_junit_text(path: Path, text: str) -> None:
    """Writes a JUnit file whole or not at all.

    Raises:
        RunError: something that lrc did not write has appeared under the name.
    """
    try:
        check_junit_path(path)
    except InputError as error:
        raise RunError(error.message, error.remedy) from error
    with replacing(path) as aside:
        write_text(aside, text)


def _properties(record: Record) -> dict[str, str]:
    found = {name: f"{getattr(record.size, name):.6g}" for name in RATIOS}
    for row in record.quality:
        values = {key: getattr(row.scores, key) for key in PERPLEXITIES}
        found |= {f"{key}.{row.text}": f"{x:.6g}" for key, x in values.items() if x is not None}
    return found


def _fallen(record: Record) -> str | None:
    names = [layer.name for layer in not_as_asked(record)]
    number = f"{len(names)} layer{'' if len(names) == 1 else 's'}"
    return f"{number} fell back: {', '.join(names)}" if names else None


def _add(suite: ElementTree.Element, case: Case) -> None:
    added = ElementTree.SubElement(
        suite, "testcase", classname=f"{SUITE}.{case.group}", name=_clean(case.name)
    )
    for kind, message in (("failure", case.failure), ("skipped", case.skipped)):
        if message is not None:
            ElementTree.SubElement(added, kind, message=_clean(message))


def _clean(text: str) -> str:
    """Escapes control characters, which names may have; what XML cannot write is replaced."""
    return _NOT_XML.sub("\ufffd", visible(text))
