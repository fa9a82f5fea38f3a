"""What training gave is measured once more, on the sequences that were held out from it.

The factors before the training are not among the written files. What was reached with them, and in
trials of learning rates, is the run's own claim, and is said to be not checked.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lrc_cli.config import Recover
from lrc_cli.data.draw import Batch, Sequences
from lrc_cli.data.padding import Masks, masks_of, unpadded
from lrc_cli.data.purposes import CALIBRATION, RECOVER
from lrc_cli.execution.divergence import OBJECTIVES
from lrc_cli.execution.hooks import around_calls, hidden_output
from lrc_cli.execution.in_parts import InParts
from lrc_cli.execution.losses import (
    UNSCORED,
    Loss,
    choose_loss,
    count_tokens,
    drawing,
    prepare,
)
from lrc_cli.execution.network import Network
from lrc_cli.execution.outputs import floating_outputs
from lrc_cli.runtime.files import tensor_bytes
from lrc_cli.verify.again.moments import batch_size
from lrc_cli.verify.again.networks import OpenedRun
from lrc_cli.verify.again.tolerances import objective_problem

BATCH_TOKENS, STEP_TOKENS = 1024, 2048
"""The tokens that run together and the tokens of a step, as in the run: draws go by batches."""
HELD_OUT, MOST_HELD_OUT = 8, 16
"""One sequence in so many is held out, and the most that are."""
EPOCHS = 4
"""How often the data is seen where the config gives neither tokens nor minutes."""
ROWS = 128
"""Rows of logits that are compared at once, in float64."""


def check_recovery(run: OpenedRun) -> None:
    """Checks every field of report["recovery"] that follows from the files and the data."""
    assert run.written.report is not None and run.written.config is not None
    stated = run.written.report.get("recovery")
    if stated is None:
        return
    _say_what_nobody_can_check(run, stated)
    what = "the objective of the training is what it is on the sequences that were held out"
    data = training_data(run)
    if isinstance(data, str):
        run.findings.not_checked("recovery.after", what, data)
        run.findings.not_checked("recovery.data", "what the training was on", data)
        return
    trained, kept_out = split(data)
    _check_lengths(run, stated, trained, kept_out)
    loss = choose_loss(
        run.written.config.compression.loss, run.before, next(data.batches(1)), run.tokenizer
    )
    name = "the objective is the one that the network's outputs ask for"
    run.findings.equal("recovery.data", name, stated["objective"], OBJECTIVES[loss.kind])
    size = min(_step_size(trained), batch_size(data, BATCH_TOKENS))
    with run.progress.phase("training's held-out data", len(kept_out)) as phase:
        found = 0.0
        for index, batch in enumerate(kept_out.batches(size)):
            found += _distance(run, loss, batch, index)
            phase.advance(len(next(iter(batch.values()))))
    found /= sum(count_tokens(batch) for batch in kept_out.batches(size))
    problem = objective_problem(stated["after"], found, run.before.dtype)
    run.findings.judge("recovery.after", what, problem)
    if stated.get("windows") is not None:
        _check_windows(run, stated, kept_out, loss, size, first=-(-len(trained) // size))


def training_data(run: OpenedRun) -> Sequences | str:
    """Returns the sequences that were trained on or held out, or why they cannot be had."""
    assert run.written.report is not None and run.written.config is not None
    drawn, asked = run.written.report["provenance"]["sequences"], run.written.config.recover
    name = RECOVER if asked.has_own_data and RECOVER in drawn else CALIBRATION
    if name not in run.sequences:
        return f"the {name} data is not there"
    texts = [row["text"] for row in run.written.report["quality"]]
    others = [*texts, *(x for x in drawn if x not in (CALIBRATION, RECOVER))]
    missing = [x for x in others if x not in run.sequences]
    if missing and run.written.report["recovery"]["num_left_out"]:
        return f"sequences like some of {missing[0]} were left out, and its data is not there"
    return _without(run.sequences[name], *(run.sequences[x] for x in others if x not in missing))


def split(data: Sequences) -> tuple[Sequences, Sequences]:
    """Returns the sequences that were trained on, and the last ones, which were held out."""
    number = max(1, min(len(data) // HELD_OUT, MOST_HELD_OUT))
    first, last = data.split(len(data) - number)
    return _without(first, last), last


def _without(sequences: Sequences, *others: Sequences) -> Sequences:
    """Returns the sequences that equal none of the others."""
    taken = {row for other in others for row in _rows(other)}
    kept = [index for index, row in enumerate(_rows(sequences)) if row not in taken]
    return replace(sequences, inputs={name: x[kept] for name, x in sequences.inputs.items()})


def _rows(sequences: Sequences) -> list[tuple[tuple[str, bytes], ...]]:
    """Returns the bytes of every sequence's inputs, by name."""
    named = sorted(sequences.inputs.items())
    return [
        tuple((name, bytes(tensor_bytes(x[index]))) for name, x in named)
        for index in range(len(sequences))
    ]


def _step_size(trained: Sequences) -> int:
    return min(batch_size(trained, STEP_TOKENS), len(trained))


