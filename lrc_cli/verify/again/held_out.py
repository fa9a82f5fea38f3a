"""Quality and C2 are measured once more, over the evaluation and the certification data."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lrc_cli.data.draw import Batch, Sequences
from lrc_cli.data.padding import masks_of
from lrc_cli.execution.chain import Chain, find_chain
from lrc_cli.execution.hooks import watched
from lrc_cli.execution.in_parts import InParts
from lrc_cli.execution.losses import UNSCORED, Loss, prepare
from lrc_cli.execution.network import Network
from lrc_cli.execution.outputs import floating_outputs
from lrc_cli.execution.tail import EVERYTHING
from lrc_cli.network.experts import is_expert
from lrc_cli.network.layer import Layer
from lrc_cli.verify.again.moments import batch_size

QUALITY_TOKENS = 1024
"""The number of tokens that run together, as in the run."""
HELD_TOKENS = 512
LARGEST_RATIO = 2.0**24
"""The largest relative error, which an output of 0 gets (docs/theory.md)."""
KINDS = ("deployed", "inherited", "new", "same_input")

Values = dict[str, list[float]]


def measure_quality(
    before: Network,
    after: Network,
    sequences: Sequences,
    loss: Loss,
    seed: int,
    advance: Callable[[float], None],
) -> dict[str, float]:
    """Returns a row of report["quality"], measured over all scored positions together."""
    totals: dict[str, float] = {}
    generator = torch.Generator().manual_seed(seed)
    chain = find_chain(before, next(sequences.batches(1)))
    for batch in sequences.batches(batch_size(sequences, QUALITY_TOKENS)):
        inputs, labels = prepare(loss, batch, generator)
        with torch.no_grad():
            runs = [InParts(network, chain, inputs) for network in (before, after)]
            for part in runs[0].parts:
                wanted = None if labels is None else part.of(labels)
                old, new = (run.outputs(part) for run in runs)
                for found in _scores(old, new, wanted, part.cut(batch)):
                    _add(totals, found)
        advance(len(next(iter(batch.values()))))
    count = totals.get("count", 0.0)
    row = {"num_scored": totals.get("count", totals.get("positions", 0.0))}
    if "energy" in totals:
        row["relative_output_error"] = _root(totals["error"], totals["energy"])
    if count:
        row |= {"kl": totals["kl"] / count, "top1_agreement": 1 - totals["changed"] / count}
    if "before" in totals:
        row |= {f"loss_{side}": totals[side] / count for side in ("before", "after")}
    return row


def _add(totals: dict[str, float], found: Mapping[str, float]) -> None:
    for name, value in found.items():
        totals[name] = totals.get(name, 0.0) + value


def _root(error: float, energy: float) -> float:
    """Returns sqrt(error / energy), at most LARGEST_RATIO; 0 where there is no error."""
    return math.sqrt(error / max(energy, error / LARGEST_RATIO**2)) if error else 0.0


def _scores(old: Any, new: Any, labels: Tensor | None, batch: Batch) -> list[dict[str, float]]:
    """Returns sums for every sequence of a micro-batch, in order.

    Outputs without an entry for every sequence count as one sequence.
    """
    if labels is not None:
        return [_token_sums(old.logits[i], new.logits[i], labels[i]) for i in range(len(labels))]
    first, second = (floating_outputs(outputs)[0].float() for outputs in (old, new))
    has_logits = getattr(old, "logits", None) is not None and first.shape[-1] > 1
    rows = _by_sequence(first, batch), _by_sequence(second, batch)
    sums = []
    for a, b in zip(*rows, strict=True):
        found = {
            "energy": a.double().square().sum().item(),
            "error": (a - b).double().square().sum().item(),
            "positions": float(a[..., 0].numel()) if a.ndim else 1.0,
        }
        if has_logits:
            found |= _prediction_sums(a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1]))
        sums.append(found)
    return sums


def _by_sequence(tensor: Tensor, batch: Batch) -> list[Tensor]:
    """Returns the real entries of each sequence; one entry of everything without such an axis."""
    count = len(next(iter(batch.values())))
    masks = masks_of(batch)
    for mask in masks:
        if tensor.ndim == 2 and len(tensor) == mask.numel() > count:
            tensor = tensor.view(*mask.shape, -1)
    if tensor.ndim == 0 or len(tensor) != count:
        return [tensor]
    for mask in masks:
        if tensor.ndim >= 3 and tensor.shape[:2] == mask.shape:
            real = mask.to(tensor.device).bool()
            return [row[own] for row, own in zip(tensor, real, strict=True)]
    return list(tensor)


def _token_sums(old: Tensor, new: Tensor, labels: Tensor) -> dict[str, float]:
    scored = (labels != UNSCORED).to(old.device)
    wanted = labels.to(old.device)[scored]
    first, second = old[scored].float(), new[scored].float()
    losses = [
        -x.log_softmax(-1).gather(1, wanted[:, None]).double().sum().item() for x in (first, second)
    ]
    return {"before": losses[0], "after": losses[1], **_prediction_sums(first, second)}


def _prediction_sums(old: Tensor, new: Tensor) -> dict[str, float]:
    """Returns KL(old

    new) = sum p (log p - log q) and changed predictions, over rows of logits.
    """
    p, q = old.log_softmax(-1), new.log_softmax(-1)
    divergence = functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    return {
        "kl": divergence.double().sum().item(),
        "changed": float((old.argmax(-1) != new.argmax(-1)).sum()),
        "count": float(len(old)),
    }


@dataclass(kw_only=True)
class HeldOut:
    """Holds what was measured on N sequences, in the order of the draw."""

    values: Values = field(default_factory=dict)
    """The values of each quantity."""
    squares: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """The squared errors of each layer and kind, sequence by sequence; "energy" is ||W x||^2."""

    def relative(self, layer: str, kind: str) -> list[float]:
        """Returns a layer's error on each sequence."""
        found = self.squares[layer]
        return [_root(e, total) for e, total in zip(found[kind], found["energy"], strict=True)]

    def overall(self, layer: str, kind: str) -> float:
        """Returns a layer's error over all sequences together."""
        found = self.squares[layer]
        return _root(math.fsum(found[kind]), math.fsum(found["energy"]))


