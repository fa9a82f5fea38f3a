"""An interpolative form stores r rows of Z itself, and the others as combinations of them."""

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
"""The bytes of one int32 of the permutation."""


class StoreInterpolative(LowRankStorage):
    """Stores P [I; T] Z_J with pivots in row groups, T refitted against the rounded Z_J."""

    name = Interpolative.name

    def num_bytes(self, m: int, n: int, rank: int, itemsize: int, block: int) -> int:
        """Returns the bytes of the chosen rows, the coefficients and the permutation."""
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
        """Returns chosen rows and coefficients in the stored dtype.

        `block`, the rows of a row group, divides m. A rank that it does not divide (lowered by the
        numerical cap) is filled up with idle rows. Where no set of whole row groups is well
        conditioned, a row group becomes one row, at the largest rank that takes no more bytes.
        """
        target = target.double()
        factors = _filled(factors, block)
        # The error does not depend on the precision in which rows are chosen and T starts.
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
        """Returns the largest rank in the same bytes with a permutation of single rows."""
        (m, rank), n = factors.outer.shape, factors.inner.shape[1]
        budget = self.num_bytes(m, n, rank, itemsize, block)
        while rank > 1 and self.num_bytes(m, n, rank, itemsize, 1) > budget:
            rank -= 1
        return rank


def _filled(factors: Factors, block: int) -> Factors:
    """Returns the factors with zero directions up to a multiple of the row group."""
    m, missing = len(factors.outer), -factors.rank % block
    if m % block or factors.rank + missing >= m:
        raise ValueError(f"rank {factors.rank} of {m} rows has no pivots in blocks of {block}")
    outer = torch.nn.functional.pad(factors.outer, (0, missing))
    return Factors(outer, torch.nn.functional.pad(factors.inner, (0, 0, 0, missing)))


INTERPOLATIVE = StoreInterpolative()
