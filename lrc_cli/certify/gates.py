"""The limits of `gates:` are held against certified bounds and flags; no bound is a miss."""

from collections.abc import Mapping
from dataclasses import fields

from lrc_cli.certify.record import CopyRecord
from lrc_cli.config.certify import CopyGates
from lrc_cli.errors import GateMissed
from lrc_cli.quality.certificate_record import CERTIFIED, Statement
from lrc_cli.report.facts import gate_missed
from lrc_cli.report.record import Gate

FLAGS = "max_flags"
WHERE = "the population"


def check_gates(gates: CopyGates, record: CopyRecord) -> tuple[Gate, ...]:
    """Returns every gate that is set, with what it is held against; ignores the record's own."""
    limits = {f.name: getattr(gates, f.name) for f in fields(gates)}
    statements = {statement_gate(x): x for x in record.certificate.statements}
    return tuple(
        _flags(limit, record) if name == FLAGS else _bound(name, limit, statements, record)
        for name, limit in limits.items()
        if limit is not None
    )


def statement_gate(statement: Statement) -> str:
    """Returns the name of a statement's gate: `kl.mean` -> `max_kl_mean`."""
    return f"max_{statement.quantity}_{statement.kind}"


def _flags(limit: int, record: CopyRecord) -> Gate:
    number = len(record.weights.flags)
    return Gate(
        name=FLAGS,
        limit=limit,
        measured=number,
        where="the weights",
        met=number <= limit,
        reason=None,
    )


def _bound(
    name: str, limit: float, statements: Mapping[str, Statement], record: CopyRecord
) -> Gate:
    statement = statements.get(name)
    if statement is None:
        note = getattr(record.certificate, "note", None)
        reason = f"not certified: {note or 'these networks have no such quantity'}"
        return Gate(name=name, limit=limit, measured=None, where=None, met=False, reason=reason)
    if statement.status != CERTIFIED or statement.bound is None:
        reason = f"not certified: {statement.text}"
        return Gate(name=name, limit=limit, measured=None, where=None, met=False, reason=reason)
    return Gate(
        name=name,
        limit=limit,
        measured=statement.bound,
        where=WHERE,
        met=statement.bound <= limit,
        reason=None,
    )


def missed_gates(record: CopyRecord) -> list[str]:
    """Returns the gates that are missed, each in words."""
    return [gate_missed(gate) for gate in record.gates if not gate.met]


def fail_if_missed(record: CopyRecord) -> None:
    """Raises GateMissed, naming every missed gate."""
    missed = missed_gates(record)
    if missed:
        raise GateMissed("; ".join(missed), "the certificate is there, marked as failed")
