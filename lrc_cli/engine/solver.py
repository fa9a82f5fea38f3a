"""A solver is a method: how it fits a layer, what it needs and what it can."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lrc_cli.engine.problem import Factors, Metric, Statistics, Survey
from lrc_cli.engine.solvers.approximation import Approximation

Spectrum = Callable[[Tensor, Statistics], Tensor]


class Given(Protocol):
    """Offers what a solver may ask for to make its problem.

    Every value is read at the moment when a solver asks for it, because some values are costly.
    """

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
        """The result of the solver's survey."""

    @property
    def inputs(self) -> Tensor:
        """The calibration inputs (T, n) float32, a row for every token.

        Reading them takes a pass through the network. Only a solver with `reads_inputs` may ask.
        """

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the factors and a new bias are stored."""

    @property
    def ridge(self) -> float:
        """A ridge as a share of a Gram matrix's mean diagonal; for solvers with `uses_ridge`
        only."""

    @property
    def threshold(self) -> float | None:
        """The singular values to cut, as a share of the largest; None where a rank decides."""


@dataclass(frozen=True, kw_only=True)
class Solver:
    """Describes one way to approximate a matrix (m, n) of any float dtype by one of rank r.

    The matrix is an argument, not a member of the statistics: it may be a weight, the target of a
    sequential fit or a quantisation residual.

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
    """(k,) float64, descending, >= 0: the least error of rank r is spectrum[r:].sum().

    The unit is the unit of `metric`. Only eigenvalues are computed. 0 stands for "below the
    numerical floor".
    """

    factorize: Callable[[Tensor, Statistics, int], Factors]
    """The solution of a rank in 1..min(m, n).

    `svd` and `curvature` lower the rank where the spectrum beyond it is below the numerical floor.
    """

    survey: Callable[[Tensor, Statistics], Survey]
    """Everything above that does not depend on a rank; no eigenproblem is solved twice."""

    spanned: Callable[[Tensor, Metric, Tensor], Factors] | None = None
    """(weight, metric, vectors (k, r)) -> the solution from the first r of a survey's vectors.

    None: surveys of this solver have no vectors.
    """

    problems: Callable[[Given], Sequence[Approximation]] | None = None
    """The problems on the layer's own inputs, with one judge; the best solution as stored is kept.

    The first of equally good solutions counts. None: `SameInput`, this solver's own problem.
    """

    no_recover: str | None = None
    """Why its factors cannot be trained afterwards; None: they can."""
    no_center: str | None = None
    """Why the bias cannot be fitted too (`center`), in words; None: it can."""

    no_layer_error: str | None = None
    """Why the method cannot bound a layer's output error, in words; None: it can."""

    is_sequential: bool = False
    """Whether the problem has a form on the inputs of two networks."""

    predicts_loss: bool = False
    """Whether the errors of layers add up to an increase of the loss."""

    rank_above: Callable[[Tensor, float], int] | None = None
    """(spectrum (k,), share) -> how many singular values are above that share of the largest.

    None: the method takes no threshold.
    """

    reads_inputs: bool = False
    """Whether a problem holds the layer's inputs, for which the network runs.

    Such layers are solved one at a time.
    """

    uses_ridge: bool = False
    """Whether a problem has a ridge."""

    followed_by: str | None = None
    """The activation that must follow a layer; None: any may."""

    stand_in: "Solver | None" = None
    """The solver of a layer that the activation does not follow; given with `followed_by`."""

    def error(self, difference: Tensor, statistics: Statistics) -> float:
        """Returns the error of W - Z = difference (m, n), in this solver's unit."""
        return self.metric(statistics).error(difference)
