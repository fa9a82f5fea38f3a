"""These checks need the files only: every figure of report.json that follows from other figures."""

import json
import math
from collections.abc import Mapping
from typing import Any

from lrc_cli import __version__
from lrc_cli.checkpoint.source import Source
from lrc_cli.config import (
    CONFIG_BYTES,
    Config,
    config_hash,
    plain_values,
    to_dict,
    yaml_text,
)
from lrc_cli.execution.precision import DTYPES
from lrc_cli.network.keys import Keys
from lrc_cli.reading import JSON_BYTES, read_bytes, read_utf8
from lrc_cli.report.card import render_card
from lrc_cli.report.html import render_html
from lrc_cli.report.record import parse_record
from lrc_cli.verify.files.asked import check_asked
from lrc_cli.verify.files.fields import check_fields, is_ours, version_of
from lrc_cli.verify.files.forms import READERS, TENSORS, UNCOUNTED, UP, unread
from lrc_cli.verify.files.manifest import check_origins
from lrc_cli.verify.files.reasons import check_reasons
from lrc_cli.verify.files.written import Written, gained_biases, marks_of
from lrc_cli.verify.methods import KNOWN, unknown_method
from lrc_cli.verify.statements import Findings

FLOORS = 64.0
"""The slack in numerical floors: Gram matrices summed in float32 are a little indefinite."""
ITEM_SIZES = (1, 2, 4, 8, 16)
"""The bytes that a number may take in the original, where the output has another dtype."""
ROUNDING = 1e-9
"""The relative tolerance of figures that are computed in another order."""


def check_figures(written: Written, findings: Findings) -> None:
    """Checks all that report.json says of itself; needs `written.report`."""
    report, config, source = written.report, written.config, written.source
    if report is None:
        findings.not_checked("report", "the report's figures", "report.json cannot be read")
        return
    with findings.guard("report.form", "report.json is a record"):
        check_fields(written, findings)
    if config is not None:
        with findings.guard("config", "the report tells of lrc.yaml's run"):
            _check_config(report, config, written, findings)
        with findings.guard("config", "the report has what the config asks for"):
            check_asked(written, config, findings)
        with findings.guard("reasons", "the report's reasons are right"):
            check_reasons(written, config, findings)
    if source is not None:
        with findings.guard("files.origin", "where the files come from can be told"):
            recorded, names = report["provenance"]["checkpoint_sha256"], source.files
            weights = {file.name for file in names}
            check_origins(written.directory, recorded, weights, findings)
        with findings.guard("size", "the report's sizes are right"):
            _check_size(written, source, findings)
    with findings.guard("target", "the report's target is right"):
        _check_target(report, config, findings)
    for layer in report["layers"]:
        what = f"the errors of {layer['name']} are consistent"
        with findings.guard("errors", what):
            if layer["storage"] != "dense":
                findings.judge("errors", what, error_problem(layer))
                _leave_inputs(layer, findings)
    with findings.guard("layers.before", "the report's bytes of the original can be"):
        _check_before(written, findings)
    for row in report["quality"]:
        what = f"the quality on {row['text']} is consistent"
        with findings.guard("quality", what):
            findings.judge("quality", what, _quality_problem(row))
    what = "times, memory, hardware and versions"
    reason = "they belong to the run, and no file tells of them"
    findings.not_checked("report.run", what, reason, by_design=True)


def close(a: float, b: float, tolerance: float = ROUNDING) -> bool:
    """Returns whether numbers are equal up to a relative tolerance, or equal infinities."""
    return a == b or math.isclose(a, b, rel_tol=tolerance)


