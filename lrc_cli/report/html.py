"""report.html is one page that needs neither network nor scripts."""

from collections.abc import Iterable
from importlib.resources import files

from lrc_cli.quality.certificate_record import NoCertificate
from lrc_cli.quality.sentences import main_statements
from lrc_cli.report.charts import error_chart, error_legend, share_chart, time_chart
from lrc_cli.report.facts import (
    error_note,
    held_out_note,
    layers_fell_back,
    limits,
    loss_estimate,
    measured_in,
    memory_note,
    missed_gates,
    perplexity_ratio,
    recovery_note,
    summary,
)
from lrc_cli.report.markup import Markup, element, join
from lrc_cli.report.record import Record
from lrc_cli.report.shortfalls import shortfalls
from lrc_cli.report.tables import (
    Column,
    Table,
    certificate_table,
    gates_table,
    held_out_table,
    layer_table,
    make_table,
    provenance_table,
    quality_table,
    size_table,
    skipped_table,
)
from lrc_cli.report.worst_case import worst_case_note
from lrc_cli.text import byte_size, count, duration, factor, percent, perplexity, small, visible

# The policy makes the promise binding: a browser that honours it fetches nothing for this page.
HEAD = (
    '<meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    '<meta http-equiv="Content-Security-Policy"'
    " content=\"default-src 'none'; style-src 'unsafe-inline'\">"
)


def render_html(record: Record) -> str:
    """Returns report.html as text: style and charts inline, every name escaped.

    Args:
        record: the content of report.json.
    """
    title = f"{record.model}, low-rank compressed"
    style = Markup(files(__package__).joinpath("page.css").read_text(encoding="utf-8"))
    head = element("head", Markup(HEAD), element("title", title), element("style", style))
    body = element(
        "body",
        element("h1", title),
        element("p", summary(record)),
        _alarm(record),
        *(element("p", f"Gate missed: {text}.", class_="alarm") for text in missed_gates(record)),
        _tiles(record),
        _section("Quality", *_quality(record)),
        *_gates(record),
        *_shortfalls(record),
        _section("Certificate", *_certificate(record)),
        _section("Size", *_size(record)),
        _section("Kept bytes per layer", *_shares(record)),
        _section("Error per layer", *_errors(record)),
        _section("Time and memory", *_costs(record)),
        _section("Layers", *_layers(record)),
        _section("Layers on held-out data", *_held_out(record)),
        _section("Not compressible", *_skipped(record)),
        _section("What is not promised", _list(limits(record))),
        _section("Versions and hashes", _table(provenance_table(record), "hashes")),
        _section("Configuration", element("pre", record.provenance.config)),
    )
    page = f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"
    return visible(page, keep="\n\t")


def _section(title: str, *children: str) -> Markup:
    return element("section", element("h2", title), *children)


def _list(lines: Iterable[str]) -> Markup:
    return element("ul", *(element("li", line) for line in lines))


def _note(text: str) -> Markup:
    return element("p", text, class_="note") if text else Markup()


def _alarm(record: Record) -> Markup:
    fallen = record.fallen_back
    if not fallen:
        return Markup()
    text = f"{layers_fell_back(record)}; the first is {fallen[0].name}."
    return element("p", text, class_="alarm")


def _tiles(record: Record) -> Markup:
    size = record.size
    tiles = [
        (percent(size.kept_compressible), "of the compressible weights' bytes kept"),
        (percent(size.kept_checkpoint), "of the whole checkpoint's bytes kept"),
        (percent(size.kept_parameters), "of the parameters kept"),
    ]
    for row in record.quality:
        before, after = row.scores.perplexity_before, row.scores.perplexity_after
        if after is not None:
            ratio = factor(perplexity_ratio(row))
            change = f"{perplexity(before)} → {perplexity(after)}"
            tiles.append((change, f"perplexity, {row.text}: {ratio}"))
        else:
            error = small(row.scores.relative_output_error)
            tiles.append((error, f"relative output error, {row.text}"))
    return element(
        "div",
        *(
            element("div", element("strong", value), element("span", label), class_="tile")
            for value, label in tiles
        ),
        class_="tiles",
    )


