"""What a solver is given, what it returns and in which unit it is judged.

Conventions: a layer is y = W x + b with W of shape (m, n); G = X X^T / T is
the Gram matrix of its inputs over T rows, F = sum g g^T / T' that of the gradients of the
summed loss by its outputs, with T' the same for all layers. Everything here is float64 and lives
on the device of its inputs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lrc_cli.engine.solvers.approximation import Approximation


class SolveError(ArithmeticError):
    """A layer could not be factorised or stored; the caller leaves it dense and says so."""


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Second moments of one layer's calibration data."""

    gram: Tensor | None = None
    """G = X X^T / T of the inputs, (n, n) float64: symmetric, positive semidefinite up to
    rounding, possibly singular. Where `mean` is given: around it, G = X X^T / T - mean mean^T."""

    fisher: Tensor | None = None
    """F = sum g g^T / T of the output gradients, (m, m) float64, undamped."""

    mean: Tensor | None = None
    """The mean input (n,) float64; given where the bias is free (`center`), else None."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """The quadratic form scale * tr(F D G D^T) that judges a difference D (m, n)."""

    gram: Tensor | None = None
    """G (n, n) float64, or None for the identity."""

    fisher: Tensor | None = None
    """F (m, m) float64, positive definite (already damped), or None for the identity."""

    scale: float = 1.0
    """Factor that turns the form into the method's unit."""

    def error(self, difference: Tensor) -> float:
        """scale * tr(F D G D^T) of a difference (m, n), evaluated from D itself.

        No large quantities are subtracted, so the relative accuracy is about
        eps * |F| |D|^2 |G| / error.
        """
        return self.errors(difference)[0]

    def errors(self, difference: Tensor) -> tuple[float, float]:
        """`error` and the plain output error tr(D G D^T), which share the product D G."""
        difference = difference.double()
        outputs = self.times_gram(difference)
        weighted = difference if self.fisher is None else self.fisher @ difference
        form, plain = (torch.sum(side * outputs).item() for side in (weighted, difference))
        return self.scale * max(form, 0.0), max(plain, 0.0)

    def times_gram(self, rows: Tensor) -> Tensor:
        """rows (k, n) @ G, or the rows themselves where G is the identity."""
        return rows if self.gram is None else rows @ self.gram


class Errors(NamedTuple):
    """How far a matrix Z is off."""

    metric: float
    """In the problem's own unit."""
    output: float
    """||W X - Z X~||_F^2 / T, after the change of the bias if there is one."""


class Factors(NamedTuple):
    """Z = outer @ inner in float64, of rank at most r.

    Column i of `outer` and row i of `inner` have the same norm, and the directions come in
    descending importance: `truncated(k)` is the solution of rank k of every solver but `nuclear`,
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
        """The leading `rank` directions (all of them if there are fewer)."""
        return Factors(self.outer[:, :rank], self.inner[:rank])

    def dense(self) -> Tensor:
        """Z, (m, n) float64."""
        return self.outer @ self.inner


class References(NamedTuple):
    """What a layer's solution is compared with, by rank; all float64."""

    output_spectrum: Tensor
    """(k,): [r:].sum() is the least plain output error of rank r."""
    svd_metric: Tensor
    """(j + 1,): Errors.metric of plain SVD of rank r, for r up to the numerical rank j."""
    svd_output: Tensor
    """(j + 1,): Errors.output of it."""

    def svd_errors(self, rank: int) -> Errors:
        """The errors of plain SVD of a rank."""
        rank = min(rank, len(self.svd_metric) - 1)
        return Errors(self.svd_metric[rank].item(), self.svd_output[rank].item())


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What is known of a layer (m, n) at every rank, before one is granted; k = min(m, n)."""

    spectrum: Tensor
    """(k,) float64: Solver.spectrum."""
    output_curve: Tensor
    """(k,) float64, >= 0, in the order of the solver's directions: [r:].sum() is the plain output
    error tr(D G D^T) (mean squared error per token) of this solver's solution of rank r."""
    vectors: Tensor | None = None
    """(k, j), eigenvectors of which the first r give the solution of rank r; None where it is made
    from scratch. Rounded to float32 they span what is off by eps, and the error, at its least
    there, by eps^2 of the total."""
    references: References | None = None
    """None where the outcome is compared by other means."""
    zero: Errors | None = None
    """The errors of Z = 0, in the solver's metric: traces, of which no eigenvalue is left out (a
    Gram matrix that was rounded has negative ones)."""


