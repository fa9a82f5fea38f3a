"""C1 is measured once more: the errors of every factorised layer on the calibration data."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lrc_cli.data.purposes import CALIBRATION
from lrc_cli.execution.losses import Loss, choose_loss
from lrc_cli.runtime.threads import in_parallel
from lrc_cli.verify.again.behind_relu import Behind
from lrc_cli.verify.again.both_inputs import PairMoments, measure_pairs
from lrc_cli.verify.again.dense import check_dense
from lrc_cli.verify.again.layer_errors import (
    Form,
    Found,
    Gram,
    Measured,
    correction_problem,
    leading_vectors,
    nuclear_errors,
    paired_errors,
    same_input_errors,
    white_errors,
)
from lrc_cli.verify.again.moments import (
    Checked,
    Moments,
    Sums,
    measure_inputs,
    shared_inputs,
)
from lrc_cli.verify.again.networks import OpenedRun
from lrc_cli.verify.again.tolerances import judge_bias, judge_errors
from lrc_cli.verify.methods import unknown_method

PARALLEL_WIDTH = 2048
"""The width up to which layers are solved side by side on a CPU."""


@dataclass(frozen=True, kw_only=True)
class Passed:
    """Holds what the passes over the calibration data summed."""

    groups: Mapping[str, str]
    """The leader of each layer: the first layer measured in the same way that reads its input."""
    sums: Mapping[str, Sums]
    """The errors by layer."""
    behind: Mapping[str, Behind]
    """The errors behind a ReLU by layer, for layers whose metric they are."""
    inputs: Mapping[str, Moments]
    """The moments of inputs by leader, for layers fitted to the dense network's inputs."""
    fishers: Mapping[str, Tensor]
    """F (m, m) float64, damped, by layer."""
    pairs: Mapping[str, PairMoments]
    """The moments of input pairs by leader, on the sequences that layers were fitted to."""
    held: Mapping[str, PairMoments]
    """The same on the sequences held back; empty where none was."""


def measure_layers(run: OpenedRun) -> None:
    """Measures and judges C1 of every factorised layer."""
    white: list[Checked] = []
    plain: list[Checked] = []
    paired: list[Checked] = []
    # Layers are sorted by the inputs on which they are judged.
    for checked in run.checked:
        row = run.row(checked)
        unknown = unknown_method(row)
        if unknown is not None:
            _leave_unchecked(run, checked, unknown)
        elif row["errors"]["output"]["inputs"] == "white":
            white.append(checked)
        else:
            (paired if row.get("sequential") is True else plain).append(checked)
    with run.findings.guard("c1.dense", "why layers stay dense can be looked at"):
        there = run.dense and CALIBRATION in run.sequences
        check_dense(run, _curvature_loss(run) if there else None)
    # A method that knows no data needs none here.
    _judge(run, white, lambda checked: white_errors(checked, run.row(checked)["rank"]))
    behind = _behind_relus(run, plain)
    # The other layers need the calibration data.
    if not plain and not paired:
        return
    if CALIBRATION not in run.sequences:
        for checked in (*plain, *paired):
            what = f"the errors of {checked.layer.name} are what they are on the calibration data"
            run.findings.not_checked("c1", what, "the calibration data is not there")
        return
    passed = _passed(run, plain, paired, behind)
    _judge_plain(run, plain, passed)
    _judge(run, paired, partial(_paired, run, passed))


def _passed(
    run: OpenedRun, plain: list[Checked], paired: list[Checked], behind: Mapping[str, Behind]
) -> Passed:
    """Runs the dense network over the calibration data, then both for layers fitted to both."""
    sequences, everything = run.sequences[CALIBRATION], [*plain, *paired]
    layers, probe = [x.layer for x in everything], next(sequences.batches(1))
    shared = shared_inputs(run.before, layers, probe)
    groups = _leaders(plain, shared) | _leaders(paired, shared)
    loss = _curvature_loss(run)
    graded = [x for x in everything if run.row(x)["method"] == "curvature"]
    with run.progress.phase("statistics", len(sequences)) as phase:
        sums, inputs, fishers = measure_inputs(
            run.before,
            run.chain,
            sequences,
            plain,
            graded,
            groups=groups,
            behind=behind,
            loss=loss,
            seed=run.seed,
            advance=phase.advance,
        )
    own, pairs, held = _measure_both(run, paired, groups) if paired else ({}, {}, {})
    return Passed(
        groups=groups,
        sums=sums | own,
        behind=behind,
        inputs=inputs,
        fishers=fishers,
        pairs=pairs,
        held=held,
    )


