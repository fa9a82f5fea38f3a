"""Two networks' outputs are compared sequence by sequence, and padding is left out."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lrc_cli.data.draw import Batch
from lrc_cli.data.padding import masks_of, unpadded
from lrc_cli.engine.magnitudes import norms
from lrc_cli.execution.losses import UNSCORED, floating_outputs
from lrc_cli.quality.compare import LARGEST_RATIO


def ratio(error: Tensor, energy: Tensor) -> Tensor:
    """Returns sqrt(error / energy), at most LARGEST_RATIO; 0 without error, NaN if any is inf."""
    floor = error / LARGEST_RATIO**2
    return (error / torch.maximum(energy, floor)).sqrt().masked_fill(error == 0, 0.0)


def by_sequence(rows: Tensor, batch: Batch) -> Tensor | None:
    """Returns sums over each sequence's real tokens, (sequences,).

    It returns None where the sequences cannot be told apart.

    Args:
        rows: (sequences, ...) or, flattened by the model, (sequences * tokens,).
        batch: the inputs; `attention_mask` tells which tokens are real.
    """
    num_sequences = len(next(iter(batch.values())))
    ids = batch.get("input_ids")
    for tokens in masks_of(batch) or (() if ids is None else (ids,)):
        if rows.ndim == 1 and len(rows) == tokens.numel():
            rows = rows.view(tokens.shape)
    if rows.ndim == 0 or len(rows) != num_sequences:
        return None
    for mask in masks_of(batch):
        if rows.shape[:2] == mask.shape:
            real = mask.to(rows.device).bool().view(*mask.shape, *[1] * (rows.ndim - 2))
            rows = rows * real
            break
    return rows.flatten(1).sum(dim=1) if rows.ndim > 1 else rows


def values_of(
    old: Any, new: Any, batch: Batch, labels: Tensor | None, start: int
) -> dict[str, list[float]]:
    """Returns the quantities, with one value per sequence of a micro-batch; see `held_out.measure`.

    Args:
        old, new: both networks' outputs.
        labels: what `losses.prepare` returns for all sequences.
        start: the number of the batch's first sequence.
    """
    if labels is None:
        return _output_values(old, new, batch)
    found: dict[str, list[float]] = {}
    for index, (first, second) in enumerate(zip(old.logits, new.logits, strict=True)):
        wanted = labels[start + index].to(first.device)
        scored = wanted != UNSCORED
        for name, value in _predictions(first[scored], second[scored], wanted[scored]).items():
            found.setdefault(name, []).append(value)
    return found


def _output_values(old: Any, new: Any, batch: Batch) -> dict[str, list[float]]:
    first, second = (floating_outputs(outputs)[0].float() for outputs in (old, new))
    if first.ndim < 2:
        first, second = first[..., None], second[..., None]
    squares = (norms(x).square() for x in (first, second - first))
    energy, error = (by_sequence(rows, batch) for rows in squares)
    if energy is None or error is None:
        return {}
    ratios = ratio(error, energy).tolist()
    found = {"relative_output_error": ratios}
    if getattr(old, "logits", None) is None or first.shape[-1] < 2:
        return found
    for index in range(len(ratios)):
        own = tuple(mask[index : index + 1] for mask in masks_of(batch))
        sides = (unpadded(x[index : index + 1], own).flatten(0, -2) for x in (first, second))
        for name, value in _predictions(*sides).items():
            found.setdefault(name, []).append(value)
    return found


def _predictions(old: Tensor, new: Tensor, wanted: Tensor | None = None) -> dict[str, float]:
    """Returns means over the predictions (rows of logits) of one sequence; 0 where it has none."""
    log_old, log_new = old.float().log_softmax(-1), new.float().log_softmax(-1)
    # Rounding may leave a divergence of equal predictions a little below 0; NaN stays NaN.
    kl = functional.kl_div(log_new, log_old, reduction="none", log_target=True).sum(-1).clamp(min=0)
    each = {"kl": kl, "top1_disagreement": old.argmax(-1) != new.argmax(-1)}
    if wanted is not None:
        each["loss_difference"] = (log_old - log_new).gather(-1, wanted[:, None])
    return {name: x.double().mean().item() if len(old) else 0.0 for name, x in each.items()}
