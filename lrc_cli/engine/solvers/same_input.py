"""A solver's own problem on the inputs of the dense network is defined here."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from lrc_cli.engine.problem import Errors, Factors, References, Solution, Statistics, Survey
from lrc_cli.engine.solver import Given, Solver
from lrc_cli.engine.solvers.approximation import Approximation, OnDenseInputs, tail
from lrc_cli.engine.storage.storage import Stored


class SameInput(OnDenseInputs):
    """A solver's own problem: the metric of its solutions is the measure of their errors.

    Args:
        weight: (m, n), any floating dtype.
        survey: the solver's, of this problem, where it is known already.
    """

    def __init__(
        self,
        weight: Tensor,
        statistics: Statistics,
        solver: Solver,
        survey: Survey | None = None,
    ) -> None:
        super().__init__(weight, statistics)
        self.solver = solver
        self.unit = solver.unit
        self.metric = solver.metric(statistics)
        self._survey = survey
        self._largest: Factors | None = None

    def solve(self, rank: int) -> Solution:
        # Solutions are nested: the solution of the largest rank holds all smaller solutions.
        if self._largest is None or self._largest.rank < rank:
            self._largest = self._factorize(rank)
        zero = None if self._survey is None else self._survey.zero
        return Solution(self._largest.truncated(rank), self.weight, zero)

    def _factorize(self, rank: int) -> Factors:
        vectors = None if self._survey is None else self._survey.vectors
        if vectors is None or self.solver.spanned is None:
            return self.solver.factorize(self.weight, self.statistics, rank)
        return self.solver.spanned(self.weight, self.metric, vectors[:, :rank])

    def errors(self, fitted: Tensor) -> Errors:
        return Errors(*self.metric.errors(self.weight - fitted))

    @cached_property
    def spectrum(self) -> Tensor:
        """The solver's spectrum, (k,) float64."""
        if self._survey is not None:
            return self._survey.spectrum
        return self.solver.spectrum(self.weight, self.statistics)

    @cached_property
    def references(self) -> References:
        """The solutions that the problem's solutions are compared with, at every rank."""
        known = self._survey or self.solver.survey(self.weight, self.statistics)
        assert known.references is not None
        return known.references

    def errors_of(self, stored: Stored) -> Errors:
        # The solution was compared with W, in this metric, when it was packed.
        return stored.errors

    def svd_errors(self, rank: int) -> Errors:
        return self.references.svd_errors(rank)

    @property
    def output_spectrum(self) -> Tensor:
        return self.references.output_spectrum

    def optimum(self, rank: int) -> float:
        return tail(self.spectrum, rank)

    @property
    def total(self) -> float:
        return self.spectrum.sum().item()


def problems_of(solver: Solver, given: Given) -> Sequence[Approximation]:
    """Returns a solver's problems on a layer's own inputs, of which the best outcome is kept.

    Raises:
        SolveError: a problem cannot be set up.
    """
    if solver.problems is None:
        return [SameInput(given.weight, given.statistics, solver, given.survey)]
    return solver.problems(given)


def survey(solver: Solver, weight: Tensor, statistics: Statistics) -> Survey:
    """Returns `solver.survey`, with all of ||W X||_F^2 / T as the sum of its output curve.

    A free bias takes over the mean output at every rank but 0, so the mean output's energy is added
    to the first entry of the curve.
    """
    found = solver.survey(weight, statistics)
    if statistics.mean is None:
        return found
    curve = found.output_curve.clone()
    curve[0] += torch.sum((weight.double() @ statistics.mean) ** 2)
    return replace(found, output_curve=curve)