def _check_config(
    report: Mapping[str, Any], config: Config, written: Written, findings: Findings
) -> None:
    facts = report["provenance"]
    text = read_utf8(written.directory / "lrc.yaml", CONFIG_BYTES)
    values = plain_values(text, "lrc.yaml")
    what = "lrc.yaml is the config in the report"
    findings.judge("config", what, None if text == facts["config"] else "they differ")
    what = "lrc.yaml is written as lrc writes a config"
    if is_ours(report):
        same = text == yaml_text(values)
        findings.judge("config", what, None if same else "it has other lines, or comments")
    else:
        findings.not_checked("config", what, f"it was written by {version_of(report)}")
    what = "the config has the hash in the report"
    found_hash = config_hash(config, values)
    findings.equal("config", what, facts["config_sha256"], found_hash)
    compression = config.compression
    name, value = compression.target
    stated = {
        "method": report["method"],
        "allocation": report["allocation"],
        "target": [report["target"]["name"], report["target"]["value"]],
        "seed": facts["seed"],
        "evaluation": json.dumps(facts["evaluation"]),  # here true is not 1
    }
    found = {
        "method": compression.method,
        "allocation": compression.allocation,
        "target": [name, value],
        "seed": config.runtime.seed,
        "evaluation": json.dumps(to_dict(config)["evaluation"]),
    }
    findings.equal("config", "the report says what the config asks for", stated, found)
    for layer in report["layers"]:
        own = compression.override(layer["name"])
        _check_storage(layer, own.storage or compression.storage, findings)
        wanted = own.method or compression.method
        what = f"the method of {layer['name']} is the config's"
        stands_in = layer["method"] != wanted and layer.get("method_reason")
        if wanted not in KNOWN and stands_in:
            reason = f"verification does not know when {wanted} gives way to another method"
            findings.not_checked("config.method", what, reason)
            continue
        # Relu is for layers before a ReLU; other layers say how they were fitted, and why.
        other = wanted == "relu" and layer.get("method_reason") and layer["method"] == "frobenius"
        findings.equal("config.method", what, layer["method"], "frobenius" if other else wanted)


def _check_storage(layer: Mapping[str, Any], wanted: str, findings: Findings) -> None:
    """A layer is stored as the config asks, or stays dense.

    Args:
        wanted: the layer's storage in the config.
    """
    allowed = {"dense", *(READERS if wanted == "auto" else (wanted,))}
    stated, what = layer["storage"], f"the storage of {layer['name']} is the config's"
    problem = None if stated in allowed else f"stated {stated}, asked for was {wanted}"
    findings.judge("config.storage", what, problem)


def _check_size(written: Written, source: Source, findings: Findings) -> None:
    """Checks bytes and parameters: after the run by headers, before it by what layers state."""
    assert written.report is not None
    size, layers, skipped = (written.report[key] for key in ("size", "layers", "skipped"))
    # The tensors that were kept must be there.
    kept = {entry["name"]: entry["bytes"] for entry in skipped}
    missing = sorted(set(kept) - set(source.tensors))
    problem = f"not there: {', '.join(missing[:3])}" if missing else None
    findings.judge("tensors.kept", "every tensor that was not compressible is there", problem)
    # Other tensors belong to a layer, or are marks of fused experts or gained biases.
    known = {keys.key(name) for keys in written.keys.values() for name in TENSORS}
    marks = marks_of(written)
    known |= {*marks, *gained_biases(written)}
    unknown = sorted(set(source.tensors) - known - set(kept))
    what = "every tensor belongs to a layer or is listed as kept"
    if written.unread:
        findings.not_checked("tensors.known", what, unread(written.unread[0]["storage"]))
    elif len(written.keys) == len(layers):
        problem = f"not so: {', '.join(unknown[:3])}" if unknown else None
        findings.judge("tensors.known", what, problem)
    else:
        reason = "some layers' tensors go by other names"
        findings.not_checked("tensors.known", what, reason, by_design=True)
    if missing:
        return
    # Bytes: before the run by the report's layers, after it by the files.
    before = sum(layer["bytes_before"] for layer in layers)
    whole = before + sum(kept.values())
    after = sum(info.num_bytes for info in source.tensors.values())
    rest = sum(source.tensors[key].num_bytes for key in (*kept, *marks))
    # Parameters: permutations do not count.
    parameters = sum(math.prod(layer["shape"]) for layer in layers)
    parameters += sum(source.tensors[key].num_elements for key in kept)
    ends = tuple(f".{name}" for name in UNCOUNTED)
    left = sum(info.num_elements for key, info in source.tensors.items() if not key.endswith(ends))
    # The report must state the same sizes, and no others.
    found = {
        "compressible_bytes": {"before": before, "after": after - rest},
        "checkpoint_bytes": {"before": whole, "after": after},
        "parameters": {"before": parameters, "after": left},
        "file_bytes": sum(file.stat().st_size for file in source.files),
        "kept_compressible": (after - rest) / before,
        "kept_checkpoint": after / whole,
        "kept_parameters": left / parameters,
    }
    for key in sorted({*found, *size}):
        what = f"size.{key} is what was written"
        if written.unread and key in ("parameters", "kept_parameters"):
            findings.not_checked("size", what, unread(written.unread[0]["storage"]))
        else:
            findings.equal("size", what, size.get(key), found.get(key))
    for entry in skipped:
        what = f"the share of {entry['name']} is right"
        same = close(entry["share"], entry["bytes"] / whole)
        findings.judge("size.share", what, None if same else f"stated {entry['share']}")


