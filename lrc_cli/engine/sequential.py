"""D0: Z x~ approximates W x, where x~ is what the layer's input became in the compressed network.

Minimises J(Z) = ||W X - Z X~||^2 / T + l ||W - Z||^2 (method.md section 2) in the solver's metric
F. With E = X - X~, C = X~ X~^T / T, S = E X~^T / T, V = E E^T / T and C_l = C + l I, completing the
square gives

    W~ = W + W S C_l^-1
    J(Z) = tr(F (W~ - Z) C_l (W~ - Z)^T) + tr(F W (V - S C_l^-1 S^T) W^T)

for any F: the solver's own problem on (W~, C_l), and an inherited part that no Z removes. Written
in E, nothing cancels where the two networks hardly differ. Where the bias is free, all moments are
taken around the mean inputs.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lrc_cli.engine.approximation import Approximation, Errors, SameInput, Solution
from lrc_cli.engine.frobenius import FROBENIUS
from lrc_cli.engine.linalg import cholesky, eigenpairs
from lrc_cli.engine.problem import Solver, Statistics

RESOLUTION = 2.0**-24
"""Of the eigenvalues of C at unit diagonal: products of activations are rounded to float32."""


@dataclass(frozen=True, kw_only=True)
class Drift:
    """Second moments of a layer's inputs x in the dense and x~ in the compressed network.

    Float64, over the same tokens. Where the means are given, the moments are around them.
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
    """T."""

    @property
    def gram(self) -> Tensor:
        """X X^T / T = C + S + S^T + V."""
        return self.compressed + self.cross + self.cross.T + self.drift

    def ridge(self, share: float) -> float:
        """l: a share of the mean diagonal of C, or the share itself where every x~ is zero."""
        mean = self.compressed.diagonal().mean().item()
        return share * mean if mean > 0 else share

    @cached_property
    def step(self) -> Tensor:
        """S C^- (n, n), for a generalised inverse of C: the best linear guess of E from X~."""
        scale = self.compressed.diagonal().clamp(min=0).sqrt()
        safe = torch.where(scale > 0, scale, 1.0)
        values, vectors = eigenpairs(self.compressed / safe[:, None] / safe)
        inverse = torch.where(values > RESOLUTION * values[0], 1 / values, 0.0)
        return (self.cross / safe @ vectors * inverse) @ vectors.T / safe


class Sequential(Approximation):
    """A solver's problem on the inputs of the compressed network.

    Args:
        weight: W (m, n), any floating dtype.
        solver: `frobenius` or `curvature`.
        ridge: l as a share of the mean diagonal of C, above 0.
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
        fisher: Tensor | None = None,
    ) -> None:
        self.weight = weight.double()
        self.moments = drift
        identity = torch.eye(len(drift.compressed), dtype=torch.float64, device=weight.device)
        gram = drift.compressed + drift.ridge(ridge) * identity
        step = torch.cholesky_solve(drift.cross.T, cholesky(gram, "regularised Gram")).T
        self._fit = SameInput(
            self.weight + self.weight @ step, Statistics(gram=gram, fisher=fisher), solver
        )
        self.metric = self._fit.metric
        self.unit = f"{solver.unit}, on the compressed network's inputs, with ridge"
        remaining = drift.drift - step @ drift.cross.T
        self.inherited = self.metric.scale * _form(self.weight, remaining, self.metric.fisher)
        """The part of J that is there whatever Z is, in the solver's unit."""

    def solve(self, rank: int) -> Solution:
        return self._fit.solve(rank)

    def errors(self, fitted: Tensor) -> Errors:
        moments, difference = self.moments, self.weight - fitted
        drifted = self.weight @ moments.drift + 2 * difference @ moments.cross.T
        output = torch.sum(difference @ moments.compressed * difference)
        output += torch.sum(drifted * self.weight)
        metric = self._fit.errors(fitted).metric + self.inherited
        return Errors(metric, max(output.item(), 0.0))

    def optimum(self, rank: int) -> float:
        return self._fit.optimum(rank) + self.inherited

    def output_optimum(self, rank: int) -> float:
        """Without the ridge: W~ = W + W S C^-, for any generalised inverse of C."""
        inherited, best = self._unregularised
        return inherited + best.optimum(rank)

    @cached_property
    def _unregularised(self) -> tuple[float, SameInput]:
        moments, step = self.moments, self.moments.step
        inherited = _form(self.weight, moments.drift - step @ moments.cross.T)
        target = self.weight + self.weight @ step
        return inherited, SameInput(target, Statistics(gram=moments.compressed), FROBENIUS)

    @property
    def total(self) -> float:
        return self._fit.total + self.inherited

    @property
    def energy(self) -> float:
        mean, weight = self.moments.mean, self.weight
        varying = torch.sum(weight @ self.moments.gram * weight).item()
        return varying if mean is None else varying + torch.sum((weight @ mean) ** 2).item()

    def shift(self, fitted: Tensor) -> Tensor | None:
        """W mean(x) - Z mean(x~), the free bias of method.md section 2."""
        mean, compressed = self.moments.mean, self.moments.mean_compressed
        if mean is None or compressed is None:
            return None
        return self.weight @ mean - fitted @ compressed


def _form(weight: Tensor, gram: Tensor, fisher: Tensor | None = None) -> float:
    """tr(F W G W^T), which rounding may make a little negative where it is zero: then 0."""
    left = weight if fisher is None else fisher @ weight
    return max(torch.sum(left * (weight @ gram)).item(), 0.0)
