"""One layer's approximation problem gives its solution of any rank, and judges any matrix.

Problems differ in what they fit to: the layer's own inputs, the inputs of a compressed network, the
outputs behind a ReLU. Rounding, packing and the errors that reports print do not differ, so they go
through this one interface.
"""

from abc import ABC, abstractmethod
from typing import Any, Self

import torch
from torch import Tensor

from lrc_cli.engine.budget.choices import tail_sums
from lrc_cli.engine.linalg import truncated_svd
from lrc_cli.engine.problem import Errors, Metric, Solution, Statistics
from lrc_cli.engine.storage.storage import Stored
from lrc_cli.forms import dense

LOST = 2.0**-40
"""The share of a bias below which what is added to the bias has few digits left in float64."""


class Approximation(ABC):
    """Offers what fit_layer needs to know. All tensors are float64 on one device."""

    unit: str
    """The unit of Errors.metric, in words."""
    inputs: str
    """The inputs on which Errors.output is measured.

    They are "calibration", "white" (no data was used) or "compressed" (calibration data through the
    compressed network).
    """
    weight: Tensor
    """W (m, n), the dense weight."""
    metric: Metric
    """The metric in which rounded factors are refitted and forms of storage compared."""

    @abstractmethod
    def solve(self, rank: int) -> Solution:
        """Returns the solution of a rank in 1..min(m, n). Raises SolveError."""

    @abstractmethod
    def errors(self, fitted: Tensor) -> Errors:
        """Returns the errors of a matrix Z (m, n), multiplied out from the difference."""

    def errors_of(self, stored: Stored) -> Errors:
        """Returns the errors of a solution that was packed."""
        return self.errors(dense(stored.packed))

    def svd_errors(self, rank: int) -> Errors:
        """Returns the errors of plain truncated SVD of W."""
        return self.errors(truncated_svd(self.weight, rank).dense())

    @abstractmethod
    def optimum(self, rank: int) -> float | None:
        """Returns the least Errors.metric of that rank; None where it cannot be proved."""

    @abstractmethod
    def output_optimum(self, rank: int) -> float:
        """Returns the least Errors.output of that rank."""

    @property
    @abstractmethod
    def total(self) -> float:
        """Errors.metric of Z = 0: the scale of the numerical floor."""

    @property
    @abstractmethod
    def energy(self) -> float:
        """||W X||_F^2 / T."""

    @property
    def facts(self) -> dict[str, Any]:
        """Returns what reports say of this problem beside its errors."""
        return {}

    def at(self, rank: int) -> Self:
        """Returns the problem that belongs to this granted rank.

        It is the problem itself, unless its objective depends on the rank.
        """
        return self

    def shift(self, fitted: Tensor) -> Tensor | None:
        """Returns (m,) what Z's new bias adds to the old bias; None: the bias stays as it is."""
        return None

    def offset(self, errors: Errors, offset: Tensor) -> Errors:
        """Returns `errors` for outputs that are all off by `offset` (m,) as well.

        A rounded bias has this effect. The rest of the difference is around the mean inputs.
        """
        fisher = self.metric.fisher
        weighted = offset if fisher is None else fisher @ offset
        form = self.metric.scale * torch.dot(weighted, offset).item()
        return Errors(errors.metric + form, errors.output + torch.dot(offset, offset).item())


class OnDenseInputs(Approximation):
    """Approximates W by Z on the inputs of the dense network, for any objective.

    Args:
        weight: (m, n), any floating dtype.
    """

    def __init__(self, weight: Tensor, statistics: Statistics) -> None:
        self.weight = weight.double()
        self.statistics = statistics
        self.inputs = "white" if statistics.gram is None else "calibration"

    @property
    @abstractmethod
    def output_spectrum(self) -> Tensor:
        """(k,) float64: its sum from r on is the least plain output error of rank r."""

    def output_optimum(self, rank: int) -> float:
        return tail(self.output_spectrum, rank)

    @property
    def energy(self) -> float:
        varying = self.output_spectrum.sum().item()
        mean = self.statistics.mean
        return varying if mean is None else varying + torch.sum((self.weight @ mean) ** 2).item()

    def shift(self, fitted: Tensor) -> Tensor | None:
        """Returns W mean(x) - Z mean(x), the free bias of docs/theory.md."""
        mean = self.statistics.mean
        return None if mean is None else (self.weight - fitted) @ mean


def tail(spectrum: Tensor, rank: int) -> float:
    """Returns the sum of a spectrum (k,) from a rank on."""
    return tail_sums(spectrum)[min(rank, len(spectrum))].item()


def rounded_bias(old: Tensor | None, shift: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns the bias (m,) in `dtype` that is `shift` more than the old bias.

    Args:
        old: (m,), any floating dtype; None for a layer without a bias.
        shift: (m,) float64.

    Returns:
        The bias, and by how much it is off (m,) float64.
    """
    before = torch.zeros_like(shift) if old is None else old.to(shift)
    exact = shift if old is None else before + shift
    bias = exact.to(dtype)
    new = bias.to(exact)
    # A shift that is lost beside the bias even in float64 must not be lost in the difference.
    is_lost = shift.abs() < LOST * before.abs()
    return bias, torch.where(is_lost, new - before - shift, new - exact)
