"""Least squares after rounding: the second factor is fitted against the stored first one."""

from functools import cached_property

import torch
from torch import Tensor

from lrc_cli.engine.problem import Errors, Metric

COARSE_EPS = 1e-3
"""Rounding from which on float32 decides as well as float64: bfloat16's. Its square, which is the
ridge, is mostly above what a Cholesky factor in float32 loses; where it is not, float64 is used."""

RESOLVED = 1e-6
"""Share of the errors of Z = 0 from which on an error may be taken as what is left of them: that
costs six of float64's sixteen digits."""


class Refit:
    """The coefficients T (k, r) for which Z = [rows; T @ rows] (m, n) is closest to the target.

    f(T) = scale * tr(F (target - Z) G (target - Z)^T). All it takes are products with `rows`:
    N = rows G rows^T and C = target G rows^T, so that nothing as large as G is multiplied again.

    Args:
        start: (k, r), what is corrected.
        target: (m, n). Its first m - k rows, r of them or none, are approximated by `rows`
            themselves.
        rows: (r, n).
        metric: its F (m, m) in the order of the target's rows.
        dtype: in which T is found and compared. Errors are always float64.
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
        """F of the rows that are fitted, (k, k)."""
        fisher, fixed = self.metric.fisher, self.num_fixed
        return None if fisher is None else fisher[fixed:, fixed:].to(self.start.dtype)

    @cached_property
    def _coarse_normal(self) -> Tensor:
        return self._normal.to(self.start.dtype)

    @cached_property
    def _residual(self) -> Tensor:
        """(k, r): half the steepest descent of f / scale at `start`, times F_RR^-1.

        The error E = target - rows of the fixed rows counts too: curvature lets the others make up
        for it, as if they aimed at F_RR^-1 F_RJ E more. No solution depends on F otherwise.
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
        """The least f, with a ridge.

        Only the correction to `start` is solved for, so that directions in which G is singular
        leave it as it is. The ridge, unit^2 times the diagonal, is what rounding the entries to
        relative `unit` costs: below it a smaller residual is not worth larger entries. Returns
        `start` where even that system is singular.
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
        """(f(new) - f(old)) / scale: with D = new - old and s = `start`,
        -tr(F_RR D (2 S - 2 (old - s) N - D N)^T), S the residual."""
        old, new = old.to(self.start), new.to(self.start)
        step = new - old
        slope = 2 * self._residual - (old + new - 2 * self.start) @ self._coarse_normal
        weighted = step if self._own is None else self._own @ step
        return -torch.sum(weighted * slope).item()

    def errors(self, coefficients: Tensor, zero: Errors | None = None) -> Errors:
        """f and the plain output error of coefficients T (k, r).

        Args:
            zero: both errors of Z = 0. Where they are known, and what is left of them is not lost
                in their rounding, no difference of matrices is multiplied.
        """
        if zero is not None:
            found = self._remaining(coefficients, zero)
            if all(left > RESOLVED * whole > 0 for left, whole in zip(found, zero, strict=True)):
                return found
        fitted = torch.cat([self.rows[: self.num_fixed], coefficients @ self.rows])
        return Errors(*self.metric.errors(self.target - fitted))

    def _remaining(self, coefficients: Tensor, zero: Errors) -> Errors:
        """tr(F (C0 - Y (2 C - Y N)^T)) with Y = [I; T], C0 what `zero` is the trace of."""
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
    """In which dtype to find what is then rounded to the stored one."""
    return torch.float32 if torch.finfo(stored).eps >= COARSE_EPS else torch.float64
