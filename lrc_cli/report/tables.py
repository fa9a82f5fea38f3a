"""The tables of the card and of the page are made here, as plain text."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lrc_cli.quality.certificate_record import Statement
from lrc_cli.quality.records import QualityRow
from lrc_cli.quality.sentences import rounded_up, title
from lrc_cli.report.facts import kept, perplexity_ratio
from lrc_cli.report.record import DrawnSequences, LayerRecord, Record, SkippedTensor
from lrc_cli.text import (
    EMPTY,
    byte_size,
    count,
    duration,
    error_gap,
    factor,
    layer_error,
    percent,
    perplexity,
    small,
)

Column = tuple[str, str, Callable[[Any], str]]
"""The heading, "l" or "r" for the alignment, and a function from a row to its cell's text."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Holds plain text in rows and columns; a renderer escapes it."""

    head: tuple[str, ...]
    """Headings, one per column."""
    align: str
    """One "l" or "r" per column."""
    rows: tuple[tuple[str, ...], ...]
    """Cells."""


def make_table(columns: Sequence[Column], items: Iterable[Any]) -> Table:
    """Returns one row per item; a column in which no row has anything to say is left out."""
    items = list(items)
    cells = [[text(item) for item in items] for _, _, text in columns]
    kept = [i for i, column in enumerate(cells) if any(cell != EMPTY for cell in column)]
    return Table(
        head=tuple(columns[i][0] for i in kept),
        align="".join(columns[i][1] for i in kept),
        rows=tuple(zip(*(cells[i] for i in kept), strict=True)),
    )


def size_table(record: Record) -> Table:
    """Returns bytes and parameters before and after, with the names of the three ratios."""
    size = record.size
    rows = [
        ("compressible weights, bytes", size.compressible_bytes, "kept_compressible"),
        ("all tensors, bytes", size.checkpoint_bytes, "kept_checkpoint"),
        ("all tensors, parameters", size.parameters, "kept_parameters"),
    ]
    columns: list[Column] = [
        ("", "l", lambda row: row[0]),
        ("before", "r", lambda row: count(row[1].before)),
        ("after", "r", lambda row: count(row[1].after)),
        ("kept", "r", lambda row: percent(getattr(size, row[2]))),
        ("name in report.json", "l", lambda row: row[2]),
    ]
    return make_table(columns, rows)


def quality_table(record: Record) -> Table:
    """Returns one row per evaluation text."""
    columns: list[Column] = [
        ("text", "l", lambda row: row.text),
        ("perplexity before", "r", lambda row: perplexity(row.scores.perplexity_before)),
        ("after", "r", lambda row: perplexity(row.scores.perplexity_after)),
        ("after / before", "r", lambda row: factor(perplexity_ratio(row))),
        ("relative output error", "r", lambda row: small(row.scores.relative_output_error)),
        ("KL divergence, nats", "r", lambda row: small(row.scores.kl)),
        ("top-1 agreement", "r", lambda row: percent(row.scores.top1_agreement)),
        ("sequences", "r", _drawn),
        ("scored positions", "r", lambda row: count(row.scores.num_scored)),
    ]
    return make_table(columns, record.quality)


def gates_table(record: Record) -> Table:
    """Returns one row per gate."""
    columns: list[Column] = [
        ("gate", "l", lambda gate: gate.name),
        ("limit", "r", lambda gate: f"{gate.limit:g}"),
        ("measured", "r", lambda gate: small(gate.measured)),
        ("where", "l", lambda gate: gate.where or EMPTY),
        ("", "l", lambda gate: "met" if gate.met else "missed"),
        ("note", "l", lambda gate: gate.reason or EMPTY),
    ]
    return make_table(columns, record.gates)


def _drawn(row: QualityRow) -> str:
    number = count(row.scores.num_sequences)
    if row.population is None:
        return number
    return f"{number} of {count(row.population)}{_passages(row.one_in)}"


def _passages(one_in: int | None) -> str:
    return "" if one_in is None else f" (one passage in {one_in} of the file)"


def layer_table(record: Record) -> Table:
    """Returns one row per compressible layer, in the network's order."""

    def error(layer: LayerRecord, kind: str, of: str) -> str:
        if layer.facts.errors is None:
            return EMPTY
        found = getattr(layer.facts.errors, kind)
        return layer_error(getattr(found, of), found.floor)

    def gap(layer: LayerRecord, kind: str) -> str:
        if layer.facts.errors is None:
            return EMPTY
        found = getattr(layer.facts.errors, kind)
        return error_gap(found.stored, found.optimum, found.floor)

    columns: list[Column] = [
        ("layer", "l", lambda x: x.name),
        ("kind", "l", lambda x: x.kind),
        ("shape", "r", lambda x: " x ".join(map(str, x.shape))),
        ("method", "l", lambda x: x.method),
        ("storage", "l", lambda x: "dense, fell back" if x.facts.fallback else x.facts.storage),
        ("rank", "r", lambda x: count(x.facts.rank)),
        ("before", "r", lambda x: byte_size(x.bytes_before)),
        ("after", "r", lambda x: byte_size(x.bytes_after)),
        ("kept", "r", lambda x: percent(kept(x))),
        ("output error", "r", lambda x: error(x, "output", "stored")),
        ("its optimum", "r", lambda x: error(x, "output", "optimum")),
        ("gap", "r", lambda x: gap(x, "output")),
        ("plain SVD", "r", lambda x: error(x, "output", "svd")),
        ("metric error", "r", lambda x: error(x, "metric", "stored")),
        ("its optimum", "r", lambda x: error(x, "metric", "optimum")),
        ("gap", "r", lambda x: gap(x, "metric")),
        ("plain SVD", "r", lambda x: error(x, "metric", "svd")),
        ("why", "l", lambda x: x.facts.reason or EMPTY),
    ]
    return make_table(columns, record.layers)


