"""What a ReLU does to errors, entry by entry, and the biases that make up for it.

For pre-activations Q (T, k) and targets Y = relu(.) >= 0 of the same shape, columns being outputs:

    true error  f(Q) = 1/2 (Y - relu(Q))^2
    majorant    L(Q) = 1/2 relu(Q)^2 - Y Q + 1/2 Y^2 = f(Q) + Y relu(-Q)

L is convex, at least f, and equal to it where Q >= 0: the smallest such function, for a convex one
cannot fall faster on the left of 0 than it does at 0 (docs/theory.md, after Zhang & Saab
2025). f itself has the quadratic majorant f(P) + f'(P) (Q - P) + 1/2 (Q - P)^2 at every P, which is
what the steps that lower f rest on.
"""

import torch
from torch import Tensor

NEWTON_STEPS = 60
REFINING_STEPS = 4


def majorant(pre: Tensor, target: Tensor) -> Tensor:
    """L(Q), entry by entry."""
    return 0.5 * pre.relu().square() - target * pre + 0.5 * target.square()


def majorant_slope(pre: Tensor, target: Tensor) -> Tensor:
    """L'(Q) = relu(Q) - Y; its own slope is 0 or 1."""
    return pre.relu() - target


def true_error(pre: Tensor, target: Tensor) -> Tensor:
    """f(Q), entry by entry."""
    return 0.5 * (target - pre.relu()).square()


def true_slope(pre: Tensor, target: Tensor) -> Tensor:
    """f'(Q): Q - Y where Q > 0, else 0."""
    return torch.where(pre > 0, pre - target, torch.zeros_like(pre))


def best_offset(pre: Tensor, target: Tensor) -> Tensor:
    """The b (k,) that minimises the sum over the rows of L(Q + b), for every column.

    The root of sum relu(Q + b) = sum Y, which is convex, increasing and piecewise linear in b.
    Newton's method from b = mean(Y - Q), where the left side is too large, comes down to it in
    finitely many steps. A column whose Y is zero throughout takes the largest b that keeps it dead.

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

    f is not convex in b: every start is followed by steps to the mean of Y - Q over the rows that
    are alive, and of all that was seen the best is taken. So no start does better than the result.

    Args:
        pre: Q, (T, k).
        target: Y, (T, k).
        starts: each (k,), float64.
        dtype: in which b will be stored.
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
