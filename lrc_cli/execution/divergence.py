"""The distance of a network's outputs from another network's, with gradients in little memory.

Predictions (logits) are compared by their Kullback-Leibler divergence, other outputs by half their
squared difference: the same choice as for the loss of `curvature`.
"""

from typing import Any

import torch
from torch import Tensor

from lrc_cli.data.padding import Masks, unpadded
from lrc_cli.execution.losses import UNSCORED, Loss
from lrc_cli.execution.outputs import floating_outputs

OBJECTIVES = {
    "next_token": "KL divergence of the next-token predictions, nats per token",
    "masked_token": "KL divergence of the predictions of masked tokens, nats per input token",
    "sampled": "KL divergence of the predicted classes, nats per token, or per sequence without",
    "output": "half the squared change of the outputs per token, or per sequence without",
}
"""The mean of the distance over tokens in words, by the kind of the loss."""
ROWS_AT_ONCE = 256
"""Rows of logits that are exponentiated at once."""


def divergence(
    loss: Loss, wanted: Any, outputs: Any, labels: Tensor | None, masks: Masks
) -> Tensor:
    """Returns the summed distance of `outputs` from `wanted`, a scalar in float32.

    For predictions, the distance is the Kullback-Leibler divergence in nats, summed over real
    tokens (over masked tokens for `masked_token`). Otherwise it is half the squared difference.

    Args:
        loss: the loss, which says what outputs are.
        wanted: what the original network returned; its logits are overwritten.
        outputs: what the compressed network returned.
        labels: the labels from `losses.prepare`; read for `masked_token` only.
        masks: the masks from `masks_of`.
    """
    if loss.kind != "output":
        pair = (_predictions(loss, x, labels, masks) for x in (outputs, wanted))
        found: Tensor = _Divergence.apply(*pair)
        return found
    pairs = zip(floating_outputs(outputs), floating_outputs(wanted), strict=True)
    differences = (unpadded(a.float() - b.float(), masks) for a, b in pairs)
    return sum((0.5 * x.square().sum() for x in differences), start=torch.zeros(()))


def _predictions(loss: Loss, outputs: Any, labels: Tensor | None, masks: Masks) -> Tensor:
    logits = floating_outputs(outputs)[0]
    if loss.kind == "masked_token":
        assert labels is not None
        return logits[(labels != UNSCORED).to(logits.device)].float()
    return unpadded(logits, masks).reshape(-1, logits.shape[-1]).float()


class _Divergence(torch.autograd.Function):
    """Sums KL(p || q) over rows, and keeps the gradient q - p in the memory of p's logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, wanted: Tensor) -> Tensor:
        total = torch.zeros((), device=logits.device, dtype=torch.float64)
        for q, p in zip(logits.split(ROWS_AT_ONCE), wanted.split(ROWS_AT_ONCE), strict=True):
            log_q, log_p = q.log_softmax(-1), p.log_softmax(-1)
            exp_p = log_p.exp()
            total += (exp_p * (log_p - log_q)).sum(dtype=torch.float64)
            p.copy_(log_q.exp_().sub_(exp_p))
        ctx.save_for_backward(wanted)
        return total.float()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (kept,) = ctx.saved_tensors
        return kept * gradient, None
