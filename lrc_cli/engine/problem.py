"""This module says what a solver is given, what it returns and in which unit it is judged.

Conventions: a layer is y = W x + b with W of shape (m, n). G = X X^T / T is the Gram matrix of its
inputs over T rows. F = sum g g^T / T' is the Gram matrix of g, the gradients of the summed loss by
the layer's outputs, with T' the same for all layers. Everything here is float64 and lives on the
device of its inputs.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class SolveError(ArithmeticError):
    """This error says that a layer could not be factorised or stored.

    The caller leaves the layer dense and says so.
    """


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Holds the second moments of one layer's calibration data."""

    gram: Tensor | None = None
    """G = X X^T / T of the inputs, (n, n) float64.

    G is symmetric, positive semidefinite up to rounding, and may be singular. Where `mean` is
    given, G is taken around it: G = X X^T / T - mean mean^T.
    """

    fisher: Tensor | None = None
    """F = sum g g^T / T of the output gradients, (m, m) float64, undamped."""

    mean: Tensor | None = None
    """The mean input (n,) float64; given where the bias is free (`center`), else None."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """Holds the quadratic form scale * tr(F D G D^T) that judges a difference D (m, n)."""

    gram: Tensor | None = None
    """G (n, n) float64, or None for the identity."""

    fisher: Tensor | None = None
    """F (m, m) float64, positive definite (already damped), or None for the identity."""

    scale: float = 1.0
    """The factor that turns the form into the method's unit."""

    def error(self, difference: Tensor) -> float:
        """Returns scale * tr(F D G D^T) of a difference (m, n), evaluated from D itself.

        No large quantities are subtracted, so the relative accuracy is about eps * |F| |D|^2 |G| /
        error.
        """
        return self.errors(difference)[0]

    def errors(self, difference: Tensor) -> tuple[float, float]:
        """Returns `error` and the plain output error tr(D G D^T), which share the product D G."""
        difference = difference.double()
        outputs = self.times_gram(difference)
        weighted = difference if self.fisher is None else self.fisher @ difference
        form, plain = (torch.sum(side * outputs).item() for side in (weighted, difference))
        return self.scale * max(form, 0.0), max(plain, 0.0)

    def times_gram(self, rows: Tensor) -> Tensor:
        """Returns rows (k, n) @ G, or the rows themselves where G is the identity."""
        return rows if self.gram is None else rows @ self.gram


class Errors(NamedTuple):
    """Says how far a matrix Z is off."""

    metric: float
    """The error in the problem's own unit."""
    output: float
    """||W X - Z X~||_F^2 / T, after the change of the bias if there is one."""


class Factors(NamedTuple):
    """Holds Z = outer @ inner in float64, of rank at most r.

    Column i of `outer` and row i of `inner` have the same norm, and the directions come in
    descending importance. `truncated(k)` is the solution of rank k for every solver but `nuclear`,
    whose directions shrink with the rank.
    """

    outer: Tensor
    """(m, r)"""

    inner: Tensor
    """(r, n)"""

    @property
    def rank(self) -> int:
        """The number of directions r."""
        return self.inner.shape[0]

    def truncated(self, rank: int) -> "Factors":
        """Returns the leading `rank` directions (all of them if there are fewer)."""
        return Factors(self.outer[:, :rank], self.inner[:rank])

    def dense(self) -> Tensor:
        """Returns Z, (m, n) float64."""
        return self.outer @ self.inner


class Solution(NamedTuple):
    """Holds the solution of one rank."""

    factors: Factors
    aim: Tensor
    """(m, n) float64: the matrix that rounded factors are refitted to.

    It is the approximated matrix where the solution is its best approximation, and else the
    solution itself.
    """
    zero: Errors | None = None
    """The errors of Z = 0 against `aim` in the problem's metric, where they are known."""


class References(NamedTuple):
    """Holds what a layer's solution is compared with, by rank; all float64."""

    output_spectrum: Tensor
    """(k,): [r:].sum() is the least plain output error of rank r."""
    svd_metric: Tensor
    """(j + 1,): Errors.metric of plain SVD of rank r, for r up to the numerical rank j."""
    svd_output: Tensor
    """(j + 1,): Errors.output of plain SVD of rank r."""

    def svd_errors(self, rank: int) -> Errors:
        """Returns the errors of plain SVD of a rank."""
        rank = min(rank, len(self.svd_metric) - 1)
        return Errors(self.svd_metric[rank].item(), self.svd_output[rank].item())


@dataclass(frozen=True, kw_only=True)
class Survey:
    """Holds what is known of a layer (m, n) at every rank, before one is granted; k = min(m, n)."""

    spectrum: Tensor
    """(k,) float64: Solver.spectrum."""
    output_curve: Tensor
    """(k,) float64, >= 0, in the order of the solver's directions.

    [r:].sum() is the plain output error tr(D G D^T) (mean squared error per token) of this solver's
    solution of rank r.
    """
    vectors: Tensor | None = None
    """(k, j) eigenvectors, of which the first r give the solution of rank r.

    None: the solution is made from scratch. Rounded to float32 the vectors span a space that is off
    by eps. The error is at its least there, so it is off by eps^2 of the total.
    """
    references: References | None = None
    """The solutions to compare with; None where the outcome is compared by other means."""
    zero: Errors | None = None
    """The errors of Z = 0, in the solver's metric.

    They are traces, which leave no eigenvalue out (a Gram matrix that was rounded has negative
    ones).
    """


def required(value: Tensor | None, name: str) -> Tensor:
    """Returns the statistic in float64; raises ValueError where it was not collected."""
    if value is None:
        raise ValueError(f"this method needs the statistic `{name}`, which was not collected")
    return value.double()
