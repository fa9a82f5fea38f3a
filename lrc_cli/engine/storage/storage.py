"""A storage says what a form offers for which bytes, and packs a matrix into the form.

The tensors themselves are described in `lrc_cli.forms`. A new form is a class there and a class
here, with their entries in `FORMS` and `STORAGES`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from lrc_cli.engine.budget.choices import Choice, Predicted
from lrc_cli.engine.problem import Errors, Metric, Solution
from lrc_cli.forms import Packed


@dataclass(frozen=True, kw_only=True)
class Stored:
    """Holds a packed layer with what it costs in quality."""

    packed: Packed
    errors: Errors
    """The errors of the rounded tensors, in the metric and against the matrix of their fit."""
    reason: str
    """The reason for this form, in words for the report."""

    @property
    def error(self) -> float:
        """The error by which forms are compared."""
        return self.errors.metric


class Problem(Protocol):
    """Offers what a form asks of a layer's approximation problem (solvers/approximation.py)."""

    weight: Tensor
    """W (m, n) float64."""
    metric: Metric
    """The metric in which rounded tensors are fitted."""

    def solve(self, rank: int) -> Solution:
        """Returns the solution of a rank in 1..min(m, n), and the aim of rounded tensors."""

    def errors(self, fitted: Tensor) -> Errors:
        """Returns the errors of a matrix Z (m, n)."""

    def errors_of(self, stored: Stored) -> Errors:
        """Returns the errors of a solution that was packed."""

    def optimum(self, rank: int) -> float | None:
        """Returns the least error of that rank; None where it cannot be proved."""


class Storage(ABC):
    """Stands for a value of `compression.storage`: one form, or the best of several."""

    name: ClassVar[str]
    """The name in configs."""
    is_measured: ClassVar[bool] = False
    """Whether the errors of its choices are measured, because no spectrum tells them."""
    is_trainable: ClassVar[bool] = False
    """Whether `recover` can train its tensors, which are factors of floating-point numbers."""

    @abstractmethod
    def choices(
        self,
        shape: tuple[int, int],
        itemsize: int,
        predicted: Predicted,
        *,
        rank_multiple: int,
        extra: int = 0,
    ) -> list[Choice]:
        """Returns what a layer (m, n) may become, apart from dense; all smaller than dense.

        Args:
            itemsize: bytes of a number in the stored dtype.
            predicted: the layer's errors, as far as they are known.
            rank_multiple: the number that ranks are multiples of.
            extra: bytes that the layer gains in any form (a bias that dense lacks).
        """

    def measure(
        self, weight: Tensor, metric: Metric, dtype: torch.dtype
    ) -> Sequence[Errors] | None:
        """Returns the errors of the form's choices; None where a spectrum tells them.

        Phase one calls this once for a layer, and keeps what is returned: `Predicted.measured` has
        these errors, in their order, when `choices` is called.

        Args:
            weight: W (m, n).
            metric: the form in which the layer's method judges a difference.
            dtype: the stored dtype.
        """
        return None

    @abstractmethod
    def pack(
        self,
        problem: Problem,
        choice: Choice,
        dtype: torch.dtype,
        *,
        rank_multiple: int = 1,
    ) -> Stored:
        """Solves, rounds and packs one layer; the errors are the problem's own.

        Raises:
            SolveError: the layer cannot be solved, or is not finite in the stored dtype.
        """
