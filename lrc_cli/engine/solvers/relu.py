"""`relu` fits a layer whose outputs go into a ReLU: Z and a bias b^ approximate relu(W X + b).

The judge is the mean squared error behind the ReLU, per token. The solution of a rank is the best
of three: the convex programme's truncated solution, polished (relu_programme.py); `frobenius`'s
solution, polished; and `frobenius`'s solution as it is. So the error is never above `frobenius`'s
error. No optimum can be proved: the error behind a ReLU is not convex, and the programme's bound
holds for a majorant.
"""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lrc_cli.engine.linalg import balanced, eigenpairs, is_wide
from lrc_cli.engine.magnitudes import LARGEST, fits, largest
from lrc_cli.engine.problem import Errors, Factors, Metric, Solution, Statistics, Survey, required
from lrc_cli.engine.solver import Given, Solver
from lrc_cli.engine.solvers.approximation import Approximation
from lrc_cli.engine.solvers.frobenius import FROBENIUS
from lrc_cli.engine.solvers.relu_errors import refined_offset, true_error
from lrc_cli.engine.solvers.relu_programme import Convex, Programme, programme
from lrc_cli.engine.solvers.same_input import SameInput
from lrc_cli.engine.solvers.svd import SVD

UNIT = "mean squared error behind the ReLU per token"
CHUNK_ROWS = 4096


class Rectified(Approximation):
    """The problem of one layer, which keeps its own bias if it has one and gains none.

    A matrix is judged with the best bias found for it, rounded as it will be stored: the layer's
    own bias, the bias that keeps the mean outputs, or what a few steps make of them
    (relu_errors.py).

    Args:
        weight: W (m, n), any floating dtype.
        bias: b (m,), any floating dtype; None where the layer has none.
        statistics: `gram` around 0, of the same inputs.
        activations: the inputs (T, n), a row for every token; float32 or float64, in which the
            products with them are taken.
        survey: `frobenius`'s, where it is known already.
        dtype: in which a bias is stored.
        ridge: share of the mean diagonal of the Gram matrix, above 0.
    """

    unit = UNIT
    inputs = "calibration"

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        statistics: Statistics,
        activations: Tensor,
        survey: Survey | None = None,
        *,
        dtype: torch.dtype = torch.float64,
        ridge: float = 1e-2,
    ) -> None:
        self.weight = weight.double()
        self.plain = SameInput(weight, statistics, FROBENIUS, survey)
        self.bias = None if bias is None else bias.to(self.weight)
        self.dtype = dtype
        self.mean = activations.mean(dim=0, dtype=torch.float64)
        gram = required(statistics.gram, "gram")
        self.gram = gram if bias is None else _around(activations, self.mean)
        self.metric = Metric(gram=self.gram)
        self.programme: Programme = programme(
            self.weight, self.bias, activations, self.gram, self.mean, ridge
        )
        self._solved: dict[int, Solution] = {}
        self._found: dict[int, dict[str, Any]] = {}
        self._biases: tuple[Tensor, Tensor] | None = None

    def solve(self, rank: int) -> Solution:
        if rank not in self._solved:
            self._solved[rank] = self._best(rank)
        return self._solved[rank]

    def _best(self, rank: int) -> Solution:
        plain, convex = self.plain.solve(rank).factors, self.programme.convex(rank)
        whitened = plain.dense() @ self.programme.root
        centre = None if self.bias is None else self.bias + plain.dense() @ self.mean
        polished = {
            "convex": self.programme.polished(convex.point, rank),
            "frobenius": self.programme.polished(whitened, rank, centre),
        }
        tried = {name: self._factors(found.point, rank) for name, found in polished.items()}
        tried["frobenius as it is"] = plain
        errors = {name: self.errors(factors.dense()).metric for name, factors in tried.items()}
        start = min(errors, key=lambda name: errors[name])
        self._found[rank] = _facts(rank, convex, start)
        return Solution(tried[start], tried[start].dense())

    def _factors(self, point: Tensor, rank: int) -> Factors:
        """Returns Z = U (U^T Z) with U the leading left singular vectors of A = Z R."""
        matrix = self.programme.unwhitened(point)
        if is_wide(point):
            u = eigenpairs(point @ point.T)[1][:, :rank]
        else:
            u, _ = torch.linalg.qr(point @ eigenpairs(point.T @ point)[1][:, :rank])
        return balanced(u, u.T @ matrix)

    @property
    def facts(self) -> dict[str, Any]:
        """Returns `relu`: one entry for every rank that was solved, lowest first."""
        return {"relu": [self._found[rank] for rank in sorted(self._found)]}

    def errors(self, fitted: Tensor) -> Errors:
        return self._errors(fitted, self._bias(fitted))

    def svd_errors(self, rank: int) -> Errors:
        # Plain SVD knows no data, and so no better bias than the layer's own.
        simple = SVD.factorize(self.weight, Statistics(), rank).dense()
        own = torch.zeros_like(self.weight[:, 0]) if self.bias is None else self.bias
        return self._errors(simple, own)

    def _errors(self, fitted: Tensor, bias: Tensor) -> Errors:
        difference = self.weight - fitted
        shift = bias if self.bias is None else bias - self.bias
        metric = sum(
            true_error(self._pre(fitted, bias, block), self.programme.targets(block))
            .sum(dim=0)
            .double()
            .sum()
            .item()
            for block in self.programme.blocks()
        )
        output = torch.sum(difference @ self.gram * difference).clamp(min=0)
        if self.bias is not None:
            output = output + torch.sum((difference @ self.mean - shift) ** 2)
        return Errors(2 * metric / len(self.programme.inputs), output.item())

    def _pre(self, fitted: Tensor, bias: Tensor, block: slice) -> Tensor:
        outputs = self.programme.products(fitted, block)
        return outputs.add_(bias[block].to(outputs.dtype))

    def _bias(self, fitted: Tensor) -> Tensor:
        """Returns the best bias found for a matrix, (m,) float64: zero where the layer has none."""
        if self.bias is None:
            return torch.zeros_like(self.weight[:, 0])
        if self._biases is None or not torch.equal(self._biases[0], fitted):
            self._biases = fitted.clone(), self._refined(fitted, self.bias)
        return self._biases[1]

    def _refined(self, fitted: Tensor, bias: Tensor) -> Tensor:
        starts = bias, bias + (self.weight - fitted) @ self.mean
        found = [
            refined_offset(
                self.programme.products(fitted, block),
                self.programme.targets(block),
                [start[block] for start in starts],
                self.dtype,
            )
            for block in self.programme.blocks()
        ]
        return torch.cat(found)

    def shift(self, fitted: Tensor) -> Tensor | None:
        """Returns the change of the bias, which added to the old bias is exact as stored."""
        return None if self.bias is None else self._bias(fitted) - self.bias

    def optimum(self, rank: int) -> None:
        """Returns None: no optimum can be proved."""

    def output_optimum(self, rank: int) -> float:
        """Returns the least output error, around the mean inputs where the bias is free."""
        return self._varying.optimum(rank)

    @cached_property
    def _varying(self) -> SameInput:
        if self.bias is None:
            return self.plain
        return SameInput(self.weight, Statistics(gram=self.gram), FROBENIUS)

    @property
    def total(self) -> float:
        """The mean square behind the ReLU: the error of outputs that are all dead."""
        squares = (
            self.programme.targets(block).square().sum(dim=0).double().sum().item()
            for block in self.programme.blocks()
        )
        return sum(squares) / len(self.programme.inputs)

    @property
    def energy(self) -> float:
        return self.plain.energy


