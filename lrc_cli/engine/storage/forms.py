"""How a matrix of rank r is written down: two factors, or an interpolative decomposition.

The errors that decide here are those of the stored, rounded tensors in the solver's metric.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from lrc_cli.engine.problem import Errors, Factors, Metric, SolveError
from lrc_cli.engine.storage.pivots import select
from lrc_cli.engine.storage.refit import Refit, deciding_dtype

PIVOT_BLOCK = 8
"""Rows per pivot where the sizes divide by it: the gather then moves contiguous chunks."""

PERM_ITEMSIZE = 4
"""Bytes of one int32 of the permutation."""


@dataclass(frozen=True, kw_only=True)
class Packed:
    """The tensors of one layer as they are written (docs/format.md)."""

    storage: str
    """The name in STORAGES."""

    weight: Tensor
    """inner (r, n), or the chosen rows Z_J (r, n); stored dtype."""

    up: Tensor
    """outer (m, r), or T (m - r, r); stored dtype."""

    perm: Tensor | None = None
    """int32 (m / block,) of interpolative storage: block i of y is block perm[i] of (z, T z)."""

    block: int = 1
    """Rows per entry of perm."""

    def on_host(self) -> "Packed":
        """The same in CPU memory."""
        perm = None if self.perm is None else self.perm.cpu()
        return replace(self, weight=self.weight.cpu(), up=self.up.cpu(), perm=perm)

    @property
    def rank(self) -> int:
        """r."""
        return self.weight.shape[0]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        tensors = (self.weight, self.up, self.perm)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A packed layer with what it costs in quality."""

    packed: Packed
    errors: Errors
    """Of the rounded tensors: against what they were refitted to, in the metric of that."""

    reason: str
    """Why this form, in words for the report."""

    @property
    def error(self) -> float:
        """What forms are compared by."""
        return self.errors.metric


class Pack(Protocol):
    """From factors to what is stored."""

    def __call__(
        self,
        factors: Factors,
        target: Tensor,
        metric: Metric,
        dtype: torch.dtype,
        block: int,
        zero: Errors | None = None,
    ) -> Stored:
        """The rounded tensors, refitted to the target (m, n) in the metric where that lowers the
        error; `zero`: the errors of Z = 0, where they are known."""


@dataclass(frozen=True, kw_only=True)
class Storage:
    """One form of storage."""

    num_bytes: Callable[[int, int, int, int, int], int]
    """(m, n, rank, itemsize, block) -> bytes."""

    pack: Pack


def pivot_block(m: int, rank: int, block: int = PIVOT_BLOCK) -> int:
    """`block` where it divides m and the rank, else 1."""
    return block if m % block == 0 and rank % block == 0 else 1


def factors_bytes(m: int, n: int, rank: int, itemsize: int, block: int) -> int:
    """Bytes of two factors."""
    return itemsize * rank * (m + n)