def _check_before(written: Written, findings: Findings) -> None:
    """Rows must be named once, and have the bytes that their shapes have in the original."""
    report, tensors = written.report, {} if written.source is None else written.source.tensors
    assert report is not None
    for kind in ("layers", "skipped"):
        names = [entry["name"] for entry in report[kind]]
        twice = sorted({name for name in names if names.count(name) > 1})
        problem = f"twice: {', '.join(twice[:3])}" if twice else None
        findings.judge("layers.before", f"each of {kind} is named once", problem)
    same = written.config is not None and written.config.output.dtype == "auto"
    rows = [
        (row["name"], row["bytes_before"], math.prod(row["shape"]), DTYPES[row["dtype"]].itemsize)
        for row in report["layers"]
    ]
    rows += [
        (entry["name"], entry["bytes"], info.num_elements, info.dtype.itemsize)
        for entry in report["skipped"]
        if (info := tensors.get(entry["name"])) is not None
    ]
    for name, stated, number, itemsize in rows:
        what = f"the bytes of {name} in the original can be"
        allowed = {number * size for size in ((itemsize,) if same else ITEM_SIZES)}
        problem = None if stated in allowed else f"stated {stated} for {number} numbers"
        findings.judge("layers.before", what, problem)
    strays = [of for of in report["copies"].values() if of not in tensors]
    strays = [of for of in strays if Keys(of).key(UP) not in tensors]
    what = "the originals of copies are there"
    problem = f"not there: {', '.join(strays[:3])}" if strays and not report["fused"] else None
    findings.judge("tensors.kept", what, problem)


def _check_target(report: Mapping[str, Any], config: Config | None, findings: Findings) -> None:
    target, what = report["target"], "whether the target is met is right"
    name, value = target["name"], target["value"]
    errors = [layer["errors"] for layer in report["layers"] if "errors" in layer]
    if name == "size":
        met = report["size"][f"kept_{target['of']}"] <= value
    elif name == "max_layer_error":
        met = all(error["output"]["stored"] <= value for error in errors)
    elif name == "max_loss_increase":
        # The error that a sequential fit inherits is predicted with the layers it comes from.
        own = (e["metric"]["stored"] - e["metric"].get("inherited", 0.0) for e in errors)
        met = sum(own) <= value
    elif name == "threshold":
        met = not any(layer["fallback"] for layer in report["layers"])
    else:
        findings.not_checked("target", what, f"{name} is not a figure of the report")
        return
    findings.equal("target", what, target["met"], met)
    used = any(layer.get("sequential") is True for layer in report["layers"])
    what = "whether layers were fitted in sequence is right"
    findings.equal("target", what, report["sequential"]["used"], used)
    what = "the number of sequences held back from sequential fits is the config's"
    compression = None if config is None else config.compression
    if not used:
        findings.equal("target", what, report["sequential"]["held_back"], 0)
    elif compression is not None:
        drawn = report["provenance"]["sequences"]["calibration"]["num_sequences"]
        wanted = compression.num_held_back(drawn)
        findings.equal("target", what, report["sequential"]["held_back"], wanted)


def error_problem(layer: Mapping[str, Any]) -> str | None:
    """Returns what in a layer's errors cannot be; None where nothing is wrong."""
    metric, output = layer["errors"]["metric"], layer["errors"]["output"]
    for name, errors in (("metric", metric), ("output", output)):
        values = [errors[key] for key in ("stored", "svd", "floor") if errors[key] is not None]
        if any(not math.isfinite(value) or value < 0 for value in values):
            return f"{name}: {values} are no errors"
        for key in ("stored", "svd"):
            if _below(errors[key], errors["optimum"], errors["floor"], name):
                return f"{name}: {key} {errors[key]} is below the optimum {errors['optimum']}"
    inputs = "white" if layer["method"] == "svd" else "calibration"
    inputs = "compressed" if layer.get("sequential") is True else inputs
    if output["inputs"] != inputs and layer["method"] in KNOWN:
        return f"output: inputs are stated as {output['inputs']}, not {inputs}"
    if not close(metric["floor"], 2.0**-24 * metric["total"]):
        return f"metric: floor {metric['floor']} does not belong to total {metric['total']}"
    if output["floor"] != 2.0**-12:
        return f"output: floor {output['floor']} is not 2^-12"
    parts = layer["errors"].get("held_out")
    if parts:
        problem = _held_out_problem(parts, "deployed" if layer.get("sequential") else "same_input")
        if problem is not None:
            return problem
    ranks = [solved["rank"] for solved in layer.get("relu", [])]
    if layer["method"] == "relu" and (layer["rank"] not in ranks or ranks != sorted(set(ranks))):
        return f"relu: solved ranks {ranks} for rank {layer['rank']}"
    if layer["method"] in ("frobenius", "svd") and not layer.get("sequential"):
        return _ratio_problem(metric, output)
    return None


