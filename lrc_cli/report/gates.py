"""The limits of `gates:` against what a report measured; a gate that was not measured is missed."""

from typing import Any

from lrc_cli.config import Config, Gates
from lrc_cli.errors import GateMissed, InputError
from lrc_cli.report.facts import factorised, missed_gates, perplexity_ratio

Report = dict[str, Any]
Measured = tuple[float | None, str | None, str | None]
"""The worst figure, where it was found, and what there is to say about it."""


def check_gates_possible(config: Config) -> None:
    """Raise InputError if a gate is set on what the config lets nobody measure."""
    if config.gates.max_perplexity_increase is not None and config.evaluation == ():
        raise InputError(
            "gates.max_perplexity_increase: evaluation is [], so no perplexity is measured",
            "name a text in evaluation, leave it out for held-back blocks, or drop the gate",
        )
    if config.gates.max_layer_error is not None and config.certification is None:
        raise InputError(
            "gates.max_layer_error: there is no certification section to measure it on",
            "add certification, or drop the gate",
        )


def check_gates(gates: Gates, report: Report) -> list[dict[str, Any]]:
    """Every gate that is set, with what was measured.

    Args:
        report: report.json, as far as `quality` and `layers`.

    Returns:
        One entry per gate: `name`, `limit`, `measured` (None: nothing was), `where` (the text or
        the layer with the worst figure), `met`, and `reason` (None, or what there is to add).
    """
    found = []
    if gates.max_perplexity_increase is not None:
        measured = _perplexity_increase(report)
        found.append(_gate("max_perplexity_increase", gates.max_perplexity_increase, measured))
    if gates.max_layer_error is not None:
        found.append(_gate("max_layer_error", gates.max_layer_error, _layer_error(report)))
    return found


def fail_if_missed(*reports: Report) -> None:
    """Raise GateMissed, naming every missed gate of the reports' `gates`."""
    several = len(reports) > 1
    missed = [
        f"{report['target']['name']} {report['target']['value']:g}: {text}" if several else text
        for report in reports
        for text in missed_gates(report)
    ]
    if missed:
        where = "the outputs are there, these" if several else "the output is there,"
        raise GateMissed("; ".join(missed), f"{where} marked as failed")


def _gate(name: str, limit: float, measured: Measured) -> dict[str, Any]:
    value, where, reason = measured
    met = value is not None and value <= limit
    return {
        "name": name,
        "limit": limit,
        "measured": value,
        "where": where,
        "met": met,
        "reason": reason,
    }


def _perplexity_increase(report: Report) -> Measured:
    ratios = [(perplexity_ratio(row), row["text"]) for row in report["quality"]]
    rises = [(ratio - 1, text) for ratio, text in ratios if ratio is not None]
    if not rises:
        why = "no text has a perplexity" if report["quality"] else "there was no evaluation data"
        return None, None, f"not measured: {why}"
    return *max(rises), None


def _layer_error(report: Report) -> Measured:
    layers = factorised(report)
    held_out = [(layer["errors"].get("held_out", {}), layer["name"]) for layer in layers]
    errors = [(of["deployed"], name) for of, name in held_out if of.get("deployed") is not None]
    if not errors:
        reached = "no factorised layer was reached by certification data"
        return None, None, f"not measured: {reached if layers else 'no layer is factorised'}"
    left = len(layers) - len(errors)
    reason = f"{left} factorised layers were not reached by certification data" if left else None
    return *max(errors), reason
