"""The certificate becomes words: every sentence is a function of its own figures."""

import math
from decimal import ROUND_CEILING, Decimal

from lrc_cli.quality.certificate_record import CERTIFIED, Certificate, NoCertificate, Statement
from lrc_cli.text import count, small

DIGITS = 4
"""The number of significant digits of a bound."""


def rounded_up(value: float | Decimal) -> str:
    """Returns a bound with four significant digits, never below the value: 0.123412 -> "0.1235"."""
    if not math.isfinite(value) or value == 0:
        return "infinite" if value else "0"
    exact = Decimal(value)
    step = Decimal(1).scaleb(exact.adjusted() - DIGITS + 1)
    return f"{float(exact.quantize(step, rounding=ROUND_CEILING)):.{DIGITS}g}"


def share(value: float) -> str:
    """Returns a share as a percentage without needless digits: 0.95 -> "95 %"."""
    return f"{(Decimal(repr(value)) * 100).normalize():f} %"


DIRECTION = "dense to compressed"
"""The order of both networks in a divergence."""


def statement_text(
    statement: Statement, certificate: Certificate, direction: str = DIRECTION
) -> str:
    """Returns one statement in words.

    Args:
        statement: the statement; its `text` is not looked at.
        certificate: the certificate; its statements are not looked at.
        direction: the words for both networks, in the order of the divergence.
    """
    if statement.status != CERTIFIED:
        return _cannot(statement, certificate)
    start = f"Together with the other statements at {share(certificate.confidence)} confidence"
    if certificate.num_statements == 1:
        start = f"At {share(certificate.confidence)} confidence"
    words = {"mean": _mean, "quantile": _quantile}[statement.kind]
    return f"{start}: {words(statement, certificate, direction)}."


def _cannot(statement: Statement, certificate: Certificate) -> str:
    numbers = f"N = {certificate.num_sequences} < {statement.num_needed} needed"
    if statement.quantity == "layer_error" and statement.layer is None:
        number = count(len(certificate.tolerances))
        return f"cannot certify: {numbers} for a statement on each of the {number} layers as well"
    return f"cannot certify: {numbers}"


def _mean(statement: Statement, certificate: Certificate, direction: str) -> str:
    where = certificate.data.population.description
    assert statement.clip is not None
    low, high = statement.clip
    evidence = f"{_drawn(certificate)}, whose mean is {small(statement.observed)}"
    if statement.quantity != "top1_disagreement":
        limits = f"above {high:.6g} count as {high:.6g}"
        if low < 0:
            limits += f" and below {low:.6g} as {low:.6g}"
        evidence += f"; values {limits}, {statement.num_clipped} of them did"
    name, value = _name(statement, certificate, direction), _value(statement)
    return f"over {where}, {name} is on average at most {value} ({evidence})"


def _quantile(statement: Statement, certificate: Certificate, direction: str) -> str:
    most = f"for at least {share(certificate.quantile)} of"
    where = certificate.data.population.description
    assert statement.order is not None
    order = f"the {_ordinal(statement.order)} smallest value"
    if statement.order == certificate.num_sequences:
        order = "the largest value"
    evidence = f"({_drawn(certificate)}, {order})"
    return f"{most} {where}, {_claim(statement, certificate, direction)} {evidence}"


def _claim(statement: Statement, certificate: Certificate, direction: str) -> str:
    value = _value(statement)
    if statement.quantity == "all_layers":
        number = len(certificate.tolerances)
        every = (
            "the one factorised layer" if number == 1 else f"every one of {count(number)} layers"
        )
        chosen = certificate.data.selection.num_sequences
        sizes = certificate.tolerances.values()
        return (
            f"{every} has an output error of at most {value} times its tolerance, its largest error"
            f" on {count(chosen)} calibration sequences ({small(min(sizes))} to"
            f" {small(max(sizes))})"
        )
    return f"{_name(statement, certificate, direction)} is at most {value}"


def _name(statement: Statement, certificate: Certificate, direction: str) -> str:
    """Returns what is measured on one sequence."""
    what, unit = certificate.data.predictions, _unit(certificate)
    return {
        "kl": f"the KL divergence of the {what} ({direction}), averaged over the {unit},",
        "top1_disagreement": f"the share of the {unit}'s {what} whose most likely outcome changes",
        "loss_difference": f"the increase of the loss of the {what}, averaged over the {unit},",
        "relative_output_error": "the error of the network's output relative to its norm",
        "layer_error": f"the output error of {statement.layer}",
    }[statement.quantity]