Spectrum = Callable[[Tensor, Statistics], Tensor]


class Given(Protocol):
    """What a solver may ask for to make its problem. All is read when it is asked for, because some
    of it is costly."""

    @property
    def weight(self) -> Tensor:
        """W (m, n), stored dtype, on the run's device."""

    @property
    def bias(self) -> Tensor | None:
        """b (m,), stored dtype, on the run's device; None where the layer has none."""

    @property
    def statistics(self) -> Statistics:
        """The statistics that the solver needs."""

    @property
    def survey(self) -> Survey:
        """What the solver's survey found."""

    @property
    def inputs(self) -> Tensor:
        """The calibration inputs (T, n) float32, a row for every token; takes a pass through the
        network. Only for a solver that says so (`reads_inputs`)."""

    @property
    def dtype(self) -> torch.dtype:
        """In which the factors and a new bias are stored."""

    @property
    def ridge(self) -> float:
        """A ridge as a share of a Gram matrix's mean diagonal. Only for a solver that says so
        (`uses_ridge`)."""

    @property
    def threshold(self) -> float | None:
        """Singular values to cut, as a share of the largest; None where a rank decides."""


@dataclass(frozen=True, kw_only=True)
class Solver:
    """One way to approximate a matrix (m, n) of any float dtype by one of rank r.

    The matrix is an argument, not a member of the statistics: it may be a weight, the target
    of a sequential fit or a quantisation residual.

    A method is one file with a `Solver`, an entry in `SOLVERS` and one in the config's `METHODS`.
    Everything that a job asks about a method is a field here.
    """

    name: str
    """The name in configs and reports."""

    unit: str
    """What `spectrum` and `error` measure, in words."""

    needs: frozenset[str]
    """The fields of Statistics that must not be None: of "gram" and "fisher"."""

    metric: Callable[[Statistics], Metric]
    """The quadratic form this solver minimises."""

    spectrum: Spectrum
    """(k,) float64, descending, >= 0: the least error of rank r is spectrum[r:].sum(), in the
    unit of `metric`. Eigenvalues only. 0 stands for "below the numerical floor"."""

    factorize: Callable[[Tensor, Statistics, int], Factors]
    """The solution of a rank in 1..min(m, n). `svd` and `curvature` lower the rank where the
    spectrum beyond it is below the numerical floor."""

    survey: Callable[[Tensor, Statistics], Survey]
    """All of the above that does not depend on a rank, with no eigenproblem solved twice."""

    spanned: Callable[[Tensor, Metric, Tensor], Factors] | None = None
    """(weight, metric, vectors (k, r)) -> the solution from the first r of a survey's vectors; None
    where surveys have none."""

    problems: Callable[[Given], Sequence["Approximation"]] | None = None
    """What is fitted to the layer's own inputs: problems with one judge, of whose solutions the
    best as stored is kept, the first of equals. None: `SameInput`, this solver's own problem."""

    no_center: str | None = None
    """Why the bias cannot be fitted too (`center`), in words; None: it can."""

    no_layer_error: str | None = None
    """Why the method cannot bound a layer's output error, in words; None: it can."""

    is_sequential: bool = False
    """Whether the problem has a form on the inputs of two networks."""

    predicts_loss: bool = False
    """Whether the errors of layers add up to an increase of the loss."""

    rank_above: Callable[[Tensor, float], int] | None = None
    """(spectrum (k,), share) -> how many singular values are above that share of the largest; None:
    the method takes no threshold."""

    reads_inputs: bool = False
    """Whether a problem holds the layer's inputs, for which the network runs. Such layers are
    solved one at a time."""

    uses_ridge: bool = False
    """Whether a problem has a ridge."""

    followed_by: str | None = None
    """The activation that must follow a layer; None: any may."""

    stand_in: "Solver | None" = None
    """What fits a layer that the activation does not follow; given with `followed_by`."""

    def error(self, difference: Tensor, statistics: Statistics) -> float:
        """The error of W - Z = difference (m, n), in this solver's unit."""
        return self.metric(statistics).error(difference)


def required(value: Tensor | None, name: str) -> Tensor:
    """The statistic in float64; ValueError where it was not collected."""
    if value is None:
        raise ValueError(f"this method needs the statistic `{name}`, which was not collected")
    return value.double()
