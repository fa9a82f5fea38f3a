"""After rounding, least squares fits the second factor against the stored first factor."""

from functools import cached_property

import torch
from torch import Tensor

from lrc_cli.engine.problem import Errors, Metric

COARSE_EPS = 1e-3
"""The least rounding, bfloat16's, for which float32 decides as well as float64. The ridge is the
square of the rounding. It is mostly above what a Cholesky factor in float32 loses; otherwise
float64 is used."""

RESOLVED = 1e-6
"""The least share of the errors of Z = 0 at which an error may be found as a remainder of these
errors: the difference costs six of float64's sixteen digits."""


class Refit:
    """The coefficients T (k, r) for which Z = [rows; T @ rows] (m, n) is closest to the target.

    The distance is f(T) = scale * tr(F (target - Z) G (target - Z)^T). It needs only the products
    N = rows G rows^T and C = target G rows^T, so that nothing as large as G is multiplied again.

    Args:
        start: the coefficients (k, r) that are corrected.
        target: the matrix (m, n). Its first m - k rows, r rows or none, are approximated by `rows`
            themselves.
        rows: the stored rows (r, n).
        metric: the metric, with F (m, m) in the order of the target's rows.
        dtype: the dtype in which T is found and compared. Errors are always float64.
    """

    def __init__(
        self,
        start: Tensor,
        target: Tensor,
        rows: Tensor,
        metric: Metric,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        weighted = metric.times_gram(rows)
        self.target, self.rows, self.metric = target, rows, metric
        self.num_fixed = len(target) - len(start)
        self._normal = weighted @ rows.T
        self._cross = target @ weighted.T
        self.start = start.to(dtype)

    @cached_property
    def _own(self) -> Tensor | None:
        """The part (k, k) of F for the rows that are fitted."""
        fisher, fixed = self.metric.fisher, self.num_fixed
        return None if fisher is None else fisher[fixed:, fixed:].to(self.start.dtype)

    @cached_property
    def _coarse_normal(self) -> Tensor:
        return self._normal.to(self.start.dtype)

    @cached_property
    def _residual(self) -> Tensor:
        """Half the steepest descent (k, r) of f / scale at `start`, times F_RR^-1.

        The error E = target - rows of the fixed rows counts too. Curvature lets the other rows make
        up for E, as if their target were larger by F_RR^-1 F_RJ E. No solution depends on F
        otherwise.
        """
        fixed, fisher = self.num_fixed, self.metric.fisher
        residual = self._cross[fixed:].to(self.start) - self.start @ self._coarse_normal
        if fisher is None or self._own is None or not fixed:
            return residual
        wider = [] if self._own.dtype == fisher.dtype else [fisher[fixed:, fixed:]]
        for own in (self._own, *wider):  # float32 fails first
            factor, info = torch.linalg.cholesky_ex(own)
            if info.item() == 0:
                error = (self._cross[:fixed] - self._normal).to(own)
                coupled = torch.cholesky_solve(fisher[fixed:, :fixed].to(own) @ error, factor)
                return residual + coupled.to(residual)
        return residual

    def solution(self, unit: float) -> Tensor:
        """The T with the least f, with a ridge.

        Only the correction to `start` is solved for, so that directions in which G is singular
        leave `start` as it is. The ridge, unit^2 times the diagonal, is the cost of rounding the
        entries to relative `unit`: below this cost a smaller residual is not worth larger entries.
        The result is `start` where even the system with the ridge is singular.
        """
        for normal in (self._coarse_normal, self._normal):  # float32 fails first
            diagonal = normal.diagonal()
            ridge = diagonal * max(unit**2, 1e-12) + diagonal.mean() * 1e-14
            factor, info = torch.linalg.cholesky_ex(normal + torch.diag(ridge))
            if info.item() == 0:
                step = torch.cholesky_solve(self._residual.T.to(normal), factor).T
                return self.start + step.to(self.start)
        return self.start

    def change(self, old: Tensor, new: Tensor) -> float:
        """The change (f(new) - f(old)) / scale.

        With D = new - old, s = `start` and the residual S the change is
        -tr(F_RR D (2 S - 2 (old - s) N - D N)^T).
        """
        old, new = old.to(self.start), new.to(self.start)
        step = new - old
        slope = 2 * self._residual - (old + new - 2 * self.start) @ self._coarse_normal
        weighted = step if self._own is None else self._own @ step
        return -torch.sum(weighted * slope).item()

    def errors(self, coefficients: Tensor, zero: Errors | None = None) -> Errors:
        """The distance f and the plain output error of coefficients T (k, r).

        Args:
            zero: both errors of Z = 0. Where these errors are known, and the remainder is not lost
                in rounding, no difference of matrices is multiplied.
        """
        if zero is not None:
            found = self._remaining(coefficients, zero)
            if all(left > RESOLVED * whole > 0 for left, whole in zip(found, zero, strict=True)):
                return found
        fitted = torch.cat([self.rows[: self.num_fixed], coefficients @ self.rows])
        return Errors(*self.metric.errors(self.target - fitted))

    def _remaining(self, coefficients: Tensor, zero: Errors) -> Errors:
        """The errors tr(F (C0 - Y (2 C - Y N)^T)) with Y = [I; T]; `zero` is the trace with C0."""
        fisher, fixed = self.metric.fisher, self.num_fixed
        above = torch.eye(fixed, len(self.rows)).to(coefficients)
        gained = 2 * self._cross - torch.cat([self._normal[:fixed], coefficients @ self._normal])
        plain = torch.sum(torch.cat([above, coefficients]) * gained).item()
        if fisher is None:
            return Errors(zero.metric - self.metric.scale * plain, zero.output - plain)
        weighted = fisher[:, fixed:] @ coefficients
        if fixed:
            weighted = weighted + fisher[:, :fixed]
        form = torch.sum(weighted * gained).item()
        return Errors(zero.metric - self.metric.scale * form, zero.output - plain)


def deciding_dtype(stored: torch.dtype) -> torch.dtype:
    """The dtype in which numbers are found that are then rounded to the stored dtype."""
    return torch.float32 if torch.finfo(stored).eps >= COARSE_EPS else torch.float64
