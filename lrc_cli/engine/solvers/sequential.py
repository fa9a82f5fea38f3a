"""D0: Z x~ approximates W x, where x~ is what the layer's input became in the compressed network.

Let E = X - X~, C = X~ X~^T / T, S = E X~^T / T, V = E E^T / T and C_l = C + l I. Z minimises a mean
of two aims in the solver's metric F (docs/theory.md has the proof):

    J(Z) = a (||W X - Z X~||^2 / T + l ||W - Z||^2) + (1 - a) ||(W - Z) C_l^(1/2)||^2

The first aim is the dense network's outputs, the second the dense weights. Completing the square,

    W~ = W + a W S C_l^-1
    J(Z) = tr(F (W~ - Z) C_l (W~ - Z)^T) + a tr(F W (V - a S C_l^-1 S^T) W^T)

for any F: the solver's own problem on (W~, C_l), and an inherited part that no Z removes. Written
in E, nothing cancels where the two networks hardly differ. Where the bias is free, all moments are
taken around the mean inputs.

The correction W S C_l^-1 is a regression of the drift on x~, and a part of the correction is learnt
by heart. The share a that pays is measured on tokens that no such fit saw (`correction`).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lrc_cli.engine.linalg import cholesky, eigenpairs
from lrc_cli.engine.problem import Errors, Solution, Statistics
from lrc_cli.engine.solver import Solver
from lrc_cli.engine.solvers.approximation import Approximation
from lrc_cli.engine.solvers.frobenius import FROBENIUS
from lrc_cli.engine.solvers.same_input import SameInput

RESOLUTION = 2.0**-24
"""The resolution of C's eigenvalues at unit diagonal: products are rounded to float32."""


@dataclass(frozen=True, kw_only=True)
class Drift:
    """Holds second moments of a layer's inputs x in the dense and x~ in the compressed network.

    The moments are float64, over the same tokens. Where the means are given, the moments are around
    them.
    """

    compressed: Tensor
    """C = X~ X~^T / T, (n, n)."""
    cross: Tensor
    """S = (X - X~) X~^T / T, (n, n), not symmetric."""
    drift: Tensor
    """V = (X - X~) (X - X~)^T / T, (n, n)."""
    mean: Tensor | None = None
    """The mean of x (n,), where the bias is free."""
    mean_compressed: Tensor | None = None
    """The mean of x~ (n,), where the bias is free."""
    num_tokens: int
    """The number of tokens, T."""

    @property
    def gram(self) -> Tensor:
        """X X^T / T = C + S + S^T + V."""
        return self.compressed + self.cross + self.cross.T + self.drift

    def ridge(self, share: float) -> float:
        """Returns l: a share of C's mean diagonal, or the share itself where every x~ is zero."""
        mean = self.compressed.diagonal().mean().item()
        return share * mean if mean > 0 else share

    @cached_property
    def inverse_root(self) -> Tensor:
        """R (n, n) with R R^T a generalised inverse of C."""
        scale = self.compressed.diagonal().clamp(min=0).sqrt()
        safe = torch.where(scale > 0, scale, 1.0)
        values, vectors = eigenpairs(self.compressed / safe[:, None] / safe)
        inverse = torch.where(values > RESOLUTION * values[0], values.rsqrt(), 0.0)
        return vectors * inverse / safe[:, None]


