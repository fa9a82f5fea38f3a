"""The files of a certificate are written here: record, section of a model card, page, badge."""

from pathlib import Path
from typing import Any

from lrc_cli.certify.gates import missed_gates
from lrc_cli.certify.record import (
    BADGE,
    CERTIFICATE,
    CONFIG,
    PAGE,
    SECTION,
    CopyRecord,
    Flag,
    TensorFacts,
)
from lrc_cli.certify.sentences import (
    badge_text,
    kind_of,
    limits,
    statements,
    summary,
    worst_sentences,
)
from lrc_cli.checkpoint.manifest import MANIFEST_NAME, build_manifest
from lrc_cli.quality.certificate_record import NoCertificate, Statement
from lrc_cli.quality.sentences import rounded_up, title
from lrc_cli.report.markdown import escaped, markdown_table
from lrc_cli.report.markup import Markup, element
from lrc_cli.report.page import bullets, html_page, html_table, remark, section
from lrc_cli.report.record import Gate
from lrc_cli.report.tables import Column, Table, make_table
from lrc_cli.runtime.files import write_json, write_text
from lrc_cli.text import EMPTY, byte_size, count, percent, small, visible

MOST_FLAGS = 20
"""The number of flags that the section of a model card lists."""
CHARACTER = 6.2
"""The width of a character of the badge, in pixels."""


def write_certificate(directory: Path, record: CopyRecord) -> None:
    """Writes all files of a certificate; the manifest comes last and names the others."""
    write_json(directory / CERTIFICATE, record.to_json())
    write_text(directory / CONFIG, record.config)
    for name, render in RENDERED.items():
        write_text(directory / name, render(record))
    write_json(directory / MANIFEST_NAME, build_manifest(directory))


def render_section(record: CopyRecord) -> str:
    """Returns certificate.md, a section for a model card."""
    name, original = escaped(record.other.name), escaped(record.original.name)
    lines = [escaped(line) for line in statements(record)]
    parts = [
        f"## Faithfulness of {name} to {original}",
        f"![{escaped(badge_text(record))}]({BADGE})",
        escaped(summary(record)),
        *(f"**Gate missed: {escaped(text)}.**" for text in missed_gates(record)),
        _bullets(lines),
    ]
    if record.certificate.statements:
        parts += [markdown_table(statements_table(record))]
    if record.worst:
        parts += ["Worst of the drawn sequences:", _bullets(map(escaped, worst_sentences(record)))]
    parts += [f"### Weights\n\n{markdown_table(kinds_table(record))}", _flags(record)]
    if record.differences:
        parts += ["### Differences", _bullets(map(escaped, record.differences))]
    if record.gates:
        parts += ["### Gates", markdown_table(gates_table(record))]
    parts += ["### What is not promised", _bullets(map(escaped, limits(record)))]
    parts += [
        "### Checking it again",
        escaped(VERIFYING),
        markdown_table(checkpoints_table(record)),
    ]
    return visible("\n\n".join(parts), keep="\n\t") + "\n"


VERIFYING = "lrc verify DIRECTORY --against ORIGINAL --other COPY --data DATA --manifest-sha256 HEX"


def _bullets(lines: Any) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _flags(record: CopyRecord) -> str:
    flags = record.weights.flags
    if not flags:
        return "No tensor is flagged."
    lines = [escaped(f"{x.kind}: {x.tensor}: {x.text}") for x in flags[:MOST_FLAGS]]
    if len(flags) > MOST_FLAGS:
        lines.append(f"and {count(len(flags) - MOST_FLAGS)} more, in {PAGE}")
    return f"Flags ({count(len(flags))}):\n\n{_bullets(lines)}"


def render_page(record: CopyRecord) -> str:
    """Returns certificate.html, one page without scripts."""
    certificate = record.certificate
    rests: list[str] = []
    if not isinstance(certificate, NoCertificate):
        hashes = f"Data drawn: sha256 {certificate.data.data_sha256}."
        rests = [section("What this rests on", bullets(certificate.assumptions), remark(hashes))]
    missed = {index for index, gate in enumerate(record.gates) if not gate.met}
    return html_page(
        f"{record.other.name} beside {record.original.name}",
        element("p", summary(record)),
        *(element("p", f"Gate missed: {text}.", class_="alarm") for text in missed_gates(record)),
        section(
            "Statements",
            bullets(statements(record)),
            html_table(statements_table(record), tall=True) if certificate.statements else Markup(),
        ),
        section("Worst of the drawn sequences", bullets(worst_sentences(record))),
        *(
            [section("Gates", html_table(gates_table(record), alarms=missed))]
            if record.gates
            else []
        ),
        section("Flags", _flags_table(record)),
        section("Weights by kind", html_table(kinds_table(record), "names", tall=True)),
        section("Weights", html_table(tensors_table(record), "names", tall=True)),
        section("Differences", bullets(record.differences or ["None but the weights was found."])),
        *rests,
        section("What is not promised", bullets(limits(record))),
        section("Both checkpoints", html_table(checkpoints_table(record), "hashes")),
        section("Configuration", element("pre", record.config)),
    )


def _flags_table(record: CopyRecord) -> Markup:
    if not record.weights.flags:
        return element("p", "No tensor is flagged.")
    columns: list[Column] = [
        ("tensor", "l", lambda x: x.tensor),
        ("flag", "l", lambda x: x.kind),
        ("found", "l", lambda x: x.text),
    ]
    return html_table(make_table(columns, record.weights.flags), "names", tall=True)


