"""This module checks whether the shapes of a factorised layer's tensors in a checkpoint fit."""

from dataclasses import dataclass

import torch

from lrc_cli.errors import InputError
from lrc_cli.network.layouts import Layout


def damaged(cause: str) -> InputError:
    """Returns the error for a checkpoint whose tensors contradict each other."""
    return InputError(cause, "write the checkpoint again, it is damaged")


@dataclass(frozen=True, kw_only=True)
class FactorShapes:
    """The shapes of a factorised layer's tensors in a checkpoint."""

    name: str
    """The layer's name in the checkpoint, for messages."""
    weight: tuple[int, ...]
    """The shape of the inner factor, (r, n) in the layer's layout."""
    up: tuple[int, ...]
    """The shape of the outer factor, (m, r), or of T, (m - r, r), in the layer's layout."""
    perm: tuple[int, ...] | None = None
    """The shape of the permutation, (m / block,); None for two factors."""
    bias: bool = False
    """Whether the checkpoint has a bias for the layer."""

    @property
    def rank(self) -> int:
        """r, the second dimension of the outer factor."""
        return self.up[1]

    @property
    def out_features(self) -> int:
        """m: the rows of the outer factor, plus the r chosen rows of an interpolative layer."""
        return self.up[0] if self.perm is None else self.up[0] + self.rank

    def block(self, out_features: int) -> int:
        """Returns the rows of a row group, which the permutation moves together; 0 for two factors.

        Raises:
            InputError: the shapes do not fit a layer with `out_features` outputs.
        """
        if self.perm is None:
            return 0
        if len(self.perm) != 1 or not self.perm[0] or out_features % self.perm[0]:
            raise self._misfit(f"perm {self.perm} does not divide {out_features} rows")
        block = out_features // self.perm[0]
        if self.rank % block:
            raise self._misfit(f"rank {self.rank} is not a multiple of the block {block}")
        return block

    def check(self, layout: Layout, out_features: int, in_features: int) -> None:
        """Raises InputError unless the tensors make a matrix (out_features, in_features)."""
        rows = out_features - self.rank if self.block(out_features) else out_features
        inner = torch.empty(self.rank, in_features, device="meta")
        outer = torch.empty(rows, self.rank, device="meta")
        fits = self.weight == layout.inner(inner).shape and self.up == layout.outer(outer).shape
        if not fits or not 0 < self.rank < out_features:
            raise self._misfit(
                f"factors of shape {self.weight} and {self.up} do not make "
                f"a matrix of shape {(out_features, in_features)}"
            )

    def _misfit(self, cause: str) -> InputError:
        return damaged(f"layer {self.name}: {cause}")