def held_out_table(record: Record) -> Table:
    """Returns one row per layer that was measured on certification data; see `held_out_note`."""

    def error(kind: str) -> Callable[[Any], str]:
        return lambda layer: small(getattr(layer.facts.held_out, kind))

    layers = [x for x in record.layers if x.facts.held_out is not None]
    columns: list[Column] = [
        ("layer", "l", lambda x: x.name),
        ("inherited", "r", error("inherited")),
        ("new", "r", error("new")),
        ("deployed", "r", error("deployed")),
        ("on the dense inputs", "r", error("same_input")),
        ("worst sequence", "r", error("worst_sequence")),
        ("tolerance", "r", error("tolerance")),
    ]
    return make_table(columns, layers)


def certificate_table(record: Record) -> Table:
    """Returns one row per statement of the certificate."""

    def bound(statement: Statement) -> str:
        if statement.bound is None:
            return f"{statement.status}: {count(statement.num_needed)} needed"
        return rounded_up(statement.bound)

    columns: list[Column] = [
        ("statement", "l", title),
        ("bound", "r", bound),
        ("unit", "l", lambda s: s.unit),
        ("in the sample", "r", lambda s: small(s.observed)),
        ("worst in the sample", "r", lambda s: small(s.worst)),
        ("order", "r", lambda s: count(s.order)),
        ("clipped at", "r", lambda s: small(s.clip[1] if s.clip else None)),
        ("delta", "r", lambda s: small(s.delta)),
    ]
    return make_table(columns, record.certificate.statements)


def left_dense_table(layers: Iterable[LayerRecord]) -> Table:
    """Returns layers that are dense by choice, counted by reason."""
    return _reasons_table([(x.facts.reason or "", x.bytes_after, None) for x in layers], "layers")


def skipped_table(skipped: Iterable[SkippedTensor]) -> Table:
    """Returns tensors that are not compressible, counted by reason."""
    return _reasons_table([(x.reason, x.bytes, x.share) for x in skipped], "tensors")


def _reasons_table(items: Sequence[tuple[str, int, float | None]], what: str) -> Table:
    """Returns one row per reason.

    Args:
        items: reason, bytes, and share of the checkpoint if it is known.
        what: heading of the count.
    """
    groups: dict[str, list[tuple[str, int, float | None]]] = {}
    for item in items:
        groups.setdefault(item[0], []).append(item)
    columns: list[Column] = [
        ("reason", "l", lambda group: group[0]),
        (what, "r", lambda group: count(len(group[1]))),
        ("bytes", "r", lambda group: byte_size(sum(item[1] for item in group[1]))),
        ("share of checkpoint", "r", lambda group: percent(_sum_or_none(x[2] for x in group[1]))),
    ]
    return make_table(columns, groups.items())


def _sum_or_none(values: Iterable[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return sum(found) if found else None


def provenance_table(record: Record) -> Table:
    """Returns versions, hardware, seed, hashes and the data that were drawn."""
    facts, sequential = record.provenance, record.sequential
    device = " ".join(filter(None, (facts.device, facts.device_name)))
    pairs = [
        ("lrc", facts.lrc_version),
        ("Python", f"{facts.python} on {facts.platform}"),
        *facts.packages.items(),
        ("device", device),
        ("activations", facts.activation_dtype),
        ("seed", str(facts.seed)),
        ("sequential fitting", f"{'on' if sequential.used else 'off'}: {sequential.reason}"),
        ("held back from it", f"{count(sequential.held_back)} calibration sequences"),
        ("total time", duration(sum(record.timing.values()))),
        ("sha256 of the config", facts.config_sha256),
        *((f"sha256 of source {k}", v) for k, v in facts.checkpoint_sha256.items()),
        *((f"sha256 of data {k}", v) for k, v in facts.data_files_sha256.items()),
        *((f"{name} data", _sequences(drawn)) for name, drawn in facts.sequences.items()),
        *(
            (f"{name} text", f"tokens stand for {percent(1 - found.unread)} of its characters")
            for name, found in facts.data.items()
            if found.unread is not None
        ),
        *((f"evaluation data {r.text}", f"sha256 {r.sha256}") for r in record.quality),
    ]
    columns: list[Column] = [("", "l", lambda pair: pair[0]), ("", "l", lambda pair: pair[1])]
    return make_table(columns, pairs)


def _sequences(drawn: DrawnSequences) -> str:
    return (
        f"{count(drawn.num_sequences)} of {count(drawn.population)} sequences"
        f"{_passages(drawn.one_in)}, {count(drawn.num_tokens)} tokens, sha256 {drawn.sha256}"
    )