def _value(statement: Statement) -> str:
    assert statement.bound is not None
    if statement.quantity == "top1_disagreement":
        return f"{rounded_up(Decimal(statement.bound) * 100)} %"
    unit = statement.unit
    return rounded_up(statement.bound) + (f" {unit}" if unit.startswith("nats") else "")


def _drawn(certificate: Certificate) -> str:
    number = count(certificate.num_sequences)
    return f"{number} {_unit(certificate)}s drawn without replacement"


def _unit(certificate: Certificate) -> str:
    return "row" if certificate.data.sequence_length is None else "block"


def _ordinal(number: int) -> str:
    ends = {1: "st", 2: "nd", 3: "rd"}
    end = "th" if number % 100 in (11, 12, 13) else ends.get(number % 10, "th")
    return f"{count(number)}{end}"


def main_statements(certificate: Certificate | NoCertificate) -> list[str]:
    """Returns the sentences about the whole network; one more says if layers have their own."""
    statements = certificate.statements
    lines = [s.text for s in statements if s.layer is None and s.status == CERTIFIED]
    missing = [s for s in statements if s.layer is None and s.status != CERTIFIED]
    lines += [f"{title(s)}: {s.text}." for s in missing]
    number = sum(s.layer is not None for s in statements)
    if number:
        lines.append(f"Each of {count(number)} layers has a statement of its own, in report.html.")
    return lines


def title(statement: Statement) -> str:
    """Returns what a statement is about, in a few words."""
    names = {
        "kl": "KL divergence",
        "top1_disagreement": "changed predictions",
        "loss_difference": "increase of the loss",
        "relative_output_error": "relative output error",
        "all_layers": "all layers at once, error / tolerance",
        "layer_error": statement.layer or "single layers",
    }
    return f"{names[statement.quantity]}, {statement.kind}"


def assumptions(certificate: Certificate) -> tuple[str, ...]:
    """Returns what the statements rest on, in sentences, without a look at the statements."""
    confidence = share(certificate.confidence)
    selection = certificate.data.selection
    lines = [
        f"The probability, {confidence} for all {count(certificate.num_statements)} statements"
        " together, is over the random draw of the certification data and over nothing else: the"
        " draw, a permutation by a seed, must not have been chosen by its outcome.",
        "The population is finite and named; its members were drawn uniformly without replacement."
        " Nothing is assumed of how values are distributed, or of the tokens within a sequence.",
        "Nothing was fitted to or chosen on the certification data. Tolerances and clipping limits"
        f" come from {count(selection.num_sequences)} {selection.purpose} sequences"
        f" ({count(selection.num_tokens)} tokens or rows).",
        "Everything was measured with the weights as written, read back from the files, and with"
        f" activations in {certificate.data.activation_dtype}.",
    ]
    if certificate.tolerances:
        lines.append(
            "A layer's output error is ||(W - Z) x|| / ||W x|| over a sequence, x its inputs in the"
            " dense network; of a layer fitted sequentially it is ||W x - Z x~|| / ||W x||, x~ its"
            " inputs in the compressed network. It counts as 2^24 at most."
        )
    if certificate.data.not_covered:
        names = ", ".join(certificate.data.not_covered[:3])
        more = len(certificate.data.not_covered) - 3
        names += f" and {count(more)} more" if more > 0 else ""
        lines.append(
            f"No statement covers {names}: their tokens could not be followed by sequence through"
            " both networks."
        )
    return tuple(lines)


def not_promised(certificate: Certificate) -> list[str]:
    """Returns what the statements do not say, in sentences; for a certificate that has some."""
    return [
        f"The certificate speaks of {certificate.data.population.description} and of nothing else:"
        " not of other texts, languages or tasks, and not of data that change over time.",
        f"Its unit is one {certificate.data.unit}: a share of them may exceed a bound, and single"
        " tokens may exceed any.",
        "It holds for the weights as stored and for the precision they were measured in, not after"
        " another conversion, quantisation or training.",
    ]