class Unpolished(Approximation):
    """Judges `frobenius`'s solution as it is, packed as `frobenius` packs it.

    Rounding may reverse the order of two solutions. A caller that must not be above `frobenius` in
    the stored dtype fits both problems and keeps the better outcome.
    """

    unit = UNIT
    inputs = "calibration"

    def __init__(self, judge: Rectified) -> None:
        self.weight = judge.weight
        self.metric = judge.plain.metric
        self._judge = judge

    def solve(self, rank: int) -> Solution:
        return self._judge.plain.solve(rank)

    def errors(self, fitted: Tensor) -> Errors:
        return self._judge.errors(fitted)

    def svd_errors(self, rank: int) -> Errors:
        return self._judge.svd_errors(rank)

    def shift(self, fitted: Tensor) -> Tensor | None:
        return self._judge.shift(fitted)

    def optimum(self, rank: int) -> None:
        """Returns None, as the judge does."""

    def output_optimum(self, rank: int) -> float:
        return self._judge.output_optimum(rank)

    @property
    def total(self) -> float:
        return self._judge.total

    @property
    def energy(self) -> float:
        return self._judge.energy

    @property
    def facts(self) -> dict[str, Any]:
        return self._judge.facts


def _resolved(inputs: Tensor, given: Given) -> Tensor:
    """Returns inputs (T, n) in float64 where squares of them or of outputs leave float32."""
    size, weights = largest(inputs), largest(given.weight)
    biases = 0.0 if given.bias is None else largest(given.bias)
    # A small bias beside large outputs is no trouble.
    able = fits(size) and fits(size * weights) and biases <= LARGEST
    return inputs if able else inputs.double()


def _problems(given: Given) -> list[Approximation]:
    """Returns the problems of the polished solution and of `frobenius`'s.

    With both, rounding cannot put the error behind the ReLU above `frobenius`'s error at the same
    rank.
    """
    polished = Rectified(
        given.weight,
        given.bias,
        given.statistics,
        _resolved(given.inputs, given),
        given.survey,
        dtype=given.dtype,
        ridge=given.ridge,
    )
    return [polished, Unpolished(polished)]


RELU = Solver(
    name="relu",
    unit=FROBENIUS.unit,
    needs=FROBENIUS.needs,
    metric=FROBENIUS.metric,
    spectrum=FROBENIUS.spectrum,
    factorize=FROBENIUS.factorize,
    survey=FROBENIUS.survey,
    spanned=FROBENIUS.spanned,
    problems=_problems,
    no_recover="relu fits a bias to its factors in closed form",
    no_center="relu fits a bias of its own",
    no_layer_error="relu is about what follows",
    reads_inputs=True,
    uses_ridge=True,
    followed_by="ReLU",
    stand_in=FROBENIUS,
)
"""Ranks come from `frobenius`'s spectra: the errors before the ReLU bound the errors behind it."""


def _around(rows: Tensor, mean: Tensor) -> Tensor:
    """Returns the second moments (n, n) float64 of rows (T, n) around their mean.

    The mean leaves the rows first: gram - mean mean^T would lose as many digits as the mean is
    larger than the deviations.
    """
    total = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=rows.device)
    for chunk in rows.split(CHUNK_ROWS):
        deviations = chunk - mean.to(chunk.dtype)
        total += deviations.T @ deviations
    return total / len(rows)


def _facts(rank: int, convex: Convex, start: str) -> dict[str, Any]:
    return {
        "rank": rank,
        "start": start,
        "penalty": convex.penalty,
        "objective": convex.objective,
        "gap": convex.gap,
        "steps": convex.steps,
    }