def _check_lengths(
    run: OpenedRun, stated: Mapping[str, Any], trained: Sequences, kept_out: Sequences
) -> None:
    """Checks what was trained on: sequences, steps and tokens."""
    assert run.written.report is not None and run.written.config is not None
    drawn, asked = run.written.report["provenance"]["sequences"], run.written.config.recover
    name = RECOVER if asked.has_own_data and RECOVER in drawn else CALIBRATION
    left_out = len(run.sequences[name]) - len(trained) - len(kept_out)
    found = {
        "num_sequences": len(trained),
        "num_held_out": len(kept_out),
        "num_left_out": left_out,
    }
    what = "the sequences that were trained on, held out and left out are the data's"
    run.findings.equal("recovery.data", what, {key: stated[key] for key in found}, found)
    tokens = _step_size(trained) * trained.num_tokens / len(trained)
    steps = _steps(asked, stated, trained, tokens)
    found = {
        "planned_steps": steps,
        "planned_tokens": round(steps * tokens),
        "tokens": round(stated["steps"] * tokens),
    }
    what = "the training is as long as it was asked to be"
    run.findings.equal("recovery.data", what, {key: stated[key] for key in found}, found)


def _steps(asked: Recover, stated: Mapping[str, Any], trained: Sequences, tokens: float) -> int:
    """Returns the steps that were asked for; a time does not tell them."""
    if asked.minutes is not None:
        return int(stated["planned_steps"])
    wanted = EPOCHS * trained.num_tokens if asked.tokens == "auto" else asked.tokens
    return max(1, round(wanted / tokens))


def _say_what_nobody_can_check(run: OpenedRun, stated: Mapping[str, Any]) -> None:
    if stated["after"] < stated["before"]:
        what = "the objective before the training"
        reason = "the factors as they were fitted are not among the written files"
        run.findings.not_checked("recovery.before", what, reason, by_design=True)
    what = "the learning rate, the trials of rates, and the step after which no gain came"
    reason = "only another training tells"
    run.findings.not_checked("recovery.trials", what, reason, by_design=True)


def _distance(run: OpenedRun, loss: Loss, batch: Batch, index: int) -> float:
    """Returns the summed distance of both networks' outputs, on one batch of the held-out data.

    Args:
        index: the batch's place, from which masked tokens are drawn.
    """
    inputs, labels = prepare(loss, batch, drawing(run.seed, -1 - index))
    total = 0.0
    with torch.no_grad():
        runs = [InParts(network, run.chain, inputs) for network in (run.before, run.after)]
        for part in runs[0].parts:
            old, new = (one.outputs(part) for one in runs)
            wanted = None if labels is None else part.of(labels)
            total += _difference(loss, old, new, wanted, masks_of(part.cut(inputs)))
    return total


def _difference(loss: Loss, old: Any, new: Any, labels: Tensor | None, masks: Masks) -> float:
    """Returns the summed distance of both networks' outputs."""
    if loss.kind == "output":
        pairs = zip(floating_outputs(new), floating_outputs(old), strict=True)
        return sum(0.5 * _square(unpadded(a.double() - b.double(), masks)) for a, b in pairs)
    first, second = (_predictions(x, loss, labels, masks) for x in (old, new))
    total = 0.0
    for a, b in zip(first.split(ROWS), second.split(ROWS), strict=True):
        p, q = a.double().log_softmax(-1), b.double().log_softmax(-1)
        total += (p.exp() * (p - q)).sum().item()
    return total


def _check_windows(
    run: OpenedRun,
    stated: Mapping[str, Any],
    kept_out: Sequences,
    loss: Loss,
    size: int,
    *,
    first: int,
) -> None:
    """Checks the error of every window's output, on the sequences that were held out.

    Args:
        size: the sequences in a batch.
        first: the place of the first batch, from which masked tokens are drawn.
    """
    what = "the errors of the windows' outputs are what both networks give"
    if not stated["after"] < stated["before"]:
        reason = "the network was no better with these windows, so they are not what is written"
        run.findings.not_checked("recovery.windows", what, reason, by_design=True)
        return
    last = [window["blocks"][-1] for window in stated["windows"]]
    errors, squares = dict.fromkeys(last, 0.0), dict.fromkeys(last, 0.0)
    for index, batch in enumerate(kept_out.batches(size)):
        inputs, _ = prepare(loss, batch, drawing(run.seed, first + index))
        masks = masks_of(inputs)
        old, new = (_outputs_of(network, last, inputs) for network in (run.before, run.after))
        for name in last:
            errors[name] += _square(unpadded(new[name].double() - old[name].double(), masks))
            squares[name] += _square(unpadded(old[name].double(), masks))
    for window in stated["windows"]:
        name = window["blocks"][-1]
        found = errors[name] / (squares[name] or 1.0)
        problem = objective_problem(window["after"], found, run.before.dtype)
        run.findings.judge("recovery.windows", f"{what}, up to {name}", problem)


def _outputs_of(network: Network, names: Sequence[str], inputs: Batch) -> dict[str, Tensor]:
    """Returns the hidden states that some blocks of a network return."""
    found: dict[str, Tensor] = {}

    def note(name: str, _: Any, __: Any, output: Any) -> None:
        hidden = hidden_output(output)
        assert hidden is not None
        found[name] = hidden.clone()

    with torch.no_grad(), around_calls(network.module, names, after=note):
        network(inputs)
    return found


def _square(rows: Tensor) -> float:
    return rows.square().sum().item()


def _predictions(outputs: Any, loss: Loss, labels: Tensor | None, masks: Masks) -> Tensor:
    logits = floating_outputs(outputs)[0]
    if loss.kind == "masked_token" and labels is not None:
        return logits[(labels != UNSCORED).to(logits.device)]
    return unpadded(logits, masks).reshape(-1, logits.shape[-1])
