"""The form of storage with the lowest stored error in the bytes that were granted."""

from dataclasses import replace

import torch

from lrc_cli.engine.solvers.approximation import Approximation
from lrc_cli.engine.storage.forms import (
    STORAGES,
    Stored,
    factors_bytes,
    interpolative_bytes,
    pivot_block,
)


def pack_best(
    problem: Approximation,
    rank: int,
    dtype: torch.dtype,
    *,
    storage: str = "auto",
    rank_multiple: int = 1,
) -> Stored:
    """Solve, round, refit and pack one layer.

    Args:
        rank: the granted rank (the solution's may be lower).
        dtype: of the stored factors.
        storage: a name in STORAGES, or "auto": interpolative at the granted rank or two factors
            at the rank that the same bytes allow, whichever has the lower stored error.
        rank_multiple: the rank of two factors is rounded down to it.

    Returns:
        The packed layer; its errors are the problem's own.

    Raises:
        SolveError: no form is finite in the stored dtype.
    """
    m, n = problem.weight.shape
    if storage != "auto":
        return _packed(problem, rank, storage, dtype, pivot_block(m, rank))
    block = pivot_block(m, rank)
    first = _packed(problem, rank, "interpolative", dtype, block)
    fewer = _same_bytes_rank(m, n, rank, dtype.itemsize, block, rank_multiple)
    if fewer < 1:
        return replace(first, reason="interpolative: two factors do not fit these bytes")
    bound = problem.optimum(fewer)
    if bound is not None and bound >= first.error:
        # Even unrounded they would be worse: their trial is spared.
        return _preferred(first, f"at least {bound:.3g} for factors of rank {fewer}")
    second = _packed(problem, fewer, "factors", dtype, block)
    if second.error < first.error:
        against = f"interpolative of rank {first.packed.rank}"
        return _preferred(second, f"{first.error:.3g} for {against}")
    return _preferred(first, f"{second.error:.3g} for factors of rank {fewer}")


def _packed(
    problem: Approximation, rank: int, storage: str, dtype: torch.dtype, block: int
) -> Stored:
    factors, aim, zero = problem.solve(rank)
    stored = STORAGES[storage].pack(factors, aim, problem.metric, dtype, block, zero)
    return replace(stored, errors=problem.errors_of(stored))


def _preferred(stored: Stored, against: str) -> Stored:
    reason = f"{stored.packed.storage}: {stored.error:.3g} against {against} in the same bytes"
    return replace(stored, reason=reason)


def _same_bytes_rank(m: int, n: int, rank: int, itemsize: int, block: int, multiple: int) -> int:
    """The largest rank of two factors in the bytes of the interpolative form; may be 0."""
    budget = interpolative_bytes(m, n, rank, itemsize, block)
    affordable = budget // factors_bytes(m, n, 1, itemsize, block)
    return affordable // multiple * multiple
