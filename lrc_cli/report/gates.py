"""The limits of `gates:` are held against a report; a gate that was not measured is missed."""

from lrc_cli.config import Config, Gates
from lrc_cli.errors import GateMissed, InputError
from lrc_cli.report.facts import missed_gates, perplexity_ratio
from lrc_cli.report.record import Gate, Record

Measured = tuple[float | None, str | None, str | None]
"""The worst figure, the place where it was found, and what there is to say about it."""


def check_gates_possible(config: Config) -> None:
    """Raises InputError if a gate is set on what the config lets nobody measure."""
    if config.gates.max_perplexity_increase is not None and config.evaluation == ():
        raise InputError(
            "gates.max_perplexity_increase: evaluation is [], so no perplexity is measured",
            "name a text in evaluation, leave it out for held-back sequences, or drop the gate",
        )
    if config.gates.max_layer_error is not None and config.certification is None:
        raise InputError(
            "gates.max_layer_error: there is no certification section to measure it on",
            "add certification, or drop the gate",
        )


def check_gates(gates: Gates, record: Record) -> tuple[Gate, ...]:
    """Returns every gate that is set, with what was measured; ignores the record's own gates."""
    found = []
    if gates.max_perplexity_increase is not None:
        measured = _perplexity_increase(record)
        found.append(_gate("max_perplexity_increase", gates.max_perplexity_increase, measured))
    if gates.max_layer_error is not None:
        found.append(_gate("max_layer_error", gates.max_layer_error, _layer_error(record)))
    return tuple(found)


def fail_if_missed(*records: Record) -> None:
    """Raises GateMissed, naming every missed gate of the records' gates."""
    several = len(records) > 1
    missed = [
        f"{record.target.name} {record.target.value:g}: {text}" if several else text
        for record in records
        for text in missed_gates(record)
    ]
    if missed:
        where = "the outputs are there, these" if several else "the output is there,"
        raise GateMissed("; ".join(missed), f"{where} marked as failed")


def _gate(name: str, limit: float, measured: Measured) -> Gate:
    value, where, reason = measured
    met = value is not None and value <= limit
    return Gate(name=name, limit=limit, measured=value, where=where, met=met, reason=reason)


def _perplexity_increase(record: Record) -> Measured:
    ratios = [(perplexity_ratio(row), row.text) for row in record.quality]
    rises = [(ratio - 1, text) for ratio, text in ratios if ratio is not None]
    if not rises:
        why = "no text has a perplexity" if record.quality else "there was no evaluation data"
        return None, None, f"not measured: {why}"
    return *max(rises), None


def _layer_error(record: Record) -> Measured:
    layers = record.factorised
    held_out = [(layer.facts.held_out, layer.name) for layer in layers]
    errors = [(found.deployed, name) for found, name in held_out if found is not None]
    if not errors:
        reached = "no factorised layer was reached by certification data"
        return None, None, f"not measured: {reached if layers else 'no layer is factorised'}"
    left = len(layers) - len(errors)
    reason = f"{left} factorised layers were not reached by certification data" if left else None
    return *max(errors), reason