def interpolative_bytes(m: int, n: int, rank: int, itemsize: int, block: int) -> int:
    """Bytes of the chosen rows, the coefficients and the permutation."""
    return itemsize * rank * (n + m - rank) + PERM_ITEMSIZE * (m // block)


def dense(packed: Packed) -> Tensor:
    """The matrix (m, n) that the stored tensors stand for, float64."""
    weight, up = packed.weight.double(), packed.up.double()
    if packed.perm is None:
        return up @ weight
    stacked = torch.cat([weight, up @ weight])
    blocks = stacked.view(len(packed.perm), -1, weight.shape[1])
    return blocks[packed.perm.long()].reshape(stacked.shape)


def pack_factors(
    factors: Factors,
    target: Tensor,
    metric: Metric,
    dtype: torch.dtype,
    block: int,
    zero: Errors | None = None,
) -> Stored:
    """Two factors; the outer one is refitted against the rounded inner one (F drops out)."""
    weight = factors.inner.to(dtype)
    refit = Refit(factors.outer, target.double(), weight.double(), metric, deciding_dtype(dtype))
    packed = Packed(storage="factors", weight=weight, up=_rounded(refit, dtype))
    return _measured(packed, refit, zero)


def pack_interpolative(
    factors: Factors,
    target: Tensor,
    metric: Metric,
    dtype: torch.dtype,
    block: int,
    zero: Errors | None = None,
) -> Stored:
    """P [I; T] Z_J with pivots in blocks, T refitted against the rounded Z_J.

    `block` divides m. A rank that it does not divide (lowered by the numerical cap) is filled
    up with idle rows. Where no set of whole blocks is well conditioned the block becomes 1, at
    the largest rank that takes no more bytes.
    """
    target = target.double()
    factors = _filled(factors, block)
    # Which rows are chosen, and what T starts from, is no part of the error.
    coarse = deciding_dtype(dtype)
    basis, _ = torch.linalg.qr(factors.outer.to(coarse))
    pivots = select(basis, block)
    if pivots is None:
        rank = _rank_in_the_same_bytes(factors, dtype.itemsize, block)
        return pack_interpolative(factors.truncated(rank), target, metric, dtype, 1, zero)
    rows = torch.arange(len(target), device=target.device).view(-1, block)[pivots.order].flatten()
    weight = (factors.outer[rows[: factors.rank]] @ factors.inner).to(dtype)
    if metric.fisher is not None:
        fisher = metric.fisher.index_select(0, rows).index_select(1, rows)
        metric = replace(metric, fisher=fisher)
    refit = Refit(pivots.coefficients, target[rows], weight.double(), metric, coarse)
    packed = Packed(
        storage="interpolative",
        weight=weight,
        up=_rounded(refit, dtype),
        perm=pivots.order.argsort().to(torch.int32),
        block=block,
    )
    return _measured(packed, refit, zero)


def _filled(factors: Factors, block: int) -> Factors:
    """Zero directions up to a multiple of the block."""
    m, missing = len(factors.outer), -factors.rank % block
    if m % block or factors.rank + missing >= m:
        raise ValueError(f"rank {factors.rank} of {m} rows has no pivots in blocks of {block}")
    outer = torch.nn.functional.pad(factors.outer, (0, missing))
    return Factors(outer, torch.nn.functional.pad(factors.inner, (0, 0, 0, missing)))


def _rank_in_the_same_bytes(factors: Factors, itemsize: int, block: int) -> int:
    """The largest rank whose permutation of single rows fits the bytes of the blocked form."""
    (m, rank), n = factors.outer.shape, factors.inner.shape[1]
    budget = interpolative_bytes(m, n, rank, itemsize, block)
    while rank > 1 and interpolative_bytes(m, n, rank, itemsize, 1) > budget:
        rank -= 1
    return rank


def _rounded(refit: Refit, dtype: torch.dtype) -> Tensor:
    """The coefficients in the stored dtype: the refitted ones, unless rounding undoes the gain."""
    start, fitted = refit.start.to(dtype), refit.solution(torch.finfo(dtype).eps).to(dtype)
    if not (fitted.isfinite().all() and refit.change(start, fitted) < 0):
        return start
    return fitted


def _measured(packed: Packed, refit: Refit, zero: Errors | None) -> Stored:
    errors = refit.errors(packed.up.double(), zero)
    if not math.isfinite(errors.metric):
        raise SolveError(f"the factors do not fit {packed.weight.dtype}")
    return Stored(packed=packed, errors=errors, reason=f"{packed.storage} as asked for")


STORAGES: dict[str, Storage] = {
    "factors": Storage(num_bytes=factors_bytes, pack=pack_factors),
    "interpolative": Storage(num_bytes=interpolative_bytes, pack=pack_interpolative),
}


def storage_bytes(storage: str, m: int, n: int, rank: int, itemsize: int, block: int) -> int:
    """Bytes of a storage by name; "auto" takes those of interpolative, which it starts from."""
    name = "interpolative" if storage == "auto" else storage
    return STORAGES[name].num_bytes(m, n, rank, itemsize, block)
