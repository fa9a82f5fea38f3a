"""A layer is stored as two factors: weight (r, n) and up (m, r), Z = up @ weight."""

import torch
from torch import Tensor

from lrc_cli.engine.problem import Errors, Factors, Metric
from lrc_cli.engine.storage.low_rank import LowRankStorage, measured, rounded_coefficients
from lrc_cli.engine.storage.refit import Refit, deciding_dtype
from lrc_cli.engine.storage.storage import Stored
from lrc_cli.forms import UP, WEIGHT, Packed, TwoFactors


class StoreFactors(LowRankStorage):
    """Refits the outer factor against the rounded inner factor (F drops out)."""

    name = TwoFactors.name

    def num_bytes(self, m: int, n: int, rank: int, itemsize: int, block: int) -> int:
        """Returns the bytes of two factors."""
        return itemsize * rank * (m + n)

    def rounded(
        self,
        factors: Factors,
        target: Tensor,
        metric: Metric,
        dtype: torch.dtype,
        block: int,
        zero: Errors | None = None,
    ) -> Stored:
        """Returns both factors in the stored dtype; `block` has no effect here."""
        weight = factors.inner.to(dtype)
        refit = Refit(
            factors.outer, target.double(), weight.double(), metric, deciding_dtype(dtype)
        )
        packed = Packed(
            form=self.name,
            shape=(len(target), target.shape[1]),
            tensors={WEIGHT: weight, UP: rounded_coefficients(refit, dtype)},
            parameters={"rank": len(weight), "block": 1},
        )
        return measured(packed, refit, zero)


FACTORS = StoreFactors()
