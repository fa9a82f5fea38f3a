"""Two networks' outputs are compared sequence by sequence, and padding is left out."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lrc_cli.data.draw import Batch
from lrc_cli.data.padding import masks_of, unpadded
from lrc_cli.engine.magnitudes import norms
from lrc_cli.execution.losses import UNSCORED
from lrc_cli.execution.outputs import floating_outputs
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


class SequenceValues:
    """The quantities of `held_out.measure` for each sequence of a micro-batch, part by part.

    Args:
        num_sequences: the number of sequences of the micro-batch.
    """

    def __init__(self, num_sequences: int) -> None:
        self._sums: list[dict[str, float]] = [{} for _ in range(num_sequences)]
        self._counts = [0] * num_sequences
        self._energy: Tensor | None = None
        self._error: Tensor | None = None

    def add(self, old: Any, new: Any, batch: Batch, labels: Tensor | None, start: int) -> None:
        """Adds some positions of some sequences.

        Args:
            old, new: both networks' outputs.
            batch: the inputs of these positions.
            labels: what `losses.prepare` returns for these positions.
            start: the number of the first of these sequences in the micro-batch.
        """
        if labels is None:
            self._add_outputs(old, new, batch, start)
            return
        for index, (first, second) in enumerate(zip(old.logits, new.logits, strict=True), start):
            wanted = labels[index - start].to(first.device)
            scored = wanted != UNSCORED
            self._add_predictions(index, first[scored], second[scored], wanted[scored])

    def values(self) -> dict[str, list[float]]:
        """Returns the quantities, with one value per sequence.

        There are none where the output has no dimension for the sequences.
        """
        found: dict[str, list[float]] = {}
        if self._energy is not None and self._error is not None:
            found["relative_output_error"] = ratio(self._error, self._energy).tolist()
        for sums, count in zip(self._sums, self._counts, strict=True):
            for name, total in sums.items():
                found.setdefault(name, []).append(total / count if count else 0.0)
        return found

    def _add_outputs(self, old: Any, new: Any, batch: Batch, start: int) -> None:
        first, second = (floating_outputs(outputs)[0].float() for outputs in (old, new))
        if first.ndim < 2:
            first, second = first[..., None], second[..., None]
        squares = (norms(x).square() for x in (first, second - first))
        energy, error = (by_sequence(rows, batch) for rows in squares)
        if energy is None or error is None:
            return
        if self._energy is None or self._error is None:
            self._energy, self._error = (x.new_zeros(len(self._sums)) for x in (energy, error))
        rows = slice(start, start + len(energy))
        self._energy[rows] += energy
        self._error[rows] += error
        if getattr(old, "logits", None) is None or first.shape[-1] < 2:
            return
        for index in range(len(energy)):
            own = tuple(mask[index : index + 1] for mask in masks_of(batch))
            sides = (unpadded(x[index : index + 1], own).flatten(0, -2) for x in (first, second))
            self._add_predictions(start + index, *sides)

    def _add_predictions(
        self, index: int, old: Tensor, new: Tensor, wanted: Tensor | None = None
    ) -> None:
        """Adds predictions (rows of logits) of one sequence."""
        log_old, log_new = old.float().log_softmax(-1), new.float().log_softmax(-1)
        # Rounding may leave a divergence of equal predictions a little below 0; NaN stays NaN.
        kl = functional.kl_div(log_new, log_old, reduction="none", log_target=True)
        each = {"kl": kl.sum(-1).clamp(min=0)}
        each["top1_disagreement"] = old.argmax(-1) != new.argmax(-1)
        if wanted is not None:
            each["loss_difference"] = (log_old - log_new).gather(-1, wanted[:, None])
        self._counts[index] += len(old)
        sums = self._sums[index]
        for name, x in each.items():
            sums[name] = sums.get(name, 0.0) + x.double().sum().item()
