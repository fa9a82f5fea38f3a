"""The (bytes, error) choices of a layer: what the allocation chooses from."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lrc_cli.engine.storage.forms import PIVOT_BLOCK, pivot_block, storage_bytes

DENSE = 0
"""The rank that stands for "left dense"."""

TILE = 32
"""Matrix units take bfloat16 numbers by the 32: on a CPU with AMX, 2048 x 2048 at rank 1120 runs a
fifth faster than at 1128."""

WIDE = 1024
"""The side from which ranks are multiples of TILE: below it too few ranks would be left."""


@dataclass(frozen=True, kw_only=True)
class Choices:
    """Alternatives for one layer, in any order and of any kind."""

    num_bytes: Tensor
    """The bytes of each choice, (k,) int64."""

    errors: Tensor
    """The error of each choice, (k,) float64, finite and >= 0, in a unit that all layers share."""

    def __post_init__(self) -> None:
        if self.num_bytes.shape != self.errors.shape or self.errors.dim() != 1:
            raise ValueError("num_bytes and errors must be vectors of the same length")
        if len(self.errors) == 0:
            raise ValueError("a layer needs at least one choice")
        if not torch.isfinite(self.errors).all() or (self.errors < 0).any():
            raise ValueError("errors must be finite and not negative")


@dataclass(frozen=True, kw_only=True)
class RankChoices(Choices):
    """Choices that are ranks; the last rank is DENSE."""

    ranks: Tensor
    """The ranks, (k,) int64."""


def default_rank_multiple(m: int, n: int) -> int:
    """The first that divides both sides: TILE where both are wide, PIVOT_BLOCK, 1."""
    steps = [TILE] if min(m, n) >= WIDE else []
    return next((k for k in (*steps, PIVOT_BLOCK) if m % k == 0 and n % k == 0), 1)


def tails(spectrum: Tensor) -> Tensor:
    """The tail sums (k + 1,) float64: entry r is spectrum[r:].sum(), added from the small end."""
    sums = spectrum.double().flip(0).cumsum(0).flip(0)
    return torch.cat([sums, sums.new_zeros(1)])


def rank_choices(
    spectrum: Tensor,
    *,
    m: int,
    n: int,
    itemsize: int,
    storage: str = "auto",
    rank_multiple: int | None = None,
    extra: int = 0,
) -> RankChoices:
    """Every useful rank of an (m, n) layer, and dense at error 0.

    Ranks are multiples of `rank_multiple` (None: `default_rank_multiple`) in 1..min(m - 1, n)
    whose storage, with `extra` bytes (a bias that dense lacks), takes fewer bytes than `itemsize`
    * m * n. Divide the spectrum by its sum for
    `relative` allocation. The tensors are on the CPU.
    """
    step = default_rank_multiple(m, n) if rank_multiple is None else rank_multiple
    dense_bytes = itemsize * m * n
    sizes = {
        rank: storage_bytes(storage, m, n, rank, itemsize, pivot_block(m, rank)) + extra
        for rank in range(step, min(m - 1, n) + 1, step)
    }
    ranks = [rank for rank, size in sizes.items() if size < dense_bytes]
    errors = tails(spectrum.cpu())
    index = torch.tensor(ranks, dtype=torch.int64)
    return RankChoices(
        ranks=torch.tensor([*ranks, DENSE]),
        num_bytes=torch.tensor([*(sizes[rank] for rank in ranks), dense_bytes]),
        errors=torch.cat([errors[index], errors.new_zeros(1)]),
    )
