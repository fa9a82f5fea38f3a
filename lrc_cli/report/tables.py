"""The tables of the card and of the page, as plain text."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lrc_cli.quality.sentences import rounded_up, title
from lrc_cli.report.facts import Report, kept, perplexity_ratio
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
"""Heading, "l" or "r" for the alignment, and what a row's cell says."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Plain text in rows and columns; whoever renders it escapes it."""

    head: tuple[str, ...]
    """Headings, one per column."""
    align: str
    """One "l" or "r" per column."""
    rows: tuple[tuple[str, ...], ...]
    """Cells."""


def make_table(columns: Sequence[Column], items: Iterable[Any]) -> Table:
    """One row per item; a column in which no row has anything to say is left out."""
    items = list(items)
    cells = [[text(item) for item in items] for _, _, text in columns]
    kept = [i for i, column in enumerate(cells) if any(cell != EMPTY for cell in column)]
    return Table(
        head=tuple(columns[i][0] for i in kept),
        align="".join(columns[i][1] for i in kept),
        rows=tuple(zip(*(cells[i] for i in kept), strict=True)),
    )


def size_table(report: Report) -> Table:
    """Bytes and parameters before and after, with the names of the three ratios."""
    size = report["size"]
    rows = [
        ("compressible weights, bytes", "compressible_bytes", "kept_compressible"),
        ("all tensors, bytes", "checkpoint_bytes", "kept_checkpoint"),
        ("all tensors, parameters", "parameters", "kept_parameters"),
    ]
    columns: list[Column] = [
        ("", "l", lambda row: row[0]),
        ("before", "r", lambda row: count(size[row[1]]["before"])),
        ("after", "r", lambda row: count(size[row[1]]["after"])),
        ("kept", "r", lambda row: percent(size[row[2]])),
        ("name in report.json", "l", lambda row: row[2]),
    ]
    return make_table(columns, rows)


def quality_table(report: Report) -> Table:
    """One row per evaluation text."""
    columns: list[Column] = [
        ("text", "l", lambda row: row["text"]),
        ("perplexity before", "r", lambda row: perplexity(row.get("perplexity_before"))),
        ("after", "r", lambda row: perplexity(row.get("perplexity_after"))),
        ("after / before", "r", lambda row: factor(perplexity_ratio(row))),
        ("relative output error", "r", lambda row: small(row.get("relative_output_error"))),
        ("KL divergence, nats", "r", lambda row: small(row.get("kl"))),
        ("top-1 agreement", "r", lambda row: percent(row.get("top1_agreement"))),
        ("sequences", "r", _drawn),
        ("scored positions", "r", lambda row: count(row.get("num_scored"))),
    ]
    return make_table(columns, report["quality"])


def gates_table(report: Report) -> Table:
    """One row per gate."""
    columns: list[Column] = [
        ("gate", "l", lambda gate: gate["name"]),
        ("limit", "r", lambda gate: f"{gate['limit']:g}"),
        ("measured", "r", lambda gate: small(gate["measured"])),
        ("where", "l", lambda gate: gate["where"] or EMPTY),
        ("", "l", lambda gate: "met" if gate["met"] else "missed"),
        ("note", "l", lambda gate: gate["reason"] or EMPTY),
    ]
    return make_table(columns, report.get("gates", ()))


def _drawn(row: dict[str, Any]) -> str:
    if row.get("population") is None:
        return count(row.get("num_sequences"))
    return f"{count(row['num_sequences'])} of {count(row['population'])}"


def layer_table(report: Report) -> Table:
    """One row per compressible layer, in the network's order."""

    def error(layer: dict[str, Any], kind: str, of: str) -> str:
        found = layer.get("errors", {}).get(kind, {})
        return layer_error(found.get(of), found.get("floor", 0.0))

    def gap(layer: dict[str, Any], kind: str) -> str:
        found = layer.get("errors", {}).get(kind, {})
        return error_gap(found.get("stored"), found.get("optimum"), found.get("floor", 0.0))

    columns: list[Column] = [
        ("layer", "l", lambda x: x["name"]),
        ("kind", "l", lambda x: x["kind"]),
        ("shape", "r", lambda x: " x ".join(map(str, x["shape"]))),
        ("method", "l", lambda x: x["method"]),
        ("storage", "l", lambda x: "dense, fell back" if x["fallback"] else x["storage"]),
        ("rank", "r", lambda x: count(x.get("rank"))),
        ("before", "r", lambda x: byte_size(x["bytes_before"])),
        ("after", "r", lambda x: byte_size(x["bytes_after"])),
        ("kept", "r", lambda x: percent(kept(x))),
        ("output error", "r", lambda x: error(x, "output", "stored")),
        ("its optimum", "r", lambda x: error(x, "output", "optimum")),
        ("gap", "r", lambda x: gap(x, "output")),
        ("plain SVD", "r", lambda x: error(x, "output", "svd")),
        ("metric error", "r", lambda x: error(x, "metric", "stored")),
        ("its optimum", "r", lambda x: error(x, "metric", "optimum")),
        ("gap", "r", lambda x: gap(x, "metric")),
        ("plain SVD", "r", lambda x: error(x, "metric", "svd")),
        ("why", "l", lambda x: x.get("reason") or EMPTY),
    ]
    return make_table(columns, report["layers"])


