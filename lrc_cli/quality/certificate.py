"""Values per sequence become statements that hold together at a confidence (docs/theory.md, C2).

The functions are pure: no networks, no files. The bounds come from engine/bounds.py, the words from
sentences.py. M statements are made at (1 - confidence) / M each, so that by the union bound all of
them hold together with the probability `confidence` over the draw of the sequences.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction

from lrc_cli.engine.bounds import mean_bound, quantile_order, sequences_needed
from lrc_cli.quality.certificate_record import (
    CANNOT,
    CERTIFIED,
    Certificate,
    CertificateData,
    SequenceValues,
    Statement,
)
from lrc_cli.quality.sentences import DIRECTION, assumptions, statement_text

Values = Mapping[str, Sequence[float]]

ALL_LAYERS, LAYER_ERROR = "all_layers", "layer_error"
CLIP_FACTOR = 4.0
"""A mean is bounded after clipping at this factor times the largest value on selection data."""
LEAST_CLIP = 1e-6
LEAST_TOLERANCE = 1e-6
"""The least tolerance.

A layer that was exact on selection data would otherwise make every later error infinite.
"""
UNITS = {
    "kl": "nats",
    "loss_difference": "nats per token",
    "top1_disagreement": "share of predictions",
    "relative_output_error": "relative",
    ALL_LAYERS: "times the layer's tolerance",
    LAYER_ERROR: "relative",
}
NOT_ASKED = "none was asked for: the configuration has no certification section"
NO_SEQUENCES = "none could be issued: no sequence was left for certification"


def clips_of(selection: Values) -> dict[str, float]:
    """Returns each quantity's clipping limit B, from selection data; a share is not clipped."""
    return {
        name: max(LEAST_CLIP, CLIP_FACTOR * max(map(abs, values)))
        for name, values in selection.items()
        if name != "top1_disagreement"
    }


def tolerances_of(selection: Values) -> dict[str, float]:
    """Returns each layer's tolerance: its largest error on selection data."""
    return {name: max(LEAST_TOLERANCE, *values) for name, values in selection.items()}


def make_certificate(
    values: Values,
    layers: Values,
    *,
    clips: Mapping[str, float],
    tolerances: Mapping[str, float],
    confidence: float,
    quantile: float,
    data: CertificateData,
    direction: str = DIRECTION,
) -> Certificate:
    """Returns the `certificate` of report.json.

    Args:
        values: the quantities, with one value per certification sequence in the order of the draw.
        layers: the layers, with their errors likewise; may be empty.
        clips: what `clips_of` returns.
        tolerances: what `tolerances_of` returns for the same layers.
        data: what was drawn and how.
        direction: the words for both networks, in the order of a divergence.

    Returns:
        Statements with their bounds and sentences, and all that they follow from. There is one
        statement per layer only where the sequences suffice for M + L statements.
    """
    quantities = {name: tuple(found) for name, found in values.items()}
    if layers:
        quantities[ALL_LAYERS] = _worst_ratio(layers, tolerances)
    num_sequences = len(next(iter(quantities.values())))
    base = 2 * len(values) + bool(layers)
    risk, population = 1 - confidence, data.population.size
    with_layers = risk / (base + len(layers))
    suffices = quantile_order(num_sequences, quantile, with_layers, population) is not None
    own = {name: tuple(found) for name, found in layers.items()} if suffices else {}
    certificate = Certificate(
        confidence=confidence,
        quantile=quantile,
        num_statements=base + len(own),
        num_sequences=num_sequences,
        data=data,
        tolerances=dict(tolerances),
        clips=dict(clips),
        values=SequenceValues(quantities=quantities, layers=own or None),
        note=None,
        statements=(),
        assumptions=(),
    )
    delta = risk / certificate.num_statements
    statements = list(_statements(certificate, quantities, delta))
    statements += [_quantile(certificate, LAYER_ERROR, x, delta, layer=n) for n, x in own.items()]
    if layers and not own:
        statements.append(_too_many(certificate, with_layers))
    told = tuple(replace(x, text=statement_text(x, certificate, direction)) for x in statements)
    return replace(certificate, statements=told, assumptions=assumptions(certificate))


def _worst_ratio(layers: Values, tolerances: Mapping[str, float]) -> tuple[float, ...]:
    """Returns the largest error / tolerance of any layer, one value and statement per sequence."""
    each = ([error / tolerances[name] for error in found] for name, found in layers.items())
    return tuple(max(ratios) for ratios in zip(*each, strict=True))


def _statements(certificate: Certificate, values: Values, delta: float) -> Iterator[Statement]:
    for quantity, found in values.items():
        if quantity != ALL_LAYERS:
            yield _mean(certificate, quantity, found, delta)
        yield _quantile(certificate, quantity, found, delta)


def _mean(
    certificate: Certificate, quantity: str, values: Sequence[float], delta: float
) -> Statement:
    limit = certificate.clips.get(quantity, 1.0)
    lower = -limit if quantity == "loss_difference" else 0.0
    clipped = [min(max(value, lower), limit) for value in values]
    bound = mean_bound(
        clipped,
        lower=lower,
        upper=limit,
        delta=delta,
        population=certificate.data.population.size,
    )
    return replace(
        _statement(certificate, quantity, "mean", values, delta),
        status=CERTIFIED,
        bound=bound,
        observed=math.fsum(clipped) / len(clipped),
        clip=(lower, limit),
        num_clipped=sum(a != b for a, b in zip(values, clipped, strict=True)),
    )


def _quantile(
    certificate: Certificate,
    quantity: str,
    values: Sequence[float],
    delta: float,
    layer: str | None = None,
) -> Statement:
    share, population = certificate.quantile, certificate.data.population.size
    order = quantile_order(len(values), share, delta, population)
    ordered = sorted(values)
    return replace(
        _statement(certificate, quantity, "quantile", values, delta, layer),
        status=CANNOT if order is None else CERTIFIED,
        bound=None if order is None else ordered[order - 1],
        observed=ordered[math.ceil(Fraction(repr(share)) * len(values)) - 1],
        order=order,
        num_needed=sequences_needed(share, delta),
    )


def _too_many(certificate: Certificate, delta: float) -> Statement:
    """Says that the sequences do not suffice for statements on single layers; claims nothing."""
    statement = _statement(certificate, LAYER_ERROR, "quantile", (), delta)
    return replace(statement, num_needed=sequences_needed(certificate.quantile, delta))


def _statement(
    certificate: Certificate,
    quantity: str,
    kind: str,
    values: Sequence[float],
    delta: float,
    layer: str | None = None,
) -> Statement:
    """Returns a statement that certifies nothing and has no text yet."""
    stem = f"{quantity}.{layer}" if layer is not None else quantity
    per_token = quantity == "kl" and "loss_difference" in certificate.values.quantities
    return Statement(
        id=f"{stem}.{kind}",
        quantity=quantity,
        kind=kind,
        layer=layer,
        status=CANNOT,
        bound=None,
        observed=None,
        worst=max(values, default=None),
        unit=UNITS[quantity] + (" per token" if per_token else ""),
        clip=None,
        num_clipped=0,
        delta=delta,
        order=None,
        num_needed=None,
        text="",
    )
