"""The forms of a matrix of rank r have `weight` and `up.weight`, and perhaps a permutation."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from lrc_cli.forms.form import WEIGHT, Form, Orientation, Packed

UP = "up.weight"
"""The outer factor, or T."""

PERM = "perm"
"""The permutation of an interpolative form."""


class LowRank(Form):
    """Describes a form that has a rank.

    Loaders know it by its tensors, and run both factors apart.
    """

    table_keys: ClassVar[tuple[str, ...]] = ("rank",)

    def on_disk(self, packed: Packed, layout: Orientation) -> Mapping[str, Tensor]:
        """Returns both factors in the layer's layout."""
        tensors = packed.tensors
        factors = {WEIGHT: layout.inner(tensors[WEIGHT]), UP: layout.outer(tensors[UP])}
        return {**tensors, **factors}


class TwoFactors(LowRank):
    """Stores the inner factor (r, n) as `weight` and the outer factor (m, r) as `up`."""

    name = "factors"
    tensors = (WEIGHT, UP)

    def dense(self, packed: Packed) -> Tensor:
        """Returns up @ weight, float64."""
        return packed.tensors[UP].double() @ packed.tensors[WEIGHT].double()


class Interpolative(LowRank):
    """Stores Z_J (r, n) as `weight`, T (m - r, r) as `up`, and `perm`, int32 (m / block,).

    Z_J are chosen rows of Z. Row group i of Z, of `block` rows, is row group perm[i] of (Z_J, T
    Z_J).
    """

    name = "interpolative"
    tensors = (WEIGHT, UP, PERM)
    uncounted = (PERM,)
    table_keys = ("rank", "block")

    def dense(self, packed: Packed) -> Tensor:
        """Returns the row groups of (Z_J, T Z_J) in the order of the permutation, float64."""
        weight, up = (packed.tensors[name].double() for name in (WEIGHT, UP))
        perm = packed.tensors[PERM].long()
        stacked = torch.cat([weight, up @ weight])
        blocks = stacked.view(len(perm), -1, weight.shape[1])
        return blocks[perm].reshape(stacked.shape)

    def largest_coefficient(self, packed: Packed) -> float:
        """Returns max |T|: rounding costs in proportion to T."""
        return packed.tensors[UP].abs().max().item()
