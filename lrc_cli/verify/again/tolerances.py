"""The report is judged beside what was measured again, with the tolerances that rounding needs."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lrc_cli.execution.losses import Loss
from lrc_cli.verify.again.behind_relu import Behind
from lrc_cli.verify.again.held_out import KINDS, HeldOut
from lrc_cli.verify.again.layer_errors import (
    CURVATURE_TOLERANCE,
    FLOORS,
    TOLERANCE,
    Measured,
    compare_metric,
    compare_output,
)
from lrc_cli.verify.again.moments import Checked
from lrc_cli.verify.files.written import Written
from lrc_cli.verify.statements import Findings

QUALITY_TOLERANCE = 1e-3
"""The relative tolerance of losses and of what is measured on one sequence."""
LEAST_TOLERANCE = 1e-6
"""The least value of a tolerance or a clipping limit (docs/theory.md)."""
RESOLUTION = 2.0**-24
"""The resolution of squared errors, relative to the total (docs/theory.md)."""
CLIP_FACTOR = 4.0
"""A clipping limit is so many times the largest value on selection data."""


def rounding_of(dtype: torch.dtype) -> float:
    """Returns the relative rounding of activations; two networks' outputs differ by it anyway."""
    return torch.finfo(dtype).eps


def least_error(dtype: torch.dtype) -> float:
    """Returns the relative error below which a layer's error is rounding of its outputs."""
    return max(rounding_of(dtype), 1e-5)


def judge_errors(findings: Findings, row: Mapping[str, Any], measured: Measured) -> None:
    """Judges C1 of one layer: stored, optimum and svd in the output and in the metric."""
    name, errors, found = row["name"], row["errors"], measured.errors
    what = f"the output errors of {name} are those on {errors['output']['inputs']} inputs"
    problem = compare_output(errors["output"], found["output"], measured.energy)
    findings.judge("c1.output", what, problem)
    what = f"the errors of {name} in the metric of {row['method']} are what they are"
    tolerance = CURVATURE_TOLERANCE if row["method"] == "curvature" else 2 * TOLERANCE
    problem = compare_metric(errors["metric"], found["metric"], tolerance, measured.rounding)
    findings.judge("c1.metric", what, problem)


def judge_bias(
    findings: Findings, row: Mapping[str, Any], checked: Checked, measured: Measured
) -> None:
    """A free bias must make up for the mean error; no other bias may change."""
    shift = measured.shift
    what = f"the bias of {row['name']} is the one that its method asks for"
    if measured.behind is not None:
        _judge_rectified(findings, row, measured.behind)
        return
    if shift is None:
        return
    found = torch.zeros_like(shift) if checked.offset is None else -checked.offset
    old = torch.zeros_like(shift) if checked.bias is None else checked.bias.double()
    rounding = torch.finfo(getattr(torch, row["dtype"])).eps * (old + shift).abs()
    slack = rounding + 10 * TOLERANCE * shift.square().mean().sqrt()
    wrong = int(((found - shift).abs() > slack).sum())
    problem = f"{wrong} of {len(shift)} entries are not" if wrong else None
    findings.judge("c1.bias", what, problem)


def _judge_rectified(findings: Findings, row: Mapping[str, Any], behind: Behind) -> None:
    """The bias must pay behind the ReLU; the convex programme's solution is written nowhere."""
    slack = 2 * TOLERANCE * behind.old_bias + FLOORS * RESOLUTION * behind.total
    problem = None
    if behind.stored > behind.old_bias + slack:
        problem = f"squared error {behind.stored}, with the old bias {behind.old_bias}"
    what = f"the bias of {row['name']} is no worse behind the ReLU than the old one"
    findings.judge("c1.bias", what, problem)
    what = f"the convex programme of {row['name']} has the stated objective and gap"
    reason = "its solution is not among the written files"
    findings.not_checked("c1.convex", what, reason, by_design=True)


def judge_quality(
    findings: Findings,
    row: Mapping[str, Any],
    found: Mapping[str, float],
    loss: Loss,
    dtype: torch.dtype,
) -> None:
    """Judges one row of report["quality"]."""
    what = f"the quality on {row['text']} is what both networks give"
    problem = None
    for key, value in found.items():
        slack = QUALITY_TOLERANCE * abs(value) + _absolute(key, row, dtype)
        if row.get(key) is None or not abs(row[key] - value) <= slack:
            problem = problem or f"{key} is stated as {row.get(key)}, found {value}"
    for key in ("kl", "top1_agreement", "loss_before", "loss_after", "relative_output_error"):
        if key in row and key not in found:
            problem = problem or f"{key} is stated as {row[key]}, and cannot be measured"
    if "loss_before" in found and row.get("scored") != loss.description:
        problem = problem or f"scored is stated as {row.get('scored')}, not {loss.description}"
    findings.judge("quality.measured", what, problem)


def objective_problem(stated: float, found: float, dtype: torch.dtype) -> str | None:
    """Returns what is wrong with a distance of two networks' outputs; None: nothing.

    It is a difference of logarithms in the activations' dtype, as a divergence of a text is.
    """
    slack = QUALITY_TOLERANCE * abs(found) + _absolute("kl", {}, dtype)
    return None if abs(stated - found) <= slack else f"stated {stated}, found {found}"


def _absolute(key: str, row: Mapping[str, Any], dtype: torch.dtype) -> float:
    """Returns a figure's absolute tolerance.

    Ties of the two largest logits break either way. Divergences are rounded like losses, and both
    come from logarithms in float32.
    """
    if key == "top1_agreement":
        return max(2.0, 2 * rounding_of(dtype) * row["num_scored"]) / row["num_scored"]
    least = rounding_of(torch.float32)
    return 0.0 if key == "num_scored" else max(rounding_of(dtype) / 10, least)


