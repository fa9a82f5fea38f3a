"""Forms of rank r have two tensors, `weight` and `up.weight`, fitted to each other after rounding.

The errors that decide here are the errors of the stored, rounded tensors in the solver's metric.
"""

import math
from abc import abstractmethod
from dataclasses import replace

import torch
from torch import Tensor

from lrc_cli.engine.budget.choices import Choice, Predicted, tail_sums
from lrc_cli.engine.problem import Errors, Factors, Metric, SolveError
from lrc_cli.engine.storage.refit import Refit
from lrc_cli.engine.storage.storage import Problem, Storage, Stored
from lrc_cli.forms import UP, WEIGHT, Packed

PIVOT_BLOCK = 8
"""The rows per pivot where the sizes divide by it: the gather then moves contiguous chunks."""

TILE = 32
"""The number of bfloat16 numbers that matrix units take together.

On a CPU with AMX, 2048 x 2048 at rank 1120 runs a fifth faster than at 1128.
"""

WIDE = 1024
"""The side from which ranks are multiples of TILE: below it too few ranks would be left."""


def default_rank_multiple(m: int, n: int) -> int:
    """Returns TILE where both sides are wide and divide by it, else the row group, else 1."""
    steps = [TILE] if min(m, n) >= WIDE else []
    return next((k for k in (*steps, PIVOT_BLOCK) if m % k == 0 and n % k == 0), 1)


def pivot_block(m: int, rank: int, block: int = PIVOT_BLOCK) -> int:
    """Returns `block` where it divides m and the rank, else 1."""
    return block if m % block == 0 and rank % block == 0 else 1


class LowRankStorage(Storage):
    """Packs a layer into a form that has a rank."""

    is_trainable = True

    @abstractmethod
    def num_bytes(self, m: int, n: int, rank: int, itemsize: int, block: int) -> int:
        """Returns the bytes of all tensors."""

    @abstractmethod
    def rounded(
        self,
        factors: Factors,
        target: Tensor,
        metric: Metric,
        dtype: torch.dtype,
        block: int,
        zero: Errors | None = None,
    ) -> Stored:
        """Returns the rounded tensors, refitted to the target (m, n) where that helps in the
        metric.

        Args:
            block: the rows of a row group of the permutation.
            zero: the errors of Z = 0, where they are known.
        """

    def choices(
        self,
        shape: tuple[int, int],
        itemsize: int,
        predicted: Predicted,
        *,
        rank_multiple: int,
        extra: int = 0,
    ) -> list[Choice]:
        """Returns the multiples of `rank_multiple` in 1..min(m - 1, n) that are smaller than dense.

        A choice's error is the tail of the spectrum.
        """
        m, n = shape
        errors = tail_sums(predicted.spectrum.cpu()).tolist()
        sizes = {
            rank: self.num_bytes(m, n, rank, itemsize, pivot_block(m, rank)) + extra
            for rank in range(rank_multiple, min(m - 1, n) + 1, rank_multiple)
        }
        return [
            Choice(self.name, rank, size, errors[rank])
            for rank, size in sizes.items()
            if size < itemsize * m * n
        ]

    def pack(
        self,
        problem: Problem,
        choice: Choice,
        dtype: torch.dtype,
        *,
        rank_multiple: int = 1,
    ) -> Stored:
        """Returns the problem's solution of the granted rank, packed (its rank may be lower)."""
        assert choice.rank is not None
        factors, aim, zero = problem.solve(choice.rank)
        block = pivot_block(len(problem.weight), choice.rank)
        stored = self.rounded(factors, aim, problem.metric, dtype, block, zero)
        return replace(stored, errors=problem.errors_of(stored))


def rounded_coefficients(refit: Refit, dtype: torch.dtype) -> Tensor:
    """Returns the refitted coefficients in the stored dtype, unless rounding undoes the gain."""
    start, fitted = refit.start.to(dtype), refit.solution(torch.finfo(dtype).eps).to(dtype)
    if not (fitted.isfinite().all() and refit.change(start, fitted) < 0):
        return start
    return fitted


def measured(packed: Packed, refit: Refit, zero: Errors | None) -> Stored:
    """Returns the packed layer with its errors. Raises SolveError where they are not finite."""
    errors = refit.errors(packed.tensors[UP].double(), zero)
    if not math.isfinite(errors.metric):
        raise SolveError(f"the factors do not fit {packed.tensors[WEIGHT].dtype}")
    return Stored(packed=packed, errors=errors, reason=f"{packed.form} as asked for")
