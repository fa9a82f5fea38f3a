"""The card and the page say these facts in plain words, derived from the report."""

import math
from collections.abc import Mapping
from typing import Any

from lrc_cli.config import plain_values
from lrc_cli.quality.certificate_record import NoCertificate
from lrc_cli.quality.records import QualityRow
from lrc_cli.quality.sentences import not_promised
from lrc_cli.report.record import Gate, LayerRecord, Record, Recovery
from lrc_cli.text import byte_size, count, percent


def not_as_asked(record: Record) -> list[LayerRecord]:
    """Returns the layers that --strict minds.

    A layer counts if it fell back, or if its sequential solve failed and it was fitted plainly
    instead.
    """
    return [x for x in record.layers if x.facts.fallback or x.facts.sequential_failed]


def settings(record: Record) -> Mapping[str, Any]:
    """Returns the resolved config, parsed."""
    parsed: Mapping[str, Any] = plain_values(record.provenance.config, "provenance.config")
    return parsed


def summary(record: Record) -> str:
    """Returns what was done, in two sentences."""
    size, target = record.size, record.target
    of = {"compressible": "the compressible weights", "checkpoint": "the whole checkpoint"}
    aim = f"{target.name} {target.value:g}"
    if target.name == "size":
        aim += f" of {of.get(target.of or '', target.of)}"
    if target.name == "threshold":
        aim += " of each layer's largest singular value"
    loss = ""
    if record.method == "curvature" and record.loss:
        loss = f" of the {record.loss.description}"
    center = settings(record).get("compression", {}).get("center", False)
    bias = " and a bias fitted with them" if center else ""
    return (
        f"{len(record.factorised)} of {len(record.layers)} compressible layers are replaced by"
        f" low-rank factors{bias}, fitted with the method {record.method}{loss}"
        f" ({record.allocation} allocation, target: {aim})."
        f" The compressible weights keep {percent(size.kept_compressible)} of their bytes,"
        f" the whole checkpoint {percent(size.kept_checkpoint)}."
    )


def stored_dtypes(record: Record) -> str:
    """Returns the dtypes of the compressible weights as written."""
    return ", ".join(sorted({layer.dtype for layer in record.layers}))


def measured_in(record: Record) -> str:
    """Returns the precision in which the quality was measured."""
    dtypes = stored_dtypes(record) or "the stored dtype"
    activations = record.provenance.activation_dtype
    return f"Measured with the weights as stored ({dtypes}); activations computed in {activations}."


def perplexity_ratio(row: QualityRow) -> float | None:
    """Returns after / before from the losses, which stay finite where a perplexity does not."""
    rise = row.scores.loss_increase
    if rise is None:
        return None
    return math.exp(rise) if rise < 700 else math.inf


def kept(layer: LayerRecord) -> float:
    """Returns bytes after / before of one layer."""
    return layer.bytes_after / layer.bytes_before if layer.bytes_before else 1.0


def error_note(record: Record) -> str:
    """Returns what the errors of the layer table are, in words; empty without factorised layers."""
    errors = record.errors
    if not errors:
        return ""
    words = {
        "white": "white inputs (no calibration data was used)",
        "compressed": "the compressed network's inputs (||W X - Z X~|| / ||W X||, calibration"
        " sequences that were held back excepted)",
    }
    kinds = sorted({error.output.inputs for error in errors})
    inputs = " or ".join(words.get(kind, f"{kind} inputs") for kind in kinds)
    units = " / ".join(sorted({error.metric.unit for error in errors}))
    return (
        f"Output error: ||(W - Z) X|| / ||W X|| on {inputs}, of the stored factors, of the best"
        " matrix of that rank and of plain SVD of that rank. Metric error: what the method"
        f" minimises ({units}), of the same three.{_trained(record)}{_thresholds(record)}"
    )


def _trained(record: Record) -> str:
    """Returns why a trained layer's own error may be large, in a sentence."""
    if not any(layer.facts.trained for layer in record.factorised):
        return ""
    windows = record.recovery.windows if record.recovery is not None else None
    what = (
        "all these layers were trained together, to lower the error of the whole network"
        if windows is None
        else "layers in one block were trained together, to lower the error of the block's output"
    )
    return (
        f" The factors of {what}. A layer's own error may lie far above the best of its rank, which"
        " is no fault: the layers make up for one another. Changes of biases are no part of these"
        " errors."
    )


def recovery_note(record: Record) -> str:
    """Returns what training the factors gave, in words; empty where nothing was trained."""
    found = record.recovery
    if found is None:
        return ""
    data = f"{count(found.num_sequences)} sequences ({count(found.tokens)} tokens, repeated ones"
    data += f" included, in {count(found.steps)} of {count(found.planned_steps)} steps)"
    judged = f"{count(found.num_held_out)} other sequences"
    if found.num_left_out:
        data += f"; {count(found.num_left_out)} more equal one that is held out, certified or"
        data += " evaluated on, and were left out"
    norms = " and all norms" if found.norms else ""
    if found.windows is not None:
        return f"{_windows_note(found)} {_outcome(found, norms, data, judged)}"
    return _outcome(found, norms, data, judged)