def judge_certificate(
    findings: Findings,
    written: Written,
    selection: HeldOut,
    found: HeldOut,
    dtype: torch.dtype,
) -> None:
    """Judges C2 (tolerances, clipping limits, values) and C3 (layers' errors on held-out data)."""
    assert written.report is not None
    certificate = written.report["certificate"]
    # A sequential layer's own error is measured in the compressed network.
    own = {
        row["name"]: "deployed" if row.get("sequential") is True else "same_input"
        for row in written.factorised
    }
    # Selection data give the clipping limits and the layers' tolerances.
    clips = {
        name: max(LEAST_TOLERANCE, CLIP_FACTOR * max(map(abs, values)))
        for name, values in selection.values.items()
        if name != "top1_disagreement"
    }
    judge_table(findings, "c2.clips", "the clipping limit of", certificate["clips"], clips, dtype)
    covered = [name for name in own if name in selection.squares and name in found.squares]
    tolerances = {
        name: max(LEAST_TOLERANCE, *selection.relative(name, own[name])) for name in covered
    }
    stated = certificate["tolerances"]
    judge_table(findings, "c2.tolerances", "the tolerance of", stated, tolerances, dtype)
    # Certification data give the values; the layers' errors count in units of their tolerances.
    values = dict(found.values)
    errors = {name: found.relative(name, own[name]) for name in covered if name in stated}
    if errors:
        each = [[e / stated[name] for e in errors[name]] for name in errors]
        values["all_layers"] = [max(ratios) for ratios in zip(*each, strict=True)]
    # Every series that the certificate lists must be what both networks give.
    series = {k: v for k, v in certificate["values"].items() if k != "layers"}
    series |= {f"error of {k}": v for k, v in certificate["values"].get("layers", {}).items()}
    values |= {f"error of {k}": v for k, v in errors.items()}
    for name, listed in series.items():
        what = f"the values of {name} are what both networks give"
        extra = 0.0
        if name == "all_layers":
            # Where a layer is nearly exact, error / tolerance is rounding / rounding.
            extra = (least_error(dtype) / min(stated.values())) ** 2 / 2
        problem = series_problem(name, listed, values.get(name), dtype, extra)
        findings.judge("c2.values", what, problem)
    # C3: each layer's held-out errors.
    for row in written.factorised:
        what = f"the held-out errors of {row['name']} are what both networks give"
        listed = row["errors"].get("held_out")
        if listed is None and row["name"] in covered:
            findings.judge("c2.layers", what, "the report has none, and they can be measured")
        elif listed is None:
            findings.not_checked("c2.layers", what, "there are none", by_design=True)
        elif row["name"] not in covered:
            findings.not_checked("c2.layers", what, "its tokens cannot be followed by sequence")
        else:
            problem = _held_out_problem(listed, found, row["name"], own[row["name"]], dtype)
            drawn = [listed["tolerance"], listed["num_sequences"]]
            wanted = [stated.get(row["name"]), certificate["num_sequences"]]
            if problem is None and drawn != wanted:
                problem = f"tolerance and number of sequences are stated as {drawn}, not {wanted}"
            findings.judge("c2.layers", what, problem)


def judge_table(
    findings: Findings,
    id: str,
    what: str,
    stated: Mapping[str, float],
    found: Mapping[str, float],
    dtype: torch.dtype,
) -> None:
    for name in sorted({*stated, *found}):
        a, b = stated.get(name), found.get(name)
        same = a is not None and b is not None and is_near(a, b, dtype)
        problem = None if same else f"stated {a}, found {b}"
        findings.judge(id, f"{what} {name} comes from the selection data", problem)


def is_near(stated: float, found: float, dtype: torch.dtype) -> bool:
    """Returns whether two relative errors agree.

    They add in squares, so that rounding matters little where they are large.
    """
    slack = 10 * QUALITY_TOLERANCE * abs(found) + least_error(dtype)
    squares = abs(stated**2 - found**2) <= 10 * QUALITY_TOLERANCE * found**2
    return squares or abs(stated - found) <= slack


def series_problem(
    name: str,
    stated: Sequence[float],
    found: Sequence[float] | None,
    dtype: torch.dtype,
    extra: float,
) -> str | None:
    if found is None or len(stated) != len(found):
        return f"{len(stated)} are stated, {len(found or ())} found"
    if name == "top1_disagreement":
        return _flips_problem(stated, found)
    for index, (a, b) in enumerate(zip(stated, found, strict=True)):
        if not (abs(a - b) <= extra or is_near(a, b, dtype)):
            return f"sequence {index} is stated as {a}, found {b}"
    return None


def _flips_problem(stated: Sequence[float], found: Sequence[float]) -> str | None:
    """Allows that another of several nearly equal logits is the largest in another pass."""
    differences = [abs(a - b) for a, b in zip(stated, found, strict=True)]
    if max(differences) <= 0.15 and math.fsum(differences) <= 0.02 * len(differences):
        return None
    return f"the shares differ by {math.fsum(differences) / len(differences)} on average"


def _held_out_problem(
    stated: Mapping[str, float], found: HeldOut, layer: str, own: str, dtype: torch.dtype
) -> str | None:
    wanted = {kind: found.overall(layer, kind) for kind in KINDS}
    wanted["worst_sequence"] = max(found.relative(layer, own))
    for key, value in wanted.items():
        if not is_near(stated[key], value, dtype):
            return f"{key} is stated as {stated[key]}, found {value}"
    return None