def _leave_unchecked(run: OpenedRun, checked: Checked, reason: str) -> None:
    """Says that a layer's errors and its bias are not measured."""
    name = checked.layer.name
    for id, what in (
        ("c1.output", f"the output errors of {name}"),
        ("c1.metric", f"the errors of {name} in the metric of its method"),
        ("c1.bias", f"the bias of {name} is the one that its method asks for"),
    ):
        run.findings.not_checked(id, what, reason)


def _behind_relus(run: OpenedRun, layers: list[Checked]) -> dict[str, Behind]:
    """Returns what measures relu layers behind their ReLU, by layer."""
    found = {}
    for checked in layers:
        if run.row(checked)["method"] == "relu":
            name = checked.layer.name
            with run.findings.guard("c1", f"the errors of {name} can be measured"):
                found[name] = _behind(checked, run.row(checked)["rank"])
    return found


def _behind(checked: Checked, rank: int) -> Behind:
    """Returns what measures a layer whose metric is its error behind a ReLU."""
    old = (
        torch.zeros(len(checked.weight), device=checked.weight.device)
        if checked.bias is None
        else checked.bias.float()
    )
    new = old if checked.offset is None else old - checked.offset.float()
    leading = leading_vectors(checked.weight, rank).float()
    return Behind(bias=old, new_bias=new, leading=leading)


def _measure_both(
    run: OpenedRun, paired: list[Checked], groups: Mapping[str, str]
) -> tuple[dict[str, Sums], dict[str, PairMoments], dict[str, PairMoments]]:
    """Returns errors by layer on the sequences fitted to, and moments by leader.

    The moments are on the sequences fitted to, and on the sequences held back.
    """
    assert run.written.report is not None and run.written.config is not None
    compression, sequences = run.written.config.compression, run.sequences[CALIBRATION]
    held_back = compression.num_held_back(len(sequences))
    what = "the config's number of sequences was held back from sequential fits"
    stated = run.written.report["sequential"]["held_back"]
    run.findings.equal("c1.held_back", what, stated, held_back)
    first, last = sequences.split(len(sequences) - held_back)
    measure = partial(measure_pairs, run.before, run.after, run.chain, layers=paired, groups=groups)
    with run.progress.phase("both networks", len(sequences)) as phase:
        sums, fitted = measure(first, errors=True, advance=phase.advance)
        _, held = measure(last, errors=False, advance=phase.advance) if held_back else ({}, {})
    return sums, fitted, held


def _leaders(layers: list[Checked], shared: Mapping[str, str]) -> dict[str, str]:
    """Returns the first of the layers that reads the same input, by layer.

    Args:
        shared: see `shared_inputs`; the named layer need not be among `layers`.
    """
    first: dict[str, str] = {}
    names = [checked.layer.name for checked in layers]
    return {name: first.setdefault(shared.get(name, name), name) for name in names}


def _curvature_loss(run: OpenedRun) -> Loss | None:
    """Returns the recorded loss, which must be the loss that the network's outputs ask for."""
    assert run.written.report is not None and run.written.config is not None
    recorded = run.written.report["loss"]
    if recorded is None:
        return None
    probe = next(run.sequences[CALIBRATION].batches(1))
    wanted = run.written.config.compression.loss
    loss = choose_loss(wanted, run.before, probe, run.tokenizer)
    what = "the loss is the one that the network's outputs ask for"
    run.findings.equal("c1.loss", what, recorded, loss.facts())
    return loss


def _judge(run: OpenedRun, layers: list[Checked], measure: Callable[[Checked], Measured]) -> None:
    for checked in layers:
        what = f"the errors of {checked.layer.name} can be measured"
        with run.findings.guard("c1", what):
            measured = measure(checked)
            judge_errors(run.findings, run.row(checked), measured)
            judge_bias(run.findings, run.row(checked), checked, measured)


