"""What the card and the page both say: derived from the report, in plain words."""

import math
from typing import Any

import yaml

from lrc_cli.report.formatting import byte_size, percent

Report = dict[str, Any]
"""report.json, parsed; see docs/ and `build_report`."""


def factorised(report: Report) -> list[dict[str, Any]]:
    """The layers that were replaced by factors."""
    return [layer for layer in report["layers"] if layer["storage"] != "dense"]


def fallen_back(report: Report) -> list[dict[str, Any]]:
    """The layers that were meant to be factorised and could not be."""
    return [layer for layer in report["layers"] if layer["fallback"]]


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
    loss = ""
    if report["method"] == "curvature" and report["loss"]:
        loss = f" of the {report['loss']['description']}"
    return (
        f"{len(factorised(report))} of {len(report['layers'])} compressible layers are replaced by"
        f" low-rank factors, fitted with the method {report['method']}{loss}"
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
    words = {"white": "white inputs (no calibration data was used)"}
    kinds = sorted({error["output"]["inputs"] for error in errors})
    inputs = " or ".join(words.get(kind, f"{kind} inputs") for kind in kinds)
    units = " / ".join(sorted({error["metric"]["unit"] for error in errors}))
    return (
        f"Output error: ||(W - Z) X|| / ||W X|| on {inputs}, of the stored factors, of the best"
        " matrix of that rank and of plain SVD of that rank. Metric error: what the method"
        f" minimises ({units}), of the same three."
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
        *([] if certificate["statements"] else missing),
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