def _held_out_problem(parts: Mapping[str, float], own: str) -> str | None:
    """Returns what in a layer's held-out errors cannot be.

    Args:
        own: the error that the certificate speaks of.
    """
    sides = {name: parts[name] for name in ("deployed", "inherited", "new")}
    for name, side in sides.items():  # the three are the sides of a triangle
        others = sum(sides.values()) - side
        if side > others * (1 + 1e-5) + 1e-9:
            return f"held out: {name} is more than the other two together"
    if parts["worst_sequence"] < parts[own] * (1 - 1e-5) - 1e-9:
        return f"held out: the worst sequence is better than {own}, the error over all"
    return None


def _leave_inputs(layer: Mapping[str, Any], findings: Findings) -> None:
    """Says that nothing tells on which inputs an unknown method is judged."""
    reason = unknown_method(layer)
    if reason is not None:
        what = f"the errors of {layer['name']} are on the inputs of its method"
        findings.not_checked("errors.inputs", what, reason)


def _below(error: float | None, optimum: float | None, floor: float, kind: str) -> bool:
    """Returns whether an error is below its provable optimum by more than the numerical floor."""
    if error is None or optimum is None:
        return False
    power = 2 if kind == "output" else 1
    return error**power < optimum**power * (1 - ROUNDING) - FLOORS * floor**power


def _ratio_problem(metric: Mapping[str, float], output: Mapping[str, float]) -> str | None:
    """Metric and output must agree where the metric is the squared output error."""
    for key in ("optimum", "svd"):
        if metric[key] is None:  # a form without a rank is compared with nothing
            continue
        floors = [output[k] <= 4 * output["floor"] for k in ("stored", key)]
        if any(floors) or metric[key] == 0:
            continue
        stated, found = metric["stored"] / metric[key], (output["stored"] / output[key]) ** 2
        if not close(stated, found, 1e-6):
            return f"stored / {key} is {stated} in the metric and {found} in the output"
    return None


def _quality_problem(row: Mapping[str, Any]) -> str | None:
    for side in ("before", "after"):
        loss = row.get(f"loss_{side}")
        if loss is None:
            continue
        perplexity = math.exp(loss) if loss < 700 else math.inf
        if not close(row[f"perplexity_{side}"], perplexity):
            return f"perplexity_{side} {row[f'perplexity_{side}']} is not exp({loss})"
    if row.get("kl") is not None and not row["kl"] >= -1e-3:
        return f"a divergence of {row['kl']} cannot be"
    if row.get("top1_agreement") is not None and not 0 <= row["top1_agreement"] <= 1:
        return f"an agreement of {row['top1_agreement']} cannot be"
    if not 0 < row["num_sequences"] <= row["population"]:
        return f"{row['num_sequences']} of {row['population']} sequences cannot be"
    return None


def check_pages(written: Written, findings: Findings) -> None:
    """README.md and report.html must say what report.json says, word by word."""
    report = written.report
    if report is None:
        findings.not_checked("pages", "the pages", "report.json cannot be read")
        return
    for name, render in (("README.md", render_card), ("report.html", render_html)):
        what = f"{name} is what report.json renders to"
        with findings.guard("pages", what):
            if not is_ours(report):
                reason = (
                    f"PAGES OF ANOTHER VERSION: written by {version_of(report)}, and this is lrc"
                    f" {__version__}, so that the page may say anything"
                )
                findings.not_checked("pages", what, reason)
                continue
            same = (
                read_bytes(written.directory / name, JSON_BYTES)
                == render(parse_record(report)).encode()
            )
            findings.judge("pages", what, None if same else "the two differ")