class Sequential(Approximation):
    """A solver's problem on the inputs of the compressed network.

    Args:
        weight: W (m, n), any floating dtype.
        solver: `frobenius` or `curvature`.
        ridge: l as a share of the mean diagonal of C, above 0.
        correction: a in 0..1, or the moments of held-back tokens, on which it is measured.
        fisher: F (m, m) float64, where the solver needs it.
    """

    inputs = "compressed"

    def __init__(
        self,
        weight: Tensor,
        drift: Drift,
        solver: Solver,
        *,
        ridge: float,
        correction: float | Drift = 1.0,
        fisher: Tensor | None = None,
    ) -> None:
        self.weight = weight.double()
        self.moments = drift
        self._cross = self.weight @ drift.cross
        self._drift = self.weight @ drift.drift
        identity = torch.eye(len(drift.compressed), dtype=torch.float64, device=weight.device)
        gram = drift.compressed + drift.ridge(ridge) * identity
        step = torch.cholesky_solve(self._cross.T, cholesky(gram, "regularised Gram")).T
        statistics = Statistics(gram=gram, fisher=fisher)
        self.metric = solver.metric(statistics)
        self.correction = (
            _paying_share(self.weight, step, correction, self.metric.fisher)
            if isinstance(correction, Drift)
            else correction
        )
        """The share a."""
        step *= self.correction
        self._fit = SameInput(self.weight + step, statistics, solver)
        self.unit = f"{solver.unit}, on the compressed network's inputs, with ridge"
        left_over = self._left_over(step, self.metric.fisher)
        self.inherited = self.metric.scale * self.correction * left_over
        """The part of J that no Z removes, in the solver's unit."""

    @property
    def facts(self) -> dict[str, Any]:
        return {"correction": self.correction}

    def _left_over(self, step: Tensor, fisher: Tensor | None) -> float:
        """Returns tr(F (W V - A S^T) W^T) from A = `step`, a multiple of W S C^-.

        Rounding may leave a little less than nothing where it is zero, which counts as zero.
        """
        left = self.weight if fisher is None else fisher @ self.weight
        rows = self._drift - step @ self.moments.cross.T
        return max(torch.sum(left * rows).item(), 0.0)

    def solve(self, rank: int) -> Solution:
        return self._fit.solve(rank)

    def errors(self, fitted: Tensor) -> Errors:
        difference = self.weight - fitted
        output = torch.sum((difference @ self.moments.compressed + 2 * self._cross) * difference)
        output += torch.sum(self._drift * self.weight)
        metric = self._fit.errors(fitted).metric + self.inherited
        return Errors(metric, max(output.item(), 0.0))

    def optimum(self, rank: int) -> float:
        return self._fit.optimum(rank) + self.inherited

    def output_optimum(self, rank: int) -> float:
        """Returns the least output error without the ridge.

        W~ = W + W S C^-, for any generalised inverse C^- of C.
        """
        inherited, best = self._unregularised
        return inherited + best.optimum(rank)

    @cached_property
    def _unregularised(self) -> tuple[float, SameInput]:
        root = self.moments.inverse_root
        step = self._cross @ root @ root.T
        statistics = Statistics(gram=self.moments.compressed)
        return self._left_over(step, None), SameInput(self.weight + step, statistics, FROBENIUS)

    @property
    def total(self) -> float:
        return self._fit.total + self.inherited

    @property
    def energy(self) -> float:
        mean, weight = self.moments.mean, self.weight
        varying = torch.sum(weight @ self.moments.gram * weight).item()
        return varying if mean is None else varying + torch.sum((weight @ mean) ** 2).item()

    def shift(self, fitted: Tensor) -> Tensor | None:
        """Returns W mean(x) - Z mean(x~), the free bias of docs/theory.md."""
        mean, compressed = self.moments.mean, self.moments.mean_compressed
        if mean is None or compressed is None:
            return None
        return self.weight @ mean - fitted @ compressed


def _paying_share(weight: Tensor, step: Tensor, held: Drift, fisher: Tensor | None) -> float:
    """Returns the a in 0..1 that makes ||W E - a A X~||^2 in F least on held-back tokens.

    Args:
        step: A (m, n), the whole correction.
        held: moments of tokens on both networks' inputs, to which neither this layer nor a layer
            before it was fitted.
    """
    left = step if fisher is None else fisher @ step
    gained = torch.sum(left * (weight @ held.cross)).item()
    spent = torch.sum(left * (step @ held.compressed)).item()
    if spent > 0:
        return min(max(gained / spent, 0.0), 1.0)
    return 0.0 if torch.any(step) else 1.0  # a correction that nothing says pays, or none at all