def _judge_plain(run: OpenedRun, layers: list[Checked], passed: Passed) -> None:
    """Judges each group together: layers that read one input share its Gram matrix's root."""
    groups: dict[str, list[Checked]] = {}
    for checked in layers:
        groups.setdefault(passed.groups[checked.layer.name], []).append(checked)
    members = list(groups.values())
    widest = max((max(x.layer.shape) for x in layers), default=0)
    is_small = run.before.device.type == "cpu" and widest <= PARALLEL_WIDTH
    workers = torch.get_num_threads() if is_small else 1
    assert run.written.config is not None
    solve = partial(_group_errors, run, passed)
    with run.progress.phase("optima", max(len(members), 1)) as phase:
        each = in_parallel(solve, ([group] for group in members), workers)
        for group, (found,) in zip(members, each, strict=True):
            for checked, errors in zip(group, found, strict=True):
                _judge(run, [checked], partial(_raised, errors))
            phase.advance(1)


def _raised(found: Measured | Exception, checked: Checked) -> Measured:
    if isinstance(found, Exception):
        raise found
    return found


def _group_errors(
    run: OpenedRun,
    passed: Passed,
    group: list[Checked],
) -> list[Measured | Exception]:
    """Returns the errors of layers that read one input, or what a damaged layer raises."""
    assert run.written.config is not None
    try:
        moments = passed.inputs[passed.groups[group[0].layer.name]]
    except KeyError as error:
        return [error for _ in group]
    center = run.written.config.compression.center
    plain = Form(gram=Gram(moments.covariance() if center else moments.gram()))
    results: list[Measured | Exception] = []
    for checked in group:
        try:
            shift = None
            if center:
                weight = checked.weight.double()
                shift = (weight - checked.fitted().to(weight.device)) @ moments.mean
            found, name = _plain_errors(run, checked, plain, moments, passed), checked.layer.name
            energy, behind = passed.sums[name].mean_energy, passed.behind.get(name)
            results.append(Measured(found, energy, shift, behind, _weight(passed, name)))
        except (ArithmeticError, LookupError, RuntimeError, ValueError) as error:
            results.append(error)
    return results


def _plain_errors(
    run: OpenedRun,
    checked: Checked,
    plain: Form,
    moments: Moments,
    passed: Passed,
) -> Found:
    row, name = run.row(checked), checked.layer.name
    weighted = None
    if row["method"] == "curvature":
        # Both forms have the same Gram matrix, and so one eigenproblem for its root.
        weighted = Form(gram=plain.gram, fisher=passed.fishers[name])
    found = same_input_errors(passed.sums[name], row["rank"], plain, weighted)
    if row["method"] == "nuclear":
        found["metric"] = nuclear_errors(checked, row["rank"], plain, row["threshold"])
    if name in passed.behind:
        found["metric"] = passed.behind[name].metric()
        if checked.bias is not None:  # a bias may change, so only what varies has to be fitted
            varying = Form(gram=Gram(moments.covariance()))
            found["output"]["optimum"] = varying.tail(checked.weight.double(), row["rank"])
    return found


def _paired(run: OpenedRun, passed: Passed, checked: Checked) -> Measured:
    assert run.written.config is not None
    compression, row = run.written.config.compression, run.row(checked)
    sums, leader = passed.sums[checked.layer.name], passed.groups[checked.layer.name]
    pair = passed.pairs[leader].moments(center=compression.center)
    shift = None
    if compression.center:
        dense, compressed = passed.pairs[leader].means()
        fitted = checked.fitted().to(dense.device)
        shift = checked.weight.double() @ dense - fitted @ compressed
    is_weighted = row["method"] == "curvature"
    fisher = passed.fishers[checked.layer.name] if is_weighted else None
    others = passed.held[leader].moments(center=compression.center) if passed.held else None
    stated = row["correction"]
    if compression.correction != "auto" or others is None:
        # Where nothing was held back, nothing says that a correction pays.
        asked = 0.0 if compression.correction == "auto" else compression.correction
        problem = None if stated == asked else f"stated {stated}, asked for was {asked}"
    else:
        problem = correction_problem(
            stated, checked.weight, pair, others, fisher, ridge=compression.ridge
        )
    what = f"the share of {checked.layer.name}'s correction is the one that was asked for or pays"
    run.findings.judge("c1.correction", what, problem)
    found = paired_errors(
        sums,
        row["rank"],
        pair,
        fisher,
        ridge=compression.ridge,
        correction=stated,
    )
    weight = _weight(passed, checked.layer.name)
    return Measured(found, sums.mean_energy, shift, weight=weight)


def _weight(passed: Passed, name: str) -> float:
    """Returns the most that a unit of squared output error counts in a layer's metric."""
    fisher = passed.fishers.get(name)
    return 1.0 if fisher is None else fisher.diagonal().sum().item()