def render_badge(record: CopyRecord) -> str:
    """Returns badge.svg: two boxes with words, as model cards show them."""
    label, words = "faithful to original", badge_text(record)
    is_bad = any(not gate.met for gate in record.gates)
    colour = "#c81e3a" if is_bad else "#c2620a" if record.weights.flags else "#2563eb"
    if words == "not certified":
        colour = "#5f6873"
    left, right = (round(len(text) * CHARACTER + 12) for text in (label, words))
    text = {"fill": "#fff", "font_family": "Verdana,sans-serif", "font_size": 11, "y": 14}
    badge = element(
        "svg",
        element("title", f"{label}: {words}"),
        element("rect", width=left, height=20, fill="#5f6873"),
        element("rect", x=left, width=right, height=20, fill=colour),
        element("text", label, x=6, **text),
        element("text", words, x=left + 6, **text),
        xmlns="http://www.w3.org/2000/svg",
        width=left + right,
        height=20,
        role="img",
    )
    return visible(badge, keep="\n") + "\n"


RENDERED = {SECTION: render_section, PAGE: render_page, BADGE: render_badge}
"""The files that follow from the record, each with the function that makes it."""


def statements_table(record: CopyRecord) -> Table:
    """Returns one row per statement."""

    def bound(statement: Statement) -> str:
        return statement.text if statement.bound is None else rounded_up(statement.bound)

    columns: list[Column] = [
        ("statement", "l", title),
        ("bound", "r", bound),
        ("unit", "l", lambda s: s.unit),
        ("in the sample", "r", lambda s: small(s.observed)),
        ("worst in the sample", "r", lambda s: small(s.worst)),
    ]
    return make_table(columns, record.certificate.statements)


def gates_table(record: CopyRecord) -> Table:
    """Returns one row per gate."""
    columns: list[Column] = [
        ("gate", "l", lambda gate: gate.name),
        ("limit", "r", lambda gate: f"{gate.limit:g}"),
        ("bound", "r", lambda gate: small(gate.measured)),
        ("", "l", lambda gate: "met" if gate.met else "missed"),
        ("note", "l", lambda gate: gate.reason or EMPTY),
    ]
    gates: tuple[Gate, ...] = record.gates
    return make_table(columns, gates)


def kinds_table(record: CopyRecord) -> Table:
    """Returns one row per kind of tensor: numbers, median and largest error."""
    groups: dict[str, list[TensorFacts]] = {}
    for tensor in record.weights.tensors:
        if tensor.error is not None:
            groups.setdefault(kind_of(tensor.name), []).append(tensor)
    columns: list[Column] = [
        ("kind", "l", lambda row: row[0]),
        ("tensors", "r", lambda row: count(len(row[1]))),
        ("median relative error", "r", lambda row: small(_middle([x.error for x in row[1]]))),
        ("largest", "r", lambda row: small(max(x.error for x in row[1]))),
        ("median on inputs", "r", lambda row: small(_middle([x.input_error for x in row[1]]))),
        ("levels", "r", lambda row: count(_levels(row[1]))),
        ("beyond half a step", "r", lambda row: percent(_beyond(row[1]))),
    ]
    return make_table(columns, groups.items())


def _middle(values: list[float | None]) -> float | None:
    known = sorted(value for value in values if value is not None)
    return known[len(known) // 2] if known else None


def _levels(tensors: list[TensorFacts]) -> int | None:
    return max((x.grid.levels for x in tensors if x.grid is not None), default=None)


def _beyond(tensors: list[TensorFacts]) -> float | None:
    return _middle([x.grid.beyond_half for x in tensors if x.grid is not None])


def tensors_table(record: CopyRecord) -> Table:
    """Returns one row per tensor."""
    flags: dict[str, list[Flag]] = {}
    for flag in record.weights.flags:
        flags.setdefault(flag.tensor, []).append(flag)
    columns: list[Column] = [
        ("tensor", "l", lambda x: x.name),
        ("shape", "l", lambda x: " x ".join(map(str, x.shape))),
        ("relative error", "r", lambda x: small(x.error)),
        ("on inputs", "r", lambda x: small(x.input_error)),
        ("scale", "r", lambda x: EMPTY if x.scale is None else f"{x.scale:.5f}"),
        ("levels", "r", lambda x: count(x.grid.levels if x.grid else None)),
        ("beyond half a step", "r", lambda x: percent(x.grid.beyond_half if x.grid else None)),
        ("largest, steps", "r", lambda x: small(x.grid.largest if x.grid else None)),
        ("flags", "l", lambda x: ", ".join(f.kind for f in flags.get(x.name, ())) or EMPTY),
    ]
    return make_table(columns, record.weights.tensors)


def checkpoints_table(record: CopyRecord) -> Table:
    """Returns what both checkpoints are, and the hashes of their files."""
    rows: list[tuple[str, str]] = []
    for which, side in (("original", record.original), ("copy", record.other)):
        size = f"{count(side.num_parameters)} parameters, {byte_size(side.num_bytes)}"
        rows.append((which, f"{side.name}: {side.architecture}, {side.form}, {size}"))
        rows += [(f"{which}, {name}", f"sha256 {sha256}") for name, sha256 in side.sha256.items()]
    if not isinstance(record.certificate, NoCertificate):
        population = record.certificate.data.population
        rows.append((f"data, {population.file}", f"sha256 {population.file_sha256}"))
    versions = record.arithmetic
    rows.append(
        (
            "versions",
            f"lrc {record.lrc_version}, torch {versions.torch_version},"
            f" transformers {versions.transformers_version}",
        )
    )
    columns: list[Column] = [("", "l", lambda row: row[0]), ("", "l", lambda row: row[1])]
    return make_table(columns, rows)