def measure_held_out(
    before: Network,
    after: Network,
    sequences: Sequences,
    layers: Sequence[Layer],
    *,
    loss: Loss,
    seed: int,
    parts: bool,
    advance: Callable[[float], None],
) -> HeldOut:
    """Runs both networks over the same sequences and takes every layer's errors on each of them.

    A layer's own error compares the outputs that both networks' layers, as they are held, give for
    the same input. In bfloat16 the outputs' rounding may exceed what the factors change, and the
    promise is about what is deployed.

    Args:
        parts: whether `new` and `inherited` are wanted.
    """
    # An expert may by chance be given as many tokens as there are sequences.
    layers = [x for x in layers if not is_expert(before.module, x.name)]
    inputs, labels = prepare(loss, sequences.inputs, torch.Generator().manual_seed(seed))
    found = HeldOut()
    size, chain = batch_size(sequences, HELD_TOKENS), find_chain(before, next(sequences.batches(1)))
    for start in range(0, len(sequences), size):
        batch = {name: tensor[start : start + size] for name, tensor in inputs.items()}
        scored = None if labels is None else labels[start : start + size]
        count = len(next(iter(batch.values())))
        with torch.no_grad():
            scores = _followed(before, after, chain, batch, scored, layers, found, parts)
        if len(scores) == count:
            for sums in scores:
                _append(found.values, sums)
        advance(count)
    kinds = KINDS if parts else ("deployed", "same_input")
    whole = [x for x, sums in found.squares.items() if _is_whole(sums, kinds, len(sequences))]
    found.squares = {name: found.squares[name] for name in whole}
    return found


def _is_whole(sums: Mapping[str, list[float]], kinds: Sequence[str], count: int) -> bool:
    return all(len(sums.get(kind, ())) == count for kind in ("energy", *kinds))


