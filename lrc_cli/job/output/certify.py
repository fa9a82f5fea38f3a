"""The written network is measured on held-out sequences, and its certificate is made.

The order matters. Calibration sequences fix tolerances and clipping limits before any certification
sequence is looked at.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from lrc_cli.data.draw import Sequences
from lrc_cli.data.purposes import CALIBRATION, CERTIFICATION, RECOVER, purposes_of
from lrc_cli.execution.losses import Loss
from lrc_cli.execution.network import Network
from lrc_cli.execution.walk import Keep
from lrc_cli.job.plan import Plan
from lrc_cli.job.recover.model import split
from lrc_cli.job.recover.scope import training_data
from lrc_cli.network.layer import Layer
from lrc_cli.quality.certificate import (
    NO_SEQUENCES,
    NOT_ASKED,
    Values,
    clips_of,
    make_certificate,
    tolerances_of,
)
from lrc_cli.quality.certificate_record import Certificate, CertificateData, NoCertificate
from lrc_cli.quality.compare import scoring
from lrc_cli.quality.drawn import certificate_data, first_sequences
from lrc_cli.quality.held_out import ERRORS, LayerErrors, Measured, measure
from lrc_cli.report.record import HeldOutErrors, LayerFacts
from lrc_cli.runtime.progress import Progress, Seconds

Facts = Mapping[str, LayerFacts]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Certified:
    """The outcome of the measurements on held-out sequences."""

    certificate: Certificate | NoCertificate
    """The statements, or a note why nothing can be stated."""
    held_out: Mapping[str, HeldOutErrors] = dataclasses.field(default_factory=dict)
    """The errors of every layer that could be measured, by name."""
    seconds: Seconds = dataclasses.field(default_factory=dict)
    """The seconds of the measurements, by phase."""


def certify(
    plan: Plan, network: Network, facts: Facts, keep: Keep, progress: Progress
) -> Certified:
    """Measures the written network on held-out sequences and states what follows.

    Args:
        network: the written network, opened again.
        facts: the facts of every layer, by name.
        keep: where hidden states stay between segments; see `HostMemory.keep`.

    Raises:
        RunError: a network's outputs are not finite.
    """
    if plan.config.certification is None:
        return Certified(certificate=NoCertificate(note=NOT_ASKED))
    if CERTIFICATION not in plan.sequences:
        return Certified(certificate=NoCertificate(note=NO_SEQUENCES))
    loss = scoring(plan.network, next(plan.sequences[CALIBRATION].batches(1)), plan.tokenizer)
    chosen = selection_of(plan, trained=any(x.trained for x in facts.values()))
    selection, took = _measure(plan, network, facts, chosen, loss, keep, progress, "selection")
    drawn = plan.sequences[CERTIFICATION]
    found, more = _measure(plan, network, facts, drawn, loss, keep, progress, CERTIFICATION)
    seconds = took | more
    errors = _errors(found, facts)
    tolerances = tolerances_of(_errors(selection, facts))
    tolerances = {name: t for name, t in tolerances.items() if name in errors}
    by_layer = {
        name: held_out(found.layers[name], tolerance, max(errors[name]))
        for name, tolerance in tolerances.items()
    }
    if not found.values and not tolerances:
        note = "none could be issued: nothing could be measured by sequence"
        return Certified(certificate=NoCertificate(note=note), held_out=by_layer, seconds=seconds)
    not_covered = [x.name for x in _factorised(plan, facts) if x.name not in tolerances]
    certificate = make_certificate(
        found.values,
        {name: errors[name] for name in tolerances},
        clips=clips_of(selection.values),
        tolerances=tolerances,
        confidence=plan.config.certification.confidence,
        quantile=plan.config.certification.quantile,
        data=_data(plan, drawn, chosen, loss, not_covered),
    )
    return Certified(certificate=certificate, held_out=by_layer, seconds=seconds)


def held_out(errors: LayerErrors, tolerance: float, worst: float) -> HeldOutErrors:
    """Returns a layer's `errors.held_out` (C3): over all sequences together, relative to ||W x||.

    Args:
        tolerance: the error that one sequence may have, fixed on selection data.
        worst: the layer's largest error on one certification sequence.
    """
    return HeldOutErrors(
        **{kind: errors.overall(kind) for kind in ERRORS},
        worst_sequence=worst,
        tolerance=tolerance,
        num_sequences=len(errors.energy),
    )


def selection_of(plan: Plan, *, trained: bool) -> Sequences:
    """Returns the first calibration sequences, with texts as long as in certification.

    Limits are for one certification sequence, and values of longer sequences vary less. On
    sequences that were trained on, values would be too low to be a scale, so the sequences held
    out from the training take their place.

    Args:
        trained: whether factors were trained.
    """
    drawn, whole = plan.sequences[CERTIFICATION], plan.sequences[CALIBRATION]
    if trained and RECOVER not in plan.sequences:
        _, whole = split(training_data(plan))
    return first_sequences(whole, drawn)


def _measure(
    plan: Plan,
    network: Network,
    facts: Facts,
    sequences: Sequences,
    loss: Loss,
    keep: Keep,
    progress: Progress,
    name: str,
) -> tuple[Measured, Seconds]:
    """Measures the network on sequences. Returns the outcome, and the seconds by phase."""
    with progress.phase(name, len(sequences)) as phase:
        measured = measure(
            plan.network,
            network,
            sequences,
            _factorised(plan, facts),
            loss=loss,
            seed=plan.config.runtime.seed,
            decompose=name == CERTIFICATION,
            advance=phase.advance,
            keep=keep,
            processes=plan.processes,
        )
    return measured, phase.timing


def _factorised(plan: Plan, facts: Facts) -> list[Layer]:
    return [layer for layer in plan.layers if not facts[layer.name].is_dense]


def _errors(measured: Measured, facts: Facts) -> Values:
    """Returns {layer: error of each sequence}, on the inputs that the layer was fitted to."""
    kinds = {name: "deployed" if x.sequential else "same_input" for name, x in facts.items()}
    return {name: x.relative(kinds[name]).tolist() for name, x in measured.layers.items()}


def _data(
    plan: Plan, drawn: Sequences, chosen: Sequences, loss: Loss, not_covered: list[str]
) -> CertificateData:
    """Returns what was drawn, from which population, and which data fixed the limits."""
    purpose = next(p for p in purposes_of(plan.config) if p.name == CERTIFICATION)
    hashes = {Path(path): sha256 for path, sha256 in plan.data_hashes.items()}
    return certificate_data(
        purpose,
        drawn,
        dataclasses.replace(chosen, name=CALIBRATION),
        chosen_sha256=plan.sequences[CALIBRATION].sha256,
        file_sha256=hashes[purpose.path],
        loss=loss,
        dtype=plan.network.dtype,
        not_covered=tuple(not_covered),
    )
