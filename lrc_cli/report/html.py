"""report.html is one page that needs neither network nor scripts."""

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
from lrc_cli.report.markup import Markup, element
from lrc_cli.report.page import bullets, html_page, html_table, remark, section
from lrc_cli.report.record import Record
from lrc_cli.report.shortfalls import shortfalls
from lrc_cli.report.tables import (
    Column,
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
from lrc_cli.text import byte_size, count, duration, factor, percent, perplexity, small


def render_html(record: Record) -> str:
    """Returns report.html as text: style and charts inline, every name escaped.

    Args:
        record: the content of report.json.
    """
    return html_page(
        f"{record.model}, low-rank compressed",
        element("p", summary(record)),
        _alarm(record),
        *(element("p", f"Gate missed: {text}.", class_="alarm") for text in missed_gates(record)),
        _tiles(record),
        section("Quality", *_quality(record)),
        *_gates(record),
        *_shortfalls(record),
        section("Certificate", *_certificate(record)),
        section("Size", *_size(record)),
        section("Kept bytes per layer", *_shares(record)),
        section("Error per layer", *_errors(record)),
        section("Time and memory", *_costs(record)),
        section("Layers", *_layers(record)),
        section("Layers on held-out data", *_held_out(record)),
        section("Not compressible", *_skipped(record)),
        section("What is not promised", bullets(limits(record))),
        section("Versions and hashes", html_table(provenance_table(record), "hashes")),
        section("Configuration", element("pre", record.provenance.config)),
    )


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
        return [element("p", note), remark(recovery_note(record))]
    notes = measured_in(record), recovery_note(record)
    return [html_table(quality_table(record)), *map(remark, notes)]


def _gates(record: Record) -> list[Markup]:
    missed = {index for index, gate in enumerate(record.gates) if not gate.met}
    table = html_table(gates_table(record), alarms=missed)
    return [section("Gates", table)] if record.gates else []


def _shortfalls(record: Record) -> list[Markup]:
    lines = shortfalls(record)
    return [section("Less than asked", bullets(lines))] if lines else []


def _size(record: Record) -> list[Markup]:
    files_note = f"The weight files take {count(record.size.file_bytes)} bytes with headers."
    return [html_table(size_table(record)), remark(files_note)]


def _shares(record: Record) -> list[Markup]:
    kinds = {"": "factorised", "dense": "left dense", "fallback": "fell back to dense"}
    legend = [
        element("span", element("span", class_=f"swatch {kind}"), words)
        for kind, words in kinds.items()
    ]
    note = "Bytes after / before, one panel per family of layers, in the network's order."
    return [remark(note), element("p", *legend, class_="legend"), share_chart(record.layers)]


def _errors(record: Record) -> list[Markup]:
    if not record.factorised:
        return [element("p", "No layer is factorised, so none has an error.")]
    return [
        remark(f"{error_note(record)} The charts show the output error on a logarithmic axis."),
        remark(loss_estimate(record)),
        remark(worst_case_note(record)),
        error_legend(),
        error_chart(record.layers),
    ]


def _costs(record: Record) -> list[Markup]:
    total = duration(sum(record.timing.values()))
    return [time_chart(record.timing), remark(f"In all {total}. {memory_note(record)}")]


def _layers(record: Record) -> list[Markup]:
    fallen = {index for index, layer in enumerate(record.layers) if layer.facts.fallback}
    return [html_table(layer_table(record), "names", tall=True, alarms=fallen)]


def _certificate(record: Record) -> list[Markup]:
    certificate = record.certificate
    if isinstance(certificate, NoCertificate):
        return [element("p", f"There is none: {certificate.note}.")]
    own = [s.text for s in certificate.statements if s.layer is not None]
    opener = element("summary", f"The statements on {count(len(own))} single layers")
    return [
        bullets(main_statements(certificate)),
        element("details", opener, bullets(own)) if own else Markup(),
        html_table(certificate_table(record), tall=True),
        remark("What this rests on:"),
        bullets(certificate.assumptions),
        remark(f"Certification data: sha256 {certificate.data.data_sha256}."),
    ]


def _held_out(record: Record) -> list[Markup]:
    note = held_out_note(record)
    if not note:
        return [element("p", "Not measured.")]
    return [remark(note), html_table(held_out_table(record), "names", tall=True)]


def _skipped(record: Record) -> list[Markup]:
    if not record.skipped:
        return [element("p", "Every tensor belongs to a compressible layer.")]
    columns: list[Column] = [
        ("tensor", "l", lambda x: x.name),
        ("bytes", "r", lambda x: byte_size(x.bytes)),
        ("share of checkpoint", "r", lambda x: percent(x.share)),
        ("reason", "l", lambda x: x.reason),
    ]
    every = html_table(make_table(columns, record.skipped), "names", tall=True)
    opener = element("summary", f"All {count(len(record.skipped))} tensors")
    by_reason = html_table(skipped_table(record.skipped))
    return [by_reason, element("details", opener, every)]