def _append(values: Values, part: Mapping[str, float]) -> None:
    count = part.get("count", 0.0)
    row: dict[str, float] = {}
    if "kl" in part:
        row["kl"] = max(0.0, part["kl"] / count) if count else 0.0
        row["top1_disagreement"] = part["changed"] / count if count else 0.0
    if "before" in part:
        row["loss_difference"] = (part["after"] - part["before"]) / count if count else 0.0
    if "energy" in part:
        row["relative_output_error"] = _root(part["error"], part["energy"])
    for name, value in row.items():
        values.setdefault(name, []).append(value)


def _followed(
    before: Network,
    after: Network,
    chain: Chain,
    batch: Batch,
    labels: Tensor | None,
    layers: Sequence[Layer],
    found: HeldOut,
    parts: bool,
) -> list[dict[str, float]]:
    """Returns sums of the outputs for every sequence; every layer's squares go to `found`."""
    outputs: dict[str, list[Tensor]] = {}
    sums: dict[str, dict[str, list[float]]] = {}
    part, own = EVERYTHING, batch

    def add(name: str, kind: str, rows: Tensor) -> None:
        pieces = _by_sequence(_unflattened(rows, own), own)
        squares = [piece.double().square().sum().item() for piece in pieces]
        if part != EVERYTHING and len(squares) == len(next(iter(own.values()))):
            behind = len(next(iter(batch.values()))) - part.start - len(squares)
            squares = [0.0] * part.start + squares + [0.0] * behind
        earlier = sums.setdefault(name, {}).get(kind, [0.0] * len(squares))
        # A call on some of the sequences, such as a recurrence's last steps, tells of none of them.
        same = len(earlier) == len(squares)
        sums[name][kind] = [a + b for a, b in zip(earlier, squares, strict=True)] if same else []

    def difference(layer: Layer, first: Tensor, second: Tensor) -> Tensor:
        return layer.layout.outputs(first.float() - second.float())

    def in_dense(layer: Layer, x: Tensor, y: Tensor) -> None:
        bias = getattr(before.module.get_submodule(layer.name), "bias", None)
        rows = layer.layout.outputs(y).float()
        add(layer.name, "energy", rows if bias is None else rows - bias.float())
        add(layer.name, "same_input", difference(layer, y, _called(after, layer, x)))
        outputs.setdefault(layer.name, []).append(y.clone())

    def in_compressed(layer: Layer, x: Tensor, y: Tensor) -> None:
        left = outputs.get(layer.name)
        if not left or left[0].shape != y.shape:
            return
        wanted = left.pop(0)
        add(layer.name, "deployed", difference(layer, wanted, y))
        if parts:
            between = _called(before, layer, x)
            add(layer.name, "inherited", difference(layer, wanted, between))
            add(layer.name, "new", difference(layer, between, y))

    scores: list[dict[str, float]] = []
    # The networks' layers are called on each other's inputs, and such a call is not looked at.
    with watched(before, layers, in_dense):
        dense = InParts(before, chain, batch)
    with watched(after, layers, in_compressed):
        compressed = InParts(after, chain, batch)
    for part in dense.parts:
        own = part.cut(batch)
        with watched(before, layers, in_dense):
            old = dense.outputs(part)
        with watched(after, layers, in_compressed):
            new = compressed.outputs(part)
        wanted = None if labels is None else part.of(labels)
        for index, one in enumerate(_scores(old, new, wanted, own), part.start):
            scores += [{} for _ in range(index + 1 - len(scores))]
            _add(scores[index], one)
    for name, kinds in sums.items():
        for kind, squares in kinds.items():
            found.squares.setdefault(name, {}).setdefault(kind, []).extend(squares)
    return scores


def _called(network: Network, layer: Layer, x: Tensor) -> Tensor:
    """Returns what a network's own layer makes of the other network's inputs, rounded as in use."""
    network.placement.occupy(layer.name)
    outputs: Tensor = network.module.get_submodule(layer.name)(x)
    return outputs


def _unflattened(rows: Tensor, batch: Batch) -> Tensor:
    """Returns (sequences, tokens, width) of rows kept as (sequences * tokens, width)."""
    ids = batch.get("input_ids")
    for tokens in masks_of(batch) or (() if ids is None else (ids,)):
        if rows.ndim == 2 and len(rows) == tokens.numel() > len(tokens):
            return rows.view(*tokens.shape, -1)
    return rows
