"""Solvers here minimise scale * tr(F D G D^T), D = W - Z, over rank(Z) <= r.

The eigenproblem is on the smaller side of W (m, n). Where W is wide (m <= n), let F = L^T L and let
U be the leading eigenvectors of A = L W G W^T L^T. Then Z has the outer factor L^-1 U and the inner
factor U^T L W. Where W is tall, let G = R R^T and let P be the leading eigenvectors of
A = R^T W^T F W R. Then the outer factor is V = W R P and the inner factor is (V^T F V)^-1 V^T F W.
Tall W needs no root of F and no inverse of G. The error that is left is the sum of A's other
eigenvalues (Eckart-Young). Where F is the identity its root is left out.

A few matrices of the smaller side hold everything about W, and the references share them. Plain SVD
leaves D = sum over i >= r of u_i (s_i v_i)^T, so its errors at all ranks are tail sums of one
matrix. The eigenvalues of W G W^T give the least output errors.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lrc_cli.engine.linalg import (
    balanced,
    cholesky,
    eigenpairs,
    eigenvalues,
    is_wide,
    rank_above_floor,
    root,
)
from lrc_cli.engine.problem import (
    Errors,
    Factors,
    Metric,
    References,
    SolveError,
    Statistics,
    Survey,
)

RESOLVED = 2.0**-20
"""The largest share of the errors of Z = 0 that directions below the numerical floor of W may have.
`lrc verify` allows four times as much beside what it measures."""
INDEPENDENT = 1e-10
"""The least squared length of a direction, as a share of the largest, at which products tell
directions apart: a Gram matrix of vectors loses half of their digits."""


class Eigenproblem(ABC):
    """The eigenproblem of W in a metric with a Gram matrix.

    Args:
        weight: (m, n) float64.
    """

    def __init__(self, weight: Tensor, metric: Metric) -> None:
        assert metric.gram is not None
        self.weight, self.gram, self.fisher, self.scale = (
            weight,
            metric.gram,
            metric.fisher,
            metric.scale,
        )

    @property
    @abstractmethod
    def matrix(self) -> Tensor:
        """A, (k, k) float64 with k = min(m, n)."""

    @abstractmethod
    def factors(self, vectors: Tensor) -> Factors:
        """The solution whose directions are the columns of `vectors` (k, r).

        The vectors are A's leading eigenvectors. The solution is found in their dtype, float64 or
        float32. Raises SolveError.
        """

    @abstractmethod
    def output_curve(self, values: Tensor, vectors: Tensor) -> Tensor:
        """The terms (j,) of the plain output error: [r:].sum() is the error at rank r.

        Args:
            values: A's eigenvalues (j,).
            vectors: A's eigenvectors (k, j).
        """

    @property
    @abstractmethod
    def zero(self) -> Errors:
        """The errors of Z = 0."""

    @abstractmethod
    def references(self, least: Tensor | None = None) -> References:
        """The errors that solutions are compared with.

        Args:
            least: the spectrum of the least output error, where it is known.

        Raises:
            SolveError: the plain SVD of W leaves out what matters in the metric.
        """

    def _check_resolved(self, form: Tensor, plain: Tensor) -> None:
        """Checks that the singular vectors of W hold all of W that matters.

        A column of small weights may have large inputs, so that it matters as much as the others.
        Where the columns differ by more than float64 resolves, it is lost in the products of W.

        Args:
            form: (j + 1,), the errors of plain SVD by rank, without `scale`.
            plain: (j + 1,), the output errors of plain SVD by rank.
        """
        zero = self.zero
        for whole, first in ((zero.metric, self.scale * form[0]), (zero.output, plain[0])):
            if not abs(whole - float(first)) <= RESOLVED * whole:
                raise SolveError("the sizes of its weights differ by more than float64 resolves")


class Wide(Eigenproblem):
    """The problem of a wide weight, m <= n."""

    @cached_property
    def _outputs(self) -> Tensor:
        """The matrix W G W^T, (m, m)."""
        return self.weight @ self.gram @ self.weight.T

    @cached_property
    def _left(self) -> Tensor | None:
        """The upper triangular L (m, m) of F = L^T L; None where F is the identity."""
        return None if self.fisher is None else cholesky(self.fisher).T

    @property
    def matrix(self) -> Tensor:
        left = self._left
        return self._outputs if left is None else left @ self._outputs @ left.T

    def factors(self, vectors: Tensor) -> Factors:
        weight, size = _scaled(self.weight, vectors.dtype)
        if self._left is None:
            return _balanced(vectors, vectors.T @ weight, size)
        left, _ = _scaled(self._left, vectors.dtype)  # one factor undoes the size in the other
        outer = torch.linalg.solve_triangular(left, vectors, upper=True)
        return _balanced(outer, (vectors.T @ left) @ weight, size)

    def output_curve(self, values: Tensor, vectors: Tensor) -> Tensor:
        # D = L^-1 (I - U U^T) L W leaves e_i |L^-1 u_i|^2.
        if self._left is None:
            return values
        lengths = torch.linalg.solve_triangular(self._left, vectors, upper=True)
        return values * lengths.square().sum(dim=0)

    @property
    def zero(self) -> Errors:
        outputs = self._outputs
        plain = outputs.diagonal().sum().item()
        form = plain if self.fisher is None else torch.sum(self.fisher * outputs).item()
        return Errors(self.scale * form, plain)

    def references(self, least: Tensor | None = None) -> References:
        values, u = eigenpairs(self.weight @ self.weight.T)
        u = u[:, : rank_above_floor(values)]
        outputs = self._outputs @ u
        plain = form = _tail_sums(torch.sum(u * outputs, dim=0))
        if self.fisher is not None:
            form = _tail_sums((u.T @ outputs) * (u.T @ self.fisher @ u))
        self._check_resolved(form, plain)
        least = eigenvalues(self._outputs) if least is None else least
        return References(least, self.scale * form, plain)


class Tall(Eigenproblem):
    """The problem of a tall weight, m > n."""

    @cached_property
    def _right(self) -> Tensor:
        """The root R (n, n) of G = R R^T."""
        return root(self.gram)

    @cached_property
    def _squared(self) -> Tensor:
        """The matrix W^T W, (n, n)."""
        return self.weight.T @ self.weight

    @cached_property
    def _weighted(self) -> Tensor:
        """The matrix W^T F W, (n, n)."""
        if self.fisher is None:
            return self._squared
        return self.weight.T @ (self.fisher @ self.weight)

    @property
    def matrix(self) -> Tensor:
        return self._right.T @ self._weighted @ self._right

    def factors(self, vectors: Tensor) -> Factors:
        weight, size = _scaled(self.weight, vectors.dtype)
        right, _ = _scaled(self._right, vectors.dtype)  # the inner factor undoes R's size, and F's
        outer = weight @ (right @ vectors)
        weighted = outer
        if self.fisher is not None:
            weighted = _scaled(self.fisher, vectors.dtype)[0] @ outer
        normal = outer.T @ weighted
        squares = normal.diagonal()
        if self.fisher is None and bool((squares <= INDEPENDENT * squares.amax()).any()):
            # Some directions may be excited by no input: QR keeps as much of W as it can.
            u, _ = torch.linalg.qr(outer)
            return _balanced(u, u.T @ weight, size)
        # Exact eigenvectors make `normal` diagonal, but rounded eigenvectors do not quite.
        alive = squares > 0
        scale = torch.where(alive, squares.rsqrt(), 0.0)
        normal = normal * scale[:, None] * scale
        normal.diagonal().add_(~alive)
        factor, info = torch.linalg.cholesky_ex(normal)
        if info.item() != 0:
            raise SolveError("its directions cannot be told apart")
        inner = torch.cholesky_solve(scale[:, None] * (weighted.T @ weight), factor)
        return _balanced(outer, scale[:, None] * inner, size)

    def output_curve(self, values: Tensor, vectors: Tensor) -> Tensor:
        # D R = W R (I - P P^T) leaves |W R p_i|^2.
        if self.fisher is None:
            return values
        reduced = self._right @ vectors
        return torch.where(values > 0, (reduced * (self._squared @ reduced)).sum(dim=0), 0.0)

    @property
    def zero(self) -> Errors:
        form, plain = (torch.sum(self.gram * of).item() for of in (self._weighted, self._squared))
        return Errors(self.scale * form, plain)

    def references(self, least: Tensor | None = None) -> References:
        values, v = eigenpairs(self._squared)
        rank = rank_above_floor(values)
        values, v = values[:rank], v[:, :rank]
        inputs = self.gram @ v
        plain = form = _tail_sums(values * torch.sum(v * inputs, dim=0))
        if self.fisher is not None:
            form = _tail_sums((v.T @ inputs) * (v.T @ self._weighted @ v))
        self._check_resolved(form, plain)
        if least is None:
            least = eigenvalues(self._right.T @ self._squared @ self._right)
        return References(least, self.scale * form, plain)


def eigenproblem_of(weight: Tensor, metric: Metric) -> Eigenproblem:
    """The problem of a weight (m, n) of any floating dtype; the metric has a Gram matrix."""
    return (Wide if is_wide(weight) else Tall)(weight.double(), metric)


@dataclass(frozen=True, kw_only=True)
class Weighted:
    """The functions of a solver (see Solver) that minimises scale * tr(F D G D^T).

    Args:
        capped: whether a rank is lowered to the number of eigenvalues above the numerical floor.
    """

    metric: Callable[[Statistics], Metric]
    capped: bool

    def _eigenproblem(self, weight: Tensor, statistics: Statistics) -> Eigenproblem:
        return eigenproblem_of(weight, self.metric(statistics))

    def _eigenpairs(self, problem: Eigenproblem) -> tuple[Tensor, Tensor]:
        """All eigenvalues (k,), and the eigenvectors (k, j) that solutions may use."""
        values, vectors = eigenpairs(problem.matrix)
        return values, vectors[:, : rank_above_floor(values)] if self.capped else vectors

    def spectrum(self, weight: Tensor, statistics: Statistics) -> Tensor:
        """The spectrum, see Solver.spectrum."""
        problem = self._eigenproblem(weight, statistics)
        return problem.scale * eigenvalues(problem.matrix)

    def factorize(self, weight: Tensor, statistics: Statistics, rank: int) -> Factors:
        """The factors, see Solver.factorize."""
        problem = self._eigenproblem(weight, statistics)
        _, vectors = self._eigenpairs(problem)
        return problem.factors(vectors[:, :rank])

    def survey(self, weight: Tensor, statistics: Statistics) -> Survey:
        """The survey, see Solver.survey."""
        problem = self._eigenproblem(weight, statistics)
        values, vectors = self._eigenpairs(problem)
        # Without F the solver itself minimises the output error.
        least = values if problem.fisher is None else None
        return Survey(
            spectrum=problem.scale * values,
            output_curve=_padded(problem.output_curve(values[: vectors.shape[1]], vectors), values),
            vectors=vectors,
            references=problem.references(least),
            zero=problem.zero,
        )


def spanned(weight: Tensor, metric: Metric, vectors: Tensor) -> Factors:
    """The same as Solver.spanned, in the dtype of the vectors.

    In float32 every direction is off by eps of the largest direction's length, also where its own
    length is small. Where there is F, the condition of F's root multiplies this. At its least the
    error is off by the square of this share, times the error of Z = 0.
    """
    return eigenproblem_of(weight, metric).factors(vectors)


def _scaled(matrix: Tensor, dtype: torch.dtype) -> tuple[Tensor, float]:
    """The matrix over a power of four, so that any matrix fits float32, and the power."""
    _, exponent = torch.frexp(matrix.abs().amax())
    size = 4.0 ** (int(exponent) // 2)
    return (matrix / size).to(dtype), size


def _balanced(outer: Tensor, inner: Tensor, size: float) -> Factors:
    """The `balanced` factors of size * outer @ inner, in float64."""
    outer, inner = balanced(outer, inner)
    return Factors(outer.double() * size**0.5, inner.double() * size**0.5)


def _padded(values: Tensor, like: Tensor) -> Tensor:
    return torch.nn.functional.pad(values, (0, len(like) - len(values)))


def _tail_sums(terms: Tensor) -> Tensor:
    """The tail sums (k + 1,): entry r adds the terms (k,) or (k, k) whose indices are >= r."""
    sums = terms.flip(0).cumsum(0)
    if terms.ndim == 2:
        sums = sums.flip(1).cumsum(1).diagonal()
    return torch.cat([sums.flip(0).clamp(min=0.0), sums.new_zeros(1)])
