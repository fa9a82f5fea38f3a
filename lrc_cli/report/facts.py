"""What the card and the page both say: derived from the report, in plain words."""

import math
from typing import Any

import yaml

from lrc_cli.quality.sentences import not_promised
from lrc_cli.text import byte_size, count, percent

Report = dict[str, Any]
"""report.json, parsed; see docs/ and `build_report`."""


def factorised(report: Report) -> list[dict[str, Any]]:
    """The layers that were replaced by factors."""
    return [layer for layer in report["layers"] if layer["storage"] != "dense"]


def fallen_back(report: Report) -> list[dict[str, Any]]:
    """The layers that were meant to be factorised and could not be."""
    return [layer for layer in report["layers"] if layer["fallback"]]


def not_as_asked(report: Report) -> list[dict[str, Any]]:
    """The layers that --strict minds: those that fell back, and those whose sequential solve failed
    and that were fitted plainly instead."""
    return [x for x in report["layers"] if x["fallback"] or x.get("sequential_failed")]


def settings(report: Report) -> dict[str, Any]:
    """The resolved config, parsed."""
    parsed: dict[str, Any] = yaml.safe_load(report["provenance"]["config"])
    return parsed


def summary(report: Report) -> str:
    """What was done, in two sentences."""
    size, target = report["size"], report["target"]
    of = {"compressible": "the compressible weights", "checkpoint": "the whole checkpoint"}
    aim = f"{target['name']} {target['value']:g}"
    if target["name"] == "size":
        aim += f" of {of.get(target['of'], target['of'])}"
    if target["name"] == "threshold":
        aim += " of each layer's largest singular value"
    loss = ""
    if report["method"] == "curvature" and report["loss"]:
        loss = f" of the {report['loss']['description']}"
    center = settings(report).get("compression", {}).get("center", False)
    bias = " and a bias fitted with them" if center else ""
    return (
        f"{len(factorised(report))} of {len(report['layers'])} compressible layers are replaced by"
        f" low-rank factors{bias}, fitted with the method {report['method']}{loss}"
        f" ({report['allocation']} allocation, target: {aim})."
        f" The compressible weights keep {percent(size['kept_compressible'])} of their bytes,"
        f" the whole checkpoint {percent(size['kept_checkpoint'])}."
    )


def stored_dtypes(report: Report) -> str:
    """The dtypes of the compressible weights as written."""
    return ", ".join(sorted({layer["dtype"] for layer in report["layers"]}))


def measured_in(report: Report) -> str:
    """In which precision the quality was measured."""
    dtypes = stored_dtypes(report) or "the stored dtype"
    activations = report["provenance"]["activation_dtype"]
    return f"Measured with the weights as stored ({dtypes}); activations computed in {activations}."


def perplexity_ratio(row: dict[str, Any]) -> float | None:
    """After / before, from the losses: these stay finite where a perplexity does not."""
    if row.get("loss_before") is None or row.get("loss_after") is None:
        return None
    difference = row["loss_after"] - row["loss_before"]
    return math.exp(difference) if difference < 700 else math.inf


def kept(layer: dict[str, Any]) -> float:
    """Bytes after / before of one layer."""
    return float(layer["bytes_after"] / layer["bytes_before"]) if layer["bytes_before"] else 1.0


def error_note(report: Report) -> str:
    """What the errors of the layer table are, in words; empty where nothing is factorised."""
    errors = [layer["errors"] for layer in factorised(report)]
    if not errors:
        return ""
    words = {
        "white": "white inputs (no calibration data was used)",
        "compressed": "the compressed network's inputs (||W X - Z X~|| / ||W X||, calibration"
        " sequences that were held back excepted)",
    }
    kinds = sorted({error["output"]["inputs"] for error in errors})
    inputs = " or ".join(words.get(kind, f"{kind} inputs") for kind in kinds)
    units = " / ".join(sorted({error["metric"]["unit"] for error in errors}))
    return (
        f"Output error: ||(W - Z) X|| / ||W X|| on {inputs}, of the stored factors, of the best"
        " matrix of that rank and of plain SVD of that rank. Metric error: what the method"
        f" minimises ({units}), of the same three.{_thresholds(report)}"
    )


def _thresholds(report: Report) -> str:
    """Where nuclear cut, in a sentence."""
    shares = [x["threshold_share"] for x in factorised(report) if "threshold_share" in x]
    if not shares:
        return ""
    least, most = f"{min(shares):.3g}", f"{max(shares):.3g}"
    span = least if least == most else f"{least} to {most}"
    return f" Thresholds l: {span} of the largest singular value of each layer's outputs."


def held_out_note(report: Report) -> str:
    """What the errors on certification data are, in words; empty where there are none."""
    found = [layer.get("errors", {}).get("held_out") for layer in report["layers"]]
    numbers = {errors["num_sequences"] for errors in found if errors}
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


def loss_estimate(report: Report) -> str:
    """The predicted loss increase beside the measured ones; empty where nothing predicts it."""
    metrics = [layer["errors"]["metric"] for layer in factorised(report)]
    measured = [
        f"{row['loss_after'] - row['loss_before']:+.3g} on {row['text']}"
        for row in report["quality"]
        if "loss_after" in row
    ]
    methods = {layer["method"] for layer in factorised(report)}
    # Other losses are per other units than the perplexity's, and methods of other metrics.
    if methods != {"curvature"} or (report["loss"] or {}).get("kind") != "next_token":
        return ""
    # The errors of a sequential fit hold what it inherits: their sum would count that many times.
    if any("inherited" in metric for metric in metrics):
        return ""
    total = sum(metric["stored"] for metric in metrics)
    text = f"The layers' estimated loss increases add up to {total:.3g} nats per token"
    return f"{text}; measured: {', '.join(measured)}." if measured else f"{text}."


def memory_note(report: Report) -> str:
    """Peak memory in words."""
    names = {
        "host_resident": "resident on the host, pages of mapped files included",
        "gpu_allocated": "allocated on the GPU",
    }
    peaks = [f"{byte_size(n)} {names.get(key, key)}" for key, n in report["memory"].items()]
    return f"Peak memory: {'; '.join(peaks)}." if peaks else ""


def limits(report: Report) -> list[str]:
    """What the figures do not promise, in sentences."""
    certificate = report["certificate"]
    note = certificate.get("note") or "none was asked for"
    missing = [f"There is no certificate ({note}): no figure is a guarantee."]
    return [
        *(not_promised(certificate) if certificate["statements"] else missing),
        "The layer errors belong to the calibration data, or to white inputs where none was used:"
        " they bound nothing on other data.",
        "Quality was measured on the evaluation data only, with activations in"
        f" {report['provenance']['activation_dtype']}; other data, tasks, languages and precisions"
        " may suffer more.",
        "Whether a factorised layer is faster than the dense one depends on its size and on the"
        " hardware.",
    ]


def layers_fell_back(report: Report) -> str:
    """How many layers fell back, with the verb."""
    number = len(fallen_back(report))
    return f"{number} layer{'' if number == 1 else 's'} fell back to dense"


def missed_gates(report: Report) -> list[str]:
    """The gates that are missed, each in words."""
    return [gate_missed(gate) for gate in report.get("gates", ()) if not gate["met"]]


def gate_missed(gate: dict[str, Any]) -> str:
    """One missed gate in words."""
    limit = f"gates.{gate['name']}: {gate['limit']:g} is missed"
    if gate["measured"] is None:
        return f"{limit}: {gate['reason']}"
    rest = f" ({gate['reason']})" if gate["reason"] else ""
    return f"{limit}: {gate['measured']:.6g} on {gate['where']}{rest}"
