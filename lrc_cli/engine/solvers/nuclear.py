"""`nuclear` solves min over V = Z X of 1/2 ||W X - V||_F^2 + l ||V||_*, everything per token.

Let U and s be the left singular vectors and the singular values of W X / sqrt(T) (s^2 are the
eigenvalues of W G W^T). The minimiser is the singular-value soft threshold (Cai, Candes, Shen
2010), realised by the weights

    Z = U diag((s - l)_+ / s) U^T W,    the ratio being exactly 0 where s <= l.

The rank of Z follows from l. Rank r takes the smallest threshold that gives it, l = s_{r+1}, so its
plain output error is e_r = sum_i min(s_i, s_{r+1})^2. Among matrices of a smaller rank k, the
leading k directions of the same Z have the least objective: by von Neumann's trace inequality
it is at least sum_i 1/2 (s_i - t_i)^2 + l t_i over k values t_i >= 0.
"""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lrc_cli.engine.linalg import balanced, eigenpairs, root
from lrc_cli.engine.problem import Errors, Factors, Metric, Solution, Statistics, Survey, required
from lrc_cli.engine.solver import Given, Solver
from lrc_cli.engine.solvers.approximation import OnDenseInputs
from lrc_cli.engine.solvers.frobenius import FROBENIUS

UNIT = "half the squared output error + l x nuclear norm of the outputs, per token"
"""The programme's objective, in words."""


def _metric(statistics: Statistics) -> Metric:
    return Metric(gram=required(statistics.gram, "gram"))


def _spectrum(weight: Tensor, statistics: Statistics) -> Tensor:
    """Returns p_r = e_{r-1} - e_r = r (s_r^2 - s_{r+1}^2); its sums from r on are the errors
    e_r."""
    energies = FROBENIUS.spectrum(weight, statistics)
    following = torch.cat([energies[1:], energies.new_zeros(1)])
    return _counted(energies) * (energies - following)


def energies_of(spectrum: Tensor) -> Tensor:
    """Returns s^2 (k,), descending, from NUCLEAR's spectrum p: s_r^2 = sum_{j >= r} p_j / j."""
    return (spectrum / _counted(spectrum)).flip(0).cumsum(0).flip(0)


def rank_of(spectrum: Tensor, share: float) -> int:
    """Returns the number of s_i above share * s_1, at least 1, from NUCLEAR's spectrum p (k,)."""
    energies = energies_of(spectrum)
    return max(int((energies > share**2 * energies[0]).sum()), 1)


def _counted(values: Tensor) -> Tensor:
    """Returns 1, 2, ... k, on the device of `values` (k,)."""
    return torch.arange(1, len(values) + 1, dtype=values.dtype, device=values.device)


def _directions(weight: Tensor, statistics: Statistics) -> tuple[Tensor, Tensor]:
    """Returns U (m, k) and s (k,), descending; s is 0 below the numerical floor."""
    weight, gram = weight.double(), required(statistics.gram, "gram")
    if weight.shape[0] <= weight.shape[1]:
        energies, u = eigenpairs(weight @ gram @ weight.T)
    else:
        outputs = weight @ root(gram)
        energies, p = eigenpairs(outputs.T @ outputs)
        u, _ = torch.linalg.qr(outputs @ p)
    return u, energies.sqrt()


def _shrunk(weight: Tensor, u: Tensor, s: Tensor, threshold: float, rank: int) -> Factors:
    """Returns the leading `rank` directions of Z that the threshold leaves, at least one."""
    kept = max(min(rank, int((s > threshold).sum())), 1)
    u, s = u[:, :kept], s[:kept]
    ratio = torch.where(s > threshold, (s - threshold) / s, 0.0)
    return balanced(u, ratio[:, None] * (u.T @ weight))


def _threshold(s: Tensor, rank: int) -> float:
    """Returns s_{rank+1}, the smallest threshold that leaves `rank` directions; else 0."""
    return s[rank].item() if rank < len(s) else 0.0


def _factorize(weight: Tensor, statistics: Statistics, rank: int) -> Factors:
    u, s = _directions(weight, statistics)
    return _shrunk(weight.double(), u, s, _threshold(s, rank), rank)