def _outcome(found: Recovery, norms: str, data: str, judged: str) -> str:
    if not found.gained:
        return (
            f"Training the factors on {data} did not lower the {found.objective}, on {judged}:"
            " the factors are written as they were fitted."
        )
    return (
        f"The factors{norms} were trained on {data}. The {found.objective}, fell from"
        f" {found.before:.4g} to {found.after:.4g} on {judged}."
    )


def _windows_note(found: Recovery) -> str:
    """Returns how many windows came closer to the original, in a sentence."""
    windows = found.windows or ()
    gained = [x for x in windows if x.gained]
    note = (
        f"One window of blocks after the other was trained for the original's outputs, of which"
        f" {count(len(gained))} of {count(len(windows))} gained."
    )
    if gained:
        best = max(gained, key=lambda window: window.before - window.after)
        note += (
            f" The squared error of {best.blocks[-1]}, relative to its square, fell most, from"
            f" {best.before:.3g} to {best.after:.3g}."
        )
    return note


def _thresholds(record: Record) -> str:
    """Returns where nuclear cut, in a sentence."""
    found = [x.facts.threshold_share for x in record.factorised]
    shares = [share for share in found if share is not None]
    if not shares:
        return ""
    least, most = f"{min(shares):.3g}", f"{max(shares):.3g}"
    span = least if least == most else f"{least} to {most}"
    return f" Thresholds l: {span} of the largest singular value of each layer's outputs."


def held_out_note(record: Record) -> str:
    """Returns what the errors on certification data are, in words; empty where there are none."""
    found = [layer.facts.held_out for layer in record.layers]
    numbers = {errors.num_sequences for errors in found if errors is not None}
    if not numbers:
        return ""
    return (
        f"Over {', '.join(map(count, sorted(numbers)))} certification sequences, relative to"
        " ||W X||: inherited, ||W X - W X~||, came from the layers before; new, ||(W - Z) X~||, is"
        " what the layer's own factors add; deployed, ||W X - Z X~||, is what the layer is off in"
        " the compressed network, at most the sum of both. On the dense inputs: ||(W - Z) X||."
        " Worst sequence and tolerance: the error that the certificate speaks of, at its largest on"
        " one certification sequence and on one selection sequence."
    )


def loss_estimate(record: Record) -> str:
    """Returns predicted and measured loss increase in words; empty without a prediction."""
    metrics = [errors.metric for errors in record.errors]
    rises = [(row.scores.loss_increase, row.text) for row in record.quality]
    measured = [f"{rise:+.3g} on {text}" for rise, text in rises if rise is not None]
    methods = {layer.method for layer in record.factorised}
    # Other losses have other units than the perplexity's loss, and other methods other metrics.
    if methods != {"curvature"} or record.loss is None or record.loss.kind != "next_token":
        return ""
    # The errors of sequential fits hold what they inherit; a sum would count it many times.
    if any(metric.inherited is not None for metric in metrics):
        return ""
    total = sum(metric.stored for metric in metrics)
    text = f"The layers' estimated loss increases add up to {total:.3g} nats per token"
    return f"{text}; measured: {', '.join(measured)}." if measured else f"{text}."


def memory_note(record: Record) -> str:
    """Returns peak memory in words."""
    names = {
        "host_resident": "resident on the host, pages of mapped files included",
        "gpu_allocated": "allocated on the GPU",
    }
    peaks = [f"{byte_size(n)} {names.get(key, key)}" for key, n in record.memory.items()]
    return f"Peak memory: {'; '.join(peaks)}." if peaks else ""


def limits(record: Record) -> list[str]:
    """Returns what the figures do not promise, in sentences."""
    certificate = record.certificate
    if isinstance(certificate, NoCertificate):
        note = certificate.note or "none was asked for"
        first = [f"There is no certificate ({note}): no figure is a guarantee."]
    else:
        first = not_promised(certificate)
    return [
        *first,
        "The layer errors belong to the calibration data, or to white inputs where none was used:"
        " they bound nothing on other data.",
        "Quality was measured on the evaluation data only, with activations in"
        f" {record.provenance.activation_dtype}; other data, tasks, languages and precisions"
        " may suffer more.",
        "Whether a factorised layer is faster than the dense one depends on its size and on the"
        " hardware.",
    ]


def layers_fell_back(record: Record) -> str:
    """Returns how many layers fell back, with the verb."""
    number = len(record.fallen_back)
    return f"{number} layer{'' if number == 1 else 's'} fell back to dense"


def missed_gates(record: Record) -> list[str]:
    """Returns the gates that are missed, each in words."""
    return [gate_missed(gate) for gate in record.gates if not gate.met]


def gate_missed(gate: Gate) -> str:
    """Returns one missed gate in words."""
    limit = f"gates.{gate.name}: {gate.limit:g} is missed"
    if gate.measured is None:
        return f"{limit}: {gate.reason}"
    rest = f" ({gate.reason})" if gate.reason else ""
    return f"{limit}: {gate.measured:.6g} on {gate.where}{rest}"