def _quality(record: Record) -> list[Markup]:
    if not record.quality:
        note = "Not measured: the configuration names no evaluation data."
        return [element("p", note), _note(recovery_note(record))]
    notes = measured_in(record), recovery_note(record)
    return [_table(quality_table(record)), *map(_note, notes)]


def _gates(record: Record) -> list[Markup]:
    missed = {index for index, gate in enumerate(record.gates) if not gate.met}
    table = _table(gates_table(record), alarms=missed)
    return [_section("Gates", table)] if record.gates else []


def _shortfalls(record: Record) -> list[Markup]:
    lines = shortfalls(record)
    return [_section("Less than asked", _list(lines))] if lines else []


def _size(record: Record) -> list[Markup]:
    files_note = f"The weight files take {count(record.size.file_bytes)} bytes with headers."
    return [_table(size_table(record)), _note(files_note)]


def _shares(record: Record) -> list[Markup]:
    kinds = {"": "factorised", "dense": "left dense", "fallback": "fell back to dense"}
    legend = [
        element("span", element("span", class_=f"swatch {kind}"), words)
        for kind, words in kinds.items()
    ]
    note = "Bytes after / before, one panel per family of layers, in the network's order."
    return [_note(note), element("p", *legend, class_="legend"), share_chart(record.layers)]


def _errors(record: Record) -> list[Markup]:
    if not record.factorised:
        return [element("p", "No layer is factorised, so none has an error.")]
    return [
        _note(f"{error_note(record)} The charts show the output error on a logarithmic axis."),
        _note(loss_estimate(record)),
        _note(worst_case_note(record)),
        error_legend(),
        error_chart(record.layers),
    ]


def _costs(record: Record) -> list[Markup]:
    total = duration(sum(record.timing.values()))
    return [time_chart(record.timing), _note(f"In all {total}. {memory_note(record)}")]


def _layers(record: Record) -> list[Markup]:
    fallen = {index for index, layer in enumerate(record.layers) if layer.facts.fallback}
    return [_table(layer_table(record), "names", tall=True, alarms=fallen)]


def _certificate(record: Record) -> list[Markup]:
    certificate = record.certificate
    if isinstance(certificate, NoCertificate):
        return [element("p", f"There is none: {certificate.note}.")]
    own = [s.text for s in certificate.statements if s.layer is not None]
    opener = element("summary", f"The statements on {count(len(own))} single layers")
    return [
        _list(main_statements(certificate)),
        element("details", opener, _list(own)) if own else Markup(),
        _table(certificate_table(record), tall=True),
        _note("What this rests on:"),
        _list(certificate.assumptions),
        _note(f"Certification data: sha256 {certificate.data.data_sha256}."),
    ]


def _held_out(record: Record) -> list[Markup]:
    note = held_out_note(record)
    if not note:
        return [element("p", "Not measured.")]
    return [_note(note), _table(held_out_table(record), "names", tall=True)]


def _skipped(record: Record) -> list[Markup]:
    if not record.skipped:
        return [element("p", "Every tensor belongs to a compressible layer.")]
    columns: list[Column] = [
        ("tensor", "l", lambda x: x.name),
        ("bytes", "r", lambda x: byte_size(x.bytes)),
        ("share of checkpoint", "r", lambda x: percent(x.share)),
        ("reason", "l", lambda x: x.reason),
    ]
    every = _table(make_table(columns, record.skipped), "names", tall=True)
    opener = element("summary", f"All {count(len(record.skipped))} tensors")
    by_reason = _table(skipped_table(record.skipped))
    return [by_reason, element("details", opener, every)]


def _table(
    table: Table, kind: str | None = None, *, tall: bool = False, alarms: set[int] | None = None
) -> Markup:
    """Returns an HTML table; `alarms` are the rows that stand out."""

    def cells(name: str, row: tuple[str, ...]) -> Markup:
        sides = zip(row, table.align, strict=True)
        return join(*(element(name, cell, class_="r" if s == "r" else None) for cell, s in sides))

    rows = [
        element("tr", cells("td", row), class_="fallback" if index in (alarms or ()) else None)
        for index, row in enumerate(table.rows)
    ]
    head = element("thead", element("tr", cells("th", table.head)))
    written = element("table", head, element("tbody", *rows), class_=kind)
    return element("div", written, class_="scroll tall" if tall else "scroll")
