"""Least squares after rounding: the second factor is fitted against the stored first one."""

import torch
from torch import Tensor

from lrc_cli.engine.problem import Metric


class Refit:
    """The coefficients T (k, r) for which T @ rows (r, n) is closest to target (k, n).

    f(T) = tr(F (target - T rows) G (target - T rows)^T), of which only what depends on T is looked
    at: N = rows G rows^T and S = (target - start rows) G rows^T, so nothing is as large as (k, n).

    Args:
        start: (k, r), what is corrected.
        fisher: F (k, k), or None for the identity. It changes no solution, but what rounding costs.
    """

    def __init__(
        self,
        start: Tensor,
        target: Tensor,
        rows: Tensor,
        metric: Metric,
        fisher: Tensor | None = None,
    ) -> None:
        weighted = metric.times_gram(rows)
        self.start, self.fisher = start, fisher
        self._normal = weighted @ rows.T
        self._residual = (target - start @ rows) @ weighted.T

    def solution(self, unit: float) -> Tensor:
        """The least f, with a ridge.

        Only the correction to `start` is solved for, so that directions in which G is singular
        leave it as it is. The ridge, unit^2 times the diagonal, is what rounding the entries to
        relative `unit` costs: below it a smaller residual is not worth larger entries. Returns
        `start` where even that system is singular.
        """
        diagonal = self._normal.diagonal()
        ridge = diagonal * max(unit**2, 1e-12) + diagonal.mean() * 1e-14
        factor, info = torch.linalg.cholesky_ex(self._normal + torch.diag(ridge))
        if info.item() != 0:
            return self.start
        return self.start + torch.cholesky_solve(self._residual.T, factor).T

    def change(self, old: Tensor, new: Tensor) -> float:
        """f(new) - f(old): with D = new - old and s = `start`,
        -tr(F D (2 S - 2 (old - s) N - D N)^T)."""
        step = new - old
        slope = 2 * self._residual - (old + new - 2 * self.start) @ self._normal
        weighted = step if self.fisher is None else self.fisher @ step
        return -torch.sum(weighted * slope).item()


def conditional_target(
    target: Tensor, error: Tensor, chosen: Tensor, others: Tensor, metric: Metric
) -> tuple[Tensor, Tensor | None]:
    """What the rows that are not chosen aim at, given the error of the chosen ones; and F_RR.

    W_R + F_RR^-1 F_RJ E_J with E_J = W_J - Z_J = `error` (r, n), truncation and rounding together:
    curvature lets the others make up for it. (m - r, n); W_R itself where F is the identity.
    """
    if metric.fisher is None:
        return target[others], None
    own = metric.fisher[others[:, None], others]
    factor, info = torch.linalg.cholesky_ex(own)
    if info.item() != 0:
        return target[others], own
    coupled = metric.fisher[others[:, None], chosen] @ error
    return target[others] + torch.cholesky_solve(coupled, factor), own
