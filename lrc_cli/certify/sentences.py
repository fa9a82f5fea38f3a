"""The certificate of a copy becomes words: every sentence follows from the record alone."""

import re

from lrc_cli.certify.record import CopyRecord, WorstSequence
from lrc_cli.quality.certificate_record import CERTIFIED, Certificate, NoCertificate, Statement
from lrc_cli.quality.sentences import main_statements, not_promised, rounded_up, share, title
from lrc_cli.text import count

NO_PROOF = (
    "A flag is no proof that a copy is bad, and its absence is no proof that a copy is good: it"
    " says where to look."
)
ON_PURPOSE = (
    "Rounding to the nearest level moves a weight by half a step at most; rounding as GPTQ does it"
    " moves weights farther on purpose, so that the outputs move less."
)
MAIN = ("kl", "relative_output_error")
"""The quantities whose mean the badge shows, the first that there is."""


def kind_of(name: str) -> str:
    """Returns a tensor's kind: its name without the numbers of layers."""
    return re.sub(r"\d+", "*", name)


def arithmetic_sentences(device: str, dtype: str, form: str) -> tuple[str, ...]:
    """Returns what a reader must know of the arithmetic that was run.

    Args:
        device: the kind of device.
        dtype: the dtype of activations.
        form: how the copy's weights are stored.
    """
    lines = [
        f"Both networks ran on {device} with activations in {dtype}, through transformers or the"
        " factory; another device, kernel or dtype computes other numbers.",
    ]
    if form not in ("dense", "low-rank factors of lrc"):
        lines.append(
            f"The copy's weights ({form}) were multiplied out before the run: this is not the"
            " arithmetic of a kernel that computes with the stored numbers."
        )
    return tuple(lines)


def worst_sequences(certificate: Certificate | NoCertificate) -> tuple[WorstSequence, ...]:
    """Returns the drawn sequence on which each quantity is largest; the first of several."""
    if isinstance(certificate, NoCertificate):
        return ()
    found = []
    for quantity, values in certificate.values.quantities.items():
        value = max(values)
        found.append(WorstSequence(quantity=quantity, value=value, index=values.index(value)))
    return tuple(found)


def summary(record: CopyRecord) -> str:
    """Returns what the certificate is about, in a sentence."""
    certificate = record.certificate
    names = f"{record.other.name} ({record.other.form}) was compared with {record.original.name}"
    if isinstance(certificate, NoCertificate):
        return f"{names}; there is no certificate: {certificate.note}."
    where = certificate.data.population.description
    drawn = count(certificate.num_sequences)
    return f"{names} on {drawn} sequences, drawn at random from {where}."


def statements(record: CopyRecord) -> list[str]:
    """Returns every statement in words, or why there is none."""
    if isinstance(record.certificate, NoCertificate):
        return [f"There is no certificate: {record.certificate.note}."]
    return main_statements(record.certificate)


def limits(record: CopyRecord) -> list[str]:
    """Returns what the figures do not promise, in sentences."""
    certificate = record.certificate
    if isinstance(certificate, NoCertificate):
        first = ["No figure is a guarantee."]
    else:
        first = not_promised(certificate)
    on_grid = any(tensor.grid is not None for tensor in record.weights.tensors)
    return [*first, *record.arithmetic.sentences, NO_PROOF, *([ON_PURPOSE] if on_grid else [])]


def main_statement(record: CopyRecord) -> Statement | None:
    """Returns the mean that the badge shows; None where none is certified."""
    by_id = {s.id: s for s in record.certificate.statements if s.status == CERTIFIED}
    found = (by_id.get(f"{quantity}.mean") for quantity in MAIN)
    return next((statement for statement in found if statement is not None), None)


def badge_text(record: CopyRecord) -> str:
    """Returns what the badge says: the main bound and its confidence, misses and flags."""
    missed = sum(not gate.met for gate in record.gates)
    if missed:
        return f"{missed} gate{'' if missed == 1 else 's'} missed"
    statement = main_statement(record)
    if statement is None or statement.bound is None:
        return "not certified"
    assert isinstance(record.certificate, Certificate)
    name = {"kl": "mean KL", "relative_output_error": "mean error"}[statement.quantity]
    bound = f"{name} at most {rounded_up(statement.bound)}"
    flags = len(record.weights.flags)
    more = f", {flags} flag{'' if flags == 1 else 's'}" if flags else ""
    return f"{bound} ({share(record.certificate.confidence)}){more}"


def worst_sentences(record: CopyRecord) -> list[str]:
    """Returns the worst of the drawn sequences, in words."""
    if isinstance(record.certificate, NoCertificate):
        return []
    titles = {s.quantity: title(s).rpartition(",")[0] for s in record.certificate.statements}
    return [
        f"{titles[x.quantity]}: {x.value:.6g} on sequence {count(x.index)} of the draw."
        for x in record.worst
    ]
