"""The convex programme for a layer before a ReLU is solved, truncated and polished here.

With Y = relu(W X + b) and Q = Z X + b^, per token and with a ridge l as for sequential fitting:

    h(Z) = min over b^ of sum L(Q) / T  +  l/2 ||S (W - Z)||_F^2  convex, L as in relu_errors.py
    P(Z) = h(Z) + c ||Z R||_*                                     R R^T = G + l I, G around the mean

S^2 is the diagonal matrix of the shares of tokens for which an output is alive, so that the ridge,
like the error, does not ask for what the ReLU cuts off.

The nuclear norm is taken of the outputs, and the bias stays outside of this norm (docs/theory.md,
after Zhang & Saab 2025). In the coordinates A = Z R the curvature of h is at most 1, because the
curvature of L is at most 1. So proximal gradient steps have length 1, and where nothing dies one
step from anywhere gives the solution. The solution is cut to rank r and polished by the steps
A <- truncated(A - gradient), which lower the true error

    1/2 ||Y - relu(Q)||_F^2 / T  +  l/2 ||S (W - Z)||_F^2

The true error has a quadratic majorant of curvature 1. A truncated singular value decomposition
gives the least value of this majorant over rank r, so no step raises the error.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lrc_cli.engine.linalg import cholesky, eigenpairs, eigenvalues, is_wide
from lrc_cli.engine.solvers.relu_errors import (
    best_offset,
    majorant,
    majorant_slope,
    true_error,
    true_slope,
)

CHUNK_ELEMENTS = 2**24
"""The number of entries of a (tokens, outputs) matrix that are held at a time."""

TOLERANCE = 5e-3
"""The certified gap at which the steps end, relative to the objective."""

MAX_STEPS, CHECK_EVERY = 200, 5
POLISH_STEPS, POLISH_PATIENCE, POLISH_GAIN = 60, 5, 1e-3


class Convex(NamedTuple):
    """A solution of the convex programme."""

    point: Tensor
    """The matrix A = Z R, (m, n) float64."""
    penalty: float
    """The weight c of the nuclear norm."""
    objective: float
    """The value P(Z)."""
    gap: float
    """A proven bound: P(Z) exceeds the least value by at most this number."""
    steps: int


class Polished(NamedTuple):
    """A matrix of rank r with its bias."""

    point: Tensor
    """The matrix A = Z R, (m, n) float64."""
    centre: Tensor
    """The value (m,) of Q at the mean input: b^ + Z mean."""
    value: float
    """The true error with the ridge."""


class _Pass(NamedTuple):
    """One pass over the activations, at some A."""

    value: float
    gradient: Tensor
    """The gradient by A, (m, n)."""
    centre: Tensor
    """The centre (m,) of the bias that was used."""
    centre_gradient: Tensor
    """The gradient by the centre, (m,)."""


@dataclass(frozen=True, kw_only=True)
class Programme:
    """One layer's data. Products are taken in the activations' dtype, everything else in float64.

    The activations are streamed: X may be a view of a file, and Y is computed again some columns at
    a time. Memory is some chunks of CHUNK_ELEMENTS and some dozen (m, n) matrices in float64.
    """

    weight: Tensor
    """W (m, n) float64."""
    inputs: Tensor
    """X^T (T, n): a row for every token, float32 or float64."""
    bias: Tensor | None
    """b (m,) float64."""
    mean: Tensor
    """The mean input (n,) float64 where the bias is free; zeros where there is none."""
    free_bias: bool
    """Whether the layer has a bias, which may change. Otherwise the bias is zero and stays zero."""
    root: Tensor
    """R (n, n) float64, lower triangular."""
    ridge: Tensor
    """l S^2, (m, 1) float64."""

    def unwhitened(self, point: Tensor) -> Tensor:
        """Z = A R^-1."""
        return torch.linalg.solve_triangular(self.root, point, upper=False, left=False)

    def blocks(self) -> Iterator[slice]:
        """The slices of outputs that are taken together."""
        size = max(1, CHUNK_ELEMENTS // max(len(self.inputs), 1))
        for start in range(0, len(self.weight), size):
            yield slice(start, start + size)

    def targets(self, block: slice) -> Tensor:
        """Some columns (T, k) of Y^T."""
        outputs = self.products(self.weight, block)
        if self.bias is not None:
            outputs += self.bias[block].to(outputs.dtype)
        return outputs.relu_()

    def products(self, matrix: Tensor, block: slice) -> Tensor:
        """The outputs (T, k) of some rows of Z, without a bias."""
        return self.inputs @ matrix[block].to(self.inputs.dtype).T

    def convex(
        self, rank: int, *, tolerance: float = TOLERANCE, max_steps: int = MAX_STEPS
    ) -> Convex:
        """The solution after accelerated proximal gradient steps, restarted where they turn back.

        The penalty is singular value r + 1 of the gradient at Z = 0, above which the r leading
        directions enter. Where nothing dies this penalty gives a solution of rank r exactly.

        The gap follows from convexity, for any A whose bias is the best bias:
        P(A) - P(A*) <= <G, A> + c ||A||_* + max(||G||_2 - c, 0) P(A) / c, where G is the gradient
        of h, because c ||A*||_* <= P(A*) <= P(A).

        Args:
            rank: r, which sets the penalty.
            tolerance: the gap at which the steps end, relative to the objective.
        """
        # The gradient at Z = 0 sets the penalty.
        zero = self._pass(torch.zeros_like(self.weight), None)
        bounds = eigenvalues(_small(zero.gradient)).sqrt()
        penalty = bounds[rank].item() if rank < len(bounds) else 0.0
        start = self.weight @ self.root
        if penalty <= 1e-6 * bounds[0].item():  # W itself, whose error is zero, costs nothing
            return Convex(start, 0.0, 0.0, 0.0, 0)
        # Steps with momentum follow, until the gap is small enough.
        current, nuclear = _shrunk(start, penalty)
        ahead, momentum = current, 1.0
        for step in range(max_steps + 1):
            if step % CHECK_EVERY == 0 or step == max_steps:
                here = self._pass(current, None)
                objective = here.value + penalty * nuclear
                gap = _gap(here, current, nuclear, penalty, objective)
                if gap <= tolerance * objective or step == max_steps:
                    break
            new, nuclear = _shrunk(ahead - self._pass(ahead, None).gradient, penalty)
            if torch.sum((ahead - new) * (new - current)) > 0:
                momentum = 1.0
            following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
            ahead = new + (momentum - 1) / following * (new - current)
            current, momentum = new, following
        return Convex(current, penalty, objective, gap, step)

    def polished(
        self, point: Tensor, rank: int, centre: Tensor | None = None, max_steps: int = POLISH_STEPS
    ) -> Polished:
        """The matrix whose true error was lowered from a start, and never raised.

        Args:
            point: A, (m, n), of any rank; A is truncated first.
            centre: the centre (m,) of the first bias; None: the best bias of the majorant.
        """
        best = _truncated(point, rank)
        if centre is None:
            centre = self._pass(best, None).centre
        here = self._pass(best, centre)
        previous, turn, milestone = best, 0, here.value
        for step in range(1, max_steps + 1):
            push = turn / (turn + 3) * (best - previous)
            tried = _truncated(best - here.gradient + push, rank)
            there = self._pass(tried, here.centre - here.centre_gradient)
            if there.value <= here.value:
                previous, best, here, turn = best, tried, there, turn + 1
            elif turn == 0:  # a plain step cannot raise the error: only rounding is left
                break
            else:
                previous, turn = best, 0
            if step % POLISH_PATIENCE == 0:
                if here.value > (1 - POLISH_GAIN) * milestone:
                    break
                milestone = here.value
        return Polished(best, here.centre, here.value)

    def _pass(self, point: Tensor, centre: Tensor | None) -> _Pass:
        """The value and gradient of h at its best bias, or of the true error at `centre`."""
        matrix = self.unwhitened(point)
        cost, slope = (majorant, majorant_slope) if centre is None else (true_error, true_slope)
        base = torch.zeros_like(matrix[:, 0]) if centre is None else centre
        offsets = base - matrix @ self.mean
        total, found, sums = 0.0, [], []
        gradient = torch.empty_like(self.weight)
        for block in self.blocks():
            pre, target = self.products(matrix, block), self.targets(block)
            pre += offsets[block].to(pre.dtype)
            if centre is None and self.free_bias:
                found.append(best_offset(pre, target))
                pre += found[-1]
            total += cost(pre, target).sum(dim=0).double().sum().item()
            slopes = slope(pre, target)
            gradient[block] = (slopes.T @ self.inputs).double()
            sums.append(slopes.sum(dim=0).double())
        num_tokens, change = len(self.inputs), matrix - self.weight
        by_centre = torch.cat(sums) / num_tokens * self.free_bias
        gradient = gradient / num_tokens - torch.outer(by_centre, self.mean) + self.ridge * change
        value = total / num_tokens + 0.5 * torch.sum(self.ridge * change**2).item()
        whitened = torch.linalg.solve_triangular(self.root, gradient.T, upper=False).T
        used = torch.cat(found).double() if found else base
        return _Pass(value, whitened, used, by_centre)


def programme(
    weight: Tensor, bias: Tensor | None, inputs: Tensor, gram: Tensor, mean: Tensor, ridge: float
) -> Programme:
    """The programme of one layer.

    Args:
        weight: W (m, n) float64.
        bias: b (m,) float64, or None where the layer has none.
        inputs: (T, n), float32 or float64.
        gram: the inputs' second moments (n, n) float64, around `mean` where there is a bias.
        mean: the mean input (n,) float64.
        ridge: l as a share of the mean diagonal of `gram`, above 0.
    """
    diagonal = gram.diagonal().mean().item()
    scale = ridge * diagonal if diagonal > 0 else ridge
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    found = Programme(
        weight=weight,
        inputs=inputs,
        bias=bias,
        mean=torch.zeros_like(mean) if bias is None else mean,
        free_bias=bias is not None,
        root=cholesky(gram + scale * identity, "regularised Gram"),
        ridge=scale * torch.ones_like(weight[:, :1]),
    )
    alive = torch.cat([(found.targets(block) > 0).sum(dim=0) for block in found.blocks()])
    return replace(found, ridge=scale * alive.double()[:, None] / len(inputs))


def _gap(here: _Pass, point: Tensor, nuclear: float, penalty: float, objective: float) -> float:
    steepest = eigenvalues(_small(here.gradient))[0].sqrt().item()
    aligned = torch.sum(here.gradient * point).item() + penalty * nuclear
    return max(aligned, 0.0) + max(steepest - penalty, 0.0) * objective / penalty


def _small(matrix: Tensor) -> Tensor:
    """The smaller of A A^T and A^T A, whose eigenvalues are the squared singular values."""
    return matrix @ matrix.T if is_wide(matrix) else matrix.T @ matrix


def _filtered(matrix: Tensor, gains: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """The matrix A with singular values s multiplied by gains(s), and s (k,), descending."""
    values, vectors = eigenpairs(_small(matrix))
    singular = values.sqrt()
    scaled = vectors * gains(singular)
    if is_wide(matrix):
        return scaled @ (vectors.T @ matrix), singular
    return (matrix @ scaled) @ vectors.T, singular


def _shrunk(matrix: Tensor, penalty: float) -> tuple[Tensor, float]:
    """The proximal step of the nuclear norm, s becomes (s - c)_+, and the result's nuclear norm."""

    def gains(s: Tensor) -> Tensor:
        return (1 - penalty / s.clamp(min=penalty)).clamp(min=0)

    shrunk, singular = _filtered(matrix, gains)
    return shrunk, (singular - penalty).clamp(min=0).sum().item()


def _truncated(matrix: Tensor, rank: int) -> Tensor:
    """The best approximation of rank r."""
    return _filtered(matrix, lambda s: (torch.arange(len(s), device=s.device) < rank).to(s.dtype))[
        0
    ]
