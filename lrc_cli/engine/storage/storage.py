"""What a layer may be stored as: what a form offers for which bytes, and how a matrix is packed.

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
    """A packed layer with what it costs in quality."""

    packed: Packed
    errors: Errors
    """The errors of the rounded tensors: against what they were fitted to, in its metric."""
    reason: str
    """Why this form, in words for the report."""

    @property
    def error(self) -> float:
        """What forms are compared by."""
        return self.errors.metric


class Problem(Protocol):
    """What a form asks of a layer's approximation problem (solvers/approximation.py)."""

    weight: Tensor
    """W (m, n) float64."""
    metric: Metric
    """The form in which rounded tensors are fitted."""

    def solve(self, rank: int) -> Solution:
        """The solution of a rank in 1..min(m, n), and what rounded tensors are to aim at."""

    def errors(self, fitted: Tensor) -> Errors:
        """The errors of a matrix Z (m, n)."""

    def errors_of(self, stored: Stored) -> Errors:
        """The errors of a solution that was packed."""

    def optimum(self, rank: int) -> float | None:
        """The least error of that rank; None where it cannot be proved."""


class Storage(ABC):
    """What `compression.storage` can name: one form, or several of which the best is taken."""

    name: ClassVar[str]
    """The name in configs."""
    is_measured: ClassVar[bool] = False
    """Whether the errors of its choices are measured, because no spectrum tells them."""

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
        """What a layer (m, n) may become, apart from dense; all smaller than dense.

        Args:
            itemsize: bytes of a number in the stored dtype.
            predicted: the layer's errors, as far as they are known.
            rank_multiple: what ranks are multiples of.
            extra: bytes that the layer gains in any form (a bias that dense lacks).
        """

    def measure(
        self, weight: Tensor, metric: Metric, dtype: torch.dtype
    ) -> Sequence[Errors] | None:
        """The errors of the choices of a storage that is measured; None: a spectrum tells them.

        Phase one calls this once for a layer, and keeps what is returned: `Predicted.measured` has
        these errors, in their order, when `choices` is called. Raises SolveError.

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
        """Solve, round and pack one layer; the errors are the problem's own.

        Raises:
            SolveError: the layer cannot be solved, or is not finite in the stored dtype.
        """