def _survey(weight: Tensor, statistics: Statistics) -> Survey:
    spectrum = _spectrum(weight, statistics)
    return Survey(spectrum=spectrum, output_curve=spectrum.clone())


def _problems(given: Given) -> "list[Shrunk]":
    return [Shrunk(given.weight, given.statistics, share=given.threshold)]


NUCLEAR = Solver(
    name="nuclear",
    unit="mean squared output error per token, after the soft threshold",
    needs=frozenset({"gram"}),
    metric=_metric,
    spectrum=_spectrum,
    factorize=_factorize,
    survey=_survey,
    problems=_problems,
    rank_above=rank_of,
)


class _Outputs:
    """Holds what every threshold of one layer's programme starts from, found when it is asked for.

    Args:
        weight: W (m, n) float64.
    """

    def __init__(self, weight: Tensor, statistics: Statistics) -> None:
        self._weight, self._statistics = weight, statistics

    @cached_property
    def directions(self) -> tuple[Tensor, Tensor]:
        """U (m, k) and s (k,) of W X / sqrt(T), descending."""
        return _directions(self._weight, self._statistics)

    @property
    def s(self) -> Tensor:
        """The singular values (k,), descending."""
        return self.directions[1]

    @cached_property
    def root(self) -> Tensor:
        """G^(1/2), (n, n)."""
        return root(required(self._statistics.gram, "gram"))


class Shrunk(OnDenseInputs):
    """One layer's nuclear-norm programme, whose objective `errors` and `optimum` measure.

    Args:
        weight: W (m, n), any floating dtype.
        share: l as a share of s_1, in (0, 1); None: l is `level`, and `at` follows the rank.
        level: l, in the unit of an output's root mean square.
        outputs: of the same weight and statistics, where they are known already.
    """

    unit = UNIT

    def __init__(
        self,
        weight: Tensor,
        statistics: Statistics,
        *,
        share: float | None = None,
        level: float = 0.0,
        outputs: _Outputs | None = None,
    ) -> None:
        super().__init__(weight, statistics)
        self.metric = Metric(gram=required(statistics.gram, "gram"), scale=0.5)
        self._share, self._level = share, level
        self._outputs = outputs or _Outputs(self.weight, statistics)

    @property
    def output_spectrum(self) -> Tensor:
        return self._outputs.s.square()

    @cached_property
    def threshold(self) -> float:
        """l, in the unit of an output's root mean square."""
        return self._level if self._share is None else self._share * self._outputs.s[0].item()

    def at(self, rank: int) -> "Shrunk":
        """Returns the programme with the smallest threshold that gives this rank.

        A programme with a share returns itself. Raises SolveError.
        """
        if self._share is not None:
            return self
        level = _threshold(self._outputs.s, rank)
        return Shrunk(self.weight, self.statistics, level=level, outputs=self._outputs)

    def solve(self, rank: int) -> Solution:
        u, s = self._outputs.directions
        factors = _shrunk(self.weight, u, s, self.threshold, rank)
        return Solution(factors, factors.dense())

    def errors(self, fitted: Tensor) -> Errors:
        form, plain = self.metric.errors(self.weight - fitted)
        penalty = 0.0
        if self.threshold > 0:
            penalty = torch.linalg.svdvals(fitted.double() @ self._outputs.root).sum().item()
        return Errors(form + self.threshold * penalty, plain)

    def optimum(self, rank: int) -> float:
        s, level = self._outputs.s, self.threshold
        kept = min(rank, int((s > level).sum()))
        tail = s[kept:].square().flip(0).sum() / 2
        return (tail + torch.sum(level * s[:kept] - level**2 / 2)).item()

    @property
    def total(self) -> float:
        return self._outputs.s.square().sum().item() / 2

    @property
    def facts(self) -> dict[str, Any]:
        """Returns the threshold, also as a share of the largest singular value."""
        largest = self._outputs.s[0].item()
        share = self.threshold / largest if largest > 0 else 0.0
        return {"threshold": self.threshold, "threshold_share": share}
