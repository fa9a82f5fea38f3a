"""`auto` takes the form with the lowest stored error in the bytes that were granted."""

from dataclasses import replace

import torch

from lrc_cli.engine.budget.choices import Choice, Predicted
from lrc_cli.engine.storage.factors import FACTORS
from lrc_cli.engine.storage.interpolative import INTERPOLATIVE
from lrc_cli.engine.storage.low_rank import pivot_block
from lrc_cli.engine.storage.storage import Problem, Storage, Stored


class Auto(Storage):
    """Tries the interpolative form at the granted rank, and two factors in the same bytes."""

    name = "auto"
    is_trainable = True

    def choices(
        self,
        shape: tuple[int, int],
        itemsize: int,
        predicted: Predicted,
        *,
        rank_multiple: int,
        extra: int = 0,
    ) -> list[Choice]:
        """Returns the ranks of the interpolative form, which the trial starts from."""
        ranks = INTERPOLATIVE.choices(
            shape, itemsize, predicted, rank_multiple=rank_multiple, extra=extra
        )
        return [choice._replace(form=self.name) for choice in ranks]

    def pack(
        self,
        problem: Problem,
        choice: Choice,
        dtype: torch.dtype,
        *,
        rank_multiple: int = 1,
    ) -> Stored:
        """Returns the form with the lower stored error.

        Args:
            rank_multiple: the rank of two factors is rounded down to it.
        """
        m, n = problem.weight.shape
        assert choice.rank is not None
        first = INTERPOLATIVE.pack(problem, choice, dtype)
        fewer = _same_bytes_rank(m, n, choice.rank, dtype.itemsize, rank_multiple)
        if fewer < 1:
            return replace(first, reason="interpolative: two factors do not fit these bytes")
        bound = problem.optimum(fewer)
        if bound is not None and bound >= first.error:
            # Two factors would be worse even unrounded, so they are not tried.
            return _preferred(first, f"at least {bound:.3g} for factors of rank {fewer}")
        second = FACTORS.pack(problem, choice._replace(rank=fewer), dtype)
        if second.error < first.error:
            against = f"interpolative of rank {first.packed.rank}"
            return _preferred(second, f"{first.error:.3g} for {against}")
        return _preferred(first, f"{second.error:.3g} for factors of rank {fewer}")


def _preferred(stored: Stored, against: str) -> Stored:
    reason = f"{stored.packed.form}: {stored.error:.3g} against {against} in the same bytes"
    return replace(stored, reason=reason)


def _same_bytes_rank(m: int, n: int, rank: int, itemsize: int, multiple: int) -> int:
    """Returns the largest rank of two factors in the bytes of the interpolative form; may be 0."""
    block = pivot_block(m, rank)
    budget = INTERPOLATIVE.num_bytes(m, n, rank, itemsize, block)
    affordable = budget // FACTORS.num_bytes(m, n, 1, itemsize, block)
    return affordable // multiple * multiple


AUTO = Auto()
