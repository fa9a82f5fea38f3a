"""Errors behind a ReLU are measured here, entry by entry, and biases that lower them are found.

Pre-activations Q (T, k) and targets Y = relu(.) >= 0 have the same shape; columns are outputs:

    true error  f(Q) = 1/2 (Y - relu(Q))^2
    majorant    L(Q) = 1/2 relu(Q)^2 - Y Q + 1/2 Y^2 = f(Q) + Y relu(-Q)

L is convex, at least f, and equal to f where Q >= 0. L is the smallest such function, because a
convex function cannot fall faster on the left of 0 than at 0 (docs/theory.md, after Zhang & Saab
2025). f itself has the quadratic majorant f(P) + f'(P) (Q - P) + 1/2 (Q - P)^2 at every P, on which
the steps that lower f rest.
"""

import torch
from torch import Tensor

NEWTON_STEPS = 60
REFINING_STEPS = 4


def majorant(pre: Tensor, target: Tensor) -> Tensor:
    """The majorant L(Q), entry by entry."""
    return 0.5 * pre.relu().square() - target * pre + 0.5 * target.square()


def majorant_slope(pre: Tensor, target: Tensor) -> Tensor:
    """The slope L'(Q) = relu(Q) - Y, whose own slope is 0 or 1."""
    return pre.relu() - target


def true_error(pre: Tensor, target: Tensor) -> Tensor:
    """The true error f(Q), entry by entry."""
    return 0.5 * (target - pre.relu()).square()


def true_slope(pre: Tensor, target: Tensor) -> Tensor:
    """The slope f'(Q): Q - Y where Q > 0, else 0."""
    return torch.where(pre > 0, pre - target, torch.zeros_like(pre))


def best_offset(pre: Tensor, target: Tensor) -> Tensor:
    """The b (k,) that minimises the sum over the rows of L(Q + b), for every column.

    b is the root of sum relu(Q + b) = sum Y, whose left side is convex, increasing and piecewise
    linear in b. Newton's method from b = mean(Y - Q), where the left side is too large, comes down
    to the root in finitely many steps. A column whose Y is zero throughout takes the largest b that
    keeps the column dead.

    Args:
        pre: Q, (T, k).
        target: Y, (T, k).
    """
    dead = -pre.amax(dim=0)
    wanted = target.sum(dim=0)
    offset = (wanted - pre.sum(dim=0)) / len(pre)
    for _ in range(NEWTON_STEPS):
        shifted = pre + offset
        alive = (shifted > 0).sum(dim=0)
        step = (shifted.relu().sum(dim=0) - wanted) / alive.clamp(min=1)
        if not (step > torch.finfo(pre.dtype).eps * shifted.abs().amax(dim=0)).any():
            break
        offset = offset - step.clamp(min=0)
    return torch.where(wanted > 0, offset, dead)


def refined_offset(pre: Tensor, target: Tensor, starts: list[Tensor], dtype: torch.dtype) -> Tensor:
    """A b (k,), rounded to `dtype`, whose sum over the rows of f(Q + b) is low, for every column.

    f is not convex in b. So every start is followed by steps to the mean of Y - Q over the rows
    that are alive, and the best of all tried biases is taken. No start does better than the result.

    Args:
        pre: Q, (T, k).
        target: Y, (T, k).
        starts: biases to start from, each (k,) float64.
        dtype: the dtype in which b will be stored.
    """
    best, least = starts[0], torch.full_like(starts[0], torch.inf)
    for start in starts:
        offset = start
        for _ in range(REFINING_STEPS):
            offset = offset.to(dtype).to(start.dtype)
            shifted = pre + offset.to(pre.dtype)
            error = true_error(shifted, target).sum(dim=0).to(start.dtype)
            best = torch.where(error < least, offset, best)
            least = torch.minimum(error, least)
            alive = (shifted > 0).sum(dim=0)
            offset = offset - true_slope(shifted, target).sum(dim=0) / alive.clamp(min=1)
    return best
