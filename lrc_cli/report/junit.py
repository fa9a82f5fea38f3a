"""A run is written as JUnit XML for CI systems: what was promised, and what was not kept."""

import re
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from lrc_cli.errors import InputError
from lrc_cli.quality.certificate_record import CERTIFIED
from lrc_cli.report.facts import gate_missed, not_as_asked
from lrc_cli.report.record import Record
from lrc_cli.runtime.files import why_not_writable, write_text

SUITE = "lrc"
RATIOS = ("kept_compressible", "kept_checkpoint", "kept_parameters")
PERPLEXITIES = ("perplexity_before", "perplexity_after")
_NOT_XML = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


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
    ElementTree.indent(root)
    text = ElementTree.tostring(root, encoding="unicode")
    return f'<?xml version="1.0" encoding="utf-8"?>\n{text}\n'


def _suite(record: Record, *, strict: bool) -> ElementTree.Element:
    seconds = f"{sum(record.timing.values()):.3f}"
    suite = ElementTree.Element("testsuite", name=SUITE, time=seconds)
    properties = ElementTree.SubElement(suite, "properties")
    for name, value in _properties(record).items():
        ElementTree.SubElement(properties, "property", name=_clean(name), value=_clean(value))
    for gate in record.gates:
        failure = None if gate.met else gate_missed(gate)
        _case(suite, "gates", f"{gate.name} <= {gate.limit:g}", failure=failure)
    if strict:
        _case(suite, "strict", "no layer fell back", failure=_fallen(record))
    target = record.target
    name = f"{target.name} {target.value:g}"
    missed = None if target.met else f"compression.{name} is missed"
    _case(suite, "target", name, failure=missed)
    for statement in record.certificate.statements:
        skipped = None if statement.status == CERTIFIED else statement.text
        _case(suite, "certificate", statement.id, skipped=skipped)
    cases = suite.findall("testcase")
    suite.set("tests", str(len(cases)))
    suite.set("failures", str(sum(case.find("failure") is not None for case in cases)))
    suite.set("errors", "0")
    suite.set("skipped", str(sum(case.find("skipped") is not None for case in cases)))
    return suite


def check_junit_path(path: Path, output: Path) -> None:
    """Raises InputError unless a file can be written there, outside the output directory."""
    path = path.absolute()
    if path.is_dir():
        raise InputError(f"--junit: {path} is a directory", "give the name of a file")
    if why_not_writable(path.parent) is not None:
        raise InputError(
            f"--junit: {path.parent} is not a writable directory", "make it, or give another path"
        )
    # Every file in the output is named in its manifest.
    if path.resolve().is_relative_to(output.absolute().resolve()):
        raise InputError(f"--junit: {path} lies in the output directory", "give another path")


def write_junit(path: Path, records: Sequence[Record], *, strict: bool = False) -> None:
    """Writes `render_junit` whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    write_text(partial, render_junit(*records, strict=strict))
    partial.replace(path)


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


def _case(
    suite: ElementTree.Element,
    group: str,
    name: str,
    *,
    failure: str | None = None,
    skipped: str | None = None,
) -> None:
    case = ElementTree.SubElement(
        suite, "testcase", classname=f"{SUITE}.{group}", name=_clean(name)
    )
    for kind, message in (("failure", failure), ("skipped", skipped)):
        if message is not None:
            ElementTree.SubElement(case, kind, message=_clean(message))


def _clean(text: str) -> str:
    """Replaces control characters, which names may have and XML cannot write."""
    return _NOT_XML.sub("\ufffd", text)
