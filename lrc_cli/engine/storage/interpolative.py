"""An interpolative decomposition: r rows of Z itself, and the others as combinations of them."""

from dataclasses import replace

import torch
from torch import Tensor

from lrc_cli.engine.problem import Errors, Factors, Metric
from lrc_cli.engine.storage.low_rank import LowRankStorage, measured, rounded_coefficients
from lrc_cli.engine.storage.pivots import select
from lrc_cli.engine.storage.refit import Refit, deciding_dtype
from lrc_cli.engine.storage.storage import Stored
from lrc_cli.forms import PERM, UP, WEIGHT, Interpolative, Packed

PERM_ITEMSIZE = 4
"""Bytes of one int32 of the permutation."""


class StoreInterpolative(LowRankStorage):
    """P [I; T] Z_J with pivots in blocks, T refitted against the rounded Z_J."""

    name = Interpolative.name

    def num_bytes(self, m: int, n: int, rank: int, itemsize: int, block: int) -> int:
        """Bytes of the chosen rows, the coefficients and the permutation."""
        return itemsize * rank * (n + m - rank) + PERM_ITEMSIZE * (m // block)

    def rounded(
        self,
        factors: Factors,
        target: Tensor,
        metric: Metric,
        dtype: torch.dtype,
        block: int,
        zero: Errors | None = None,
    ) -> Stored:
        """Chosen rows and coefficients in the stored dtype.

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
            fewer = factors.truncated(self._rank_in_the_same_bytes(factors, dtype.itemsize, block))
            return self.rounded(fewer, target, metric, dtype, 1, zero)
        numbers = torch.arange(len(target), device=target.device)
        rows = numbers.view(-1, block)[pivots.order].flatten()
        weight = (factors.outer[rows[: factors.rank]] @ factors.inner).to(dtype)
        if metric.fisher is not None:
            fisher = metric.fisher.index_select(0, rows).index_select(1, rows)
            metric = replace(metric, fisher=fisher)
        refit = Refit(pivots.coefficients, target[rows], weight.double(), metric, coarse)
        packed = Packed(
            form=self.name,
            shape=(len(target), target.shape[1]),
            tensors={
                WEIGHT: weight,
                UP: rounded_coefficients(refit, dtype),
                PERM: pivots.order.argsort().to(torch.int32),
            },
            parameters={"rank": len(weight), "block": block},
        )
        return measured(packed, refit, zero)

    def _rank_in_the_same_bytes(self, factors: Factors, itemsize: int, block: int) -> int:
        """The largest rank whose permutation of single rows fits the bytes of the blocked form."""
        (m, rank), n = factors.outer.shape, factors.inner.shape[1]
        budget = self.num_bytes(m, n, rank, itemsize, block)
        while rank > 1 and self.num_bytes(m, n, rank, itemsize, 1) > budget:
            rank -= 1
        return rank


def _filled(factors: Factors, block: int) -> Factors:
    """Zero directions up to a multiple of the block."""
    m, missing = len(factors.outer), -factors.rank % block
    if m % block or factors.rank + missing >= m:
        raise ValueError(f"rank {factors.rank} of {m} rows has no pivots in blocks of {block}")
    outer = torch.nn.functional.pad(factors.outer, (0, missing))
    return Factors(outer, torch.nn.functional.pad(factors.inner, (0, 0, 0, missing)))


INTERPOLATIVE = StoreInterpolative()
