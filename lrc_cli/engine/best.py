"""The form of storage with the lowest stored error in the bytes that were granted."""

from dataclasses import replace

import torch
from torch import Tensor

from lrc_cli.engine.problem import Factors, Metric
from lrc_cli.engine.storage import (
    STORAGES,
    Stored,
    factors_bytes,
    interpolative_bytes,
    pivot_block,
)


def pack_best(
    factors: Factors,
    target: Tensor,
    metric: Metric,
    dtype: torch.dtype,
    *,
    storage: str = "auto",
    rank: int | None = None,
    rank_multiple: int = 1,
    spectrum: Tensor | None = None,
) -> Stored:
    """Round, refit and pack one layer.

    Args:
        factors: the solution at the granted rank.
        target: the matrix (m, n) that the solution approximates.
        metric: the form whose error is minimised and compared.
        dtype: of the stored factors.
        storage: a name in STORAGES, or "auto": interpolative at the granted rank or two factors
            at the rank that the same bytes allow, whichever has the lower stored error.
        rank: the granted rank; None: that of `factors` (which may be lower).
        rank_multiple: the rank of two factors is rounded down to it.
        spectrum: the solver's spectrum; saves the trial of two factors where even their
            unrounded optimum is worse than the stored interpolative form.

    Raises:
        SolveError: no form is finite in the stored dtype.
    """
    m, rank = len(target), factors.rank if rank is None else rank
    block = pivot_block(m, rank)
    if storage != "auto":
        return STORAGES[storage].pack(factors, target, metric, dtype, block)
    first = STORAGES["interpolative"].pack(factors, target, metric, dtype, block)
    smaller = _same_bytes_rank(target, rank, dtype.itemsize, block, rank_multiple)
    if smaller < 1:
        return replace(first, reason="interpolative: two factors do not fit these bytes")
    if spectrum is not None and spectrum[smaller:].sum().item() >= first.error:
        bound = spectrum[smaller:].sum().item()
        return _preferred(first, f"at least {bound:.3g} for factors of rank {smaller}")
    second = STORAGES["factors"].pack(factors.truncated(smaller), target, metric, dtype, block)
    if second.error < first.error:
        against = f"interpolative of rank {first.packed.rank}"
        return _preferred(second, f"{first.error:.3g} for {against}")
    return _preferred(first, f"{second.error:.3g} for factors of rank {smaller}")


def _preferred(stored: Stored, against: str) -> Stored:
    reason = f"{stored.packed.storage}: {stored.error:.3g} against {against} in the same bytes"
    return replace(stored, reason=reason)


def _same_bytes_rank(target: Tensor, rank: int, itemsize: int, block: int, multiple: int) -> int:
    """The largest rank of two factors in the bytes of the interpolative form; may be 0."""
    m, n = target.shape
    budget = interpolative_bytes(m, n, rank, itemsize, block)
    affordable = budget // factors_bytes(m, n, 1, itemsize, block)
    return affordable // multiple * multiple