def held_out_table(report: Report) -> Table:
    """One row per layer that was measured on certification data; see `held_out_note`."""

    def error(kind: str) -> Callable[[Any], str]:
        return lambda layer: small(layer["errors"]["held_out"][kind])

    layers = [x for x in report["layers"] if "held_out" in x.get("errors", {})]
    columns: list[Column] = [
        ("layer", "l", lambda x: x["name"]),
        ("inherited", "r", error("inherited")),
        ("new", "r", error("new")),
        ("deployed", "r", error("deployed")),
        ("on the dense inputs", "r", error("same_input")),
        ("worst sequence", "r", error("worst_sequence")),
        ("tolerance", "r", error("tolerance")),
    ]
    return make_table(columns, layers)


def certificate_table(report: Report) -> Table:
    """One row per statement of the certificate."""

    def bound(statement: dict[str, Any]) -> str:
        if statement["bound"] is None:
            return f"{statement['status']}: {count(statement['num_needed'])} needed"
        return rounded_up(statement["bound"])

    columns: list[Column] = [
        ("statement", "l", title),
        ("bound", "r", bound),
        ("unit", "l", lambda s: s["unit"]),
        ("in the sample", "r", lambda s: small(s["observed"])),
        ("worst in the sample", "r", lambda s: small(s["worst"])),
        ("order", "r", lambda s: count(s["order"])),
        ("clipped at", "r", lambda s: small(s["clip"][1] if s["clip"] else None)),
        ("delta", "r", lambda s: small(s["delta"])),
    ]
    return make_table(columns, report["certificate"]["statements"])


def reasons_table(items: Iterable[dict[str, Any]], what: str, size: str) -> Table:
    """Layers or tensors counted by reason.

    Args:
        what: heading of the count.
        size: the key of an item's bytes.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for item in items:
        groups.setdefault(item["reason"], []).append(item)
    columns: list[Column] = [
        ("reason", "l", lambda group: group[0]),
        (what, "r", lambda group: count(len(group[1]))),
        ("bytes", "r", lambda group: byte_size(sum(item[size] for item in group[1]))),
        (
            "share of checkpoint",
            "r",
            lambda group: percent(_sum_or_none(item.get("share") for item in group[1])),
        ),
    ]
    return make_table(columns, groups.items())


def _sum_or_none(values: Iterable[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return sum(found) if found else None


def provenance_table(report: Report) -> Table:
    """Versions, hardware, seed, hashes and the data that were drawn."""
    facts, sequential = report["provenance"], report["sequential"]
    device = " ".join(filter(None, (facts["device"], facts.get("device_name"))))
    pairs = [
        ("lrc", facts["lrc_version"]),
        ("Python", f"{facts['python']} on {facts['platform']}"),
        *facts["packages"].items(),
        ("device", device),
        ("activations", facts["activation_dtype"]),
        ("seed", str(facts["seed"])),
        ("sequential fitting", f"{'on' if sequential['used'] else 'off'}: {sequential['reason']}"),
        ("held back from it", f"{count(sequential['held_back'])} calibration sequences"),
        ("total time", duration(sum(report["timing"].values()))),
        ("sha256 of the config", facts["config_sha256"]),
        *((f"sha256 of source {k}", v) for k, v in facts["checkpoint_sha256"].items()),
        *((f"sha256 of data {k}", v) for k, v in facts["data_files_sha256"].items()),
        *((f"{name} data", _sequences(drawn)) for name, drawn in facts["sequences"].items()),
        *((f"evaluation data {r['text']}", f"sha256 {r['sha256']}") for r in report["quality"]),
    ]
    columns: list[Column] = [("", "l", lambda pair: pair[0]), ("", "l", lambda pair: pair[1])]
    return make_table(columns, pairs)


def _sequences(drawn: dict[str, Any]) -> str:
    return (
        f"{count(drawn['num_sequences'])} of {count(drawn['population'])} sequences,"
        f" {count(drawn['num_tokens'])} tokens, sha256 {drawn['sha256']}"
    )
