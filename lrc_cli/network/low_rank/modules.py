"""A factorised layer is a slot while a checkpoint loads, and has plain parts at run time.

A layer of m outputs and n inputs at rank r is stored, and named in every state dict, as

    weight      (r, n)      inner factor; interpolative: the chosen rows Z_J
    up.weight   (m, r)      outer factor; interpolative: T, (m - r, r)
    perm        (m / block) int32, interpolative only
    bias        (m,)        optional

A convolution's factors have the convolution's layout (layouts.py). The layer computes z = weight x
and y = up z. An interpolative layer computes y = concat(z, T z), and puts row groups of `block`
rows in the order `perm`. This module is pure torch and does not know transformers.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrc_cli.network.layouts import Layout
from lrc_cli.network.low_rank.row_order import in_order
from lrc_cli.network.low_rank.shapes import FactorShapes, damaged
from lrc_cli.network.low_rank.stored import StoredLayer


class LowRankLayer(StoredLayer):
    """The base class of both modules of a factorised layer; subclasses own the inner factor.

    Args:
        in_features: n.
        out_features: m.
        rank: r, below m.
        block: the rows of a row group, which the permutation moves together; 0 for two factors.
        layout: the layout of the dense layer.
    """

    up: nn.Module
    perm: Tensor | None

    def __init__(
        self, *, in_features: int, out_features: int, rank: int, block: int, layout: Layout
    ) -> None:
        super().__init__(in_features=in_features, out_features=out_features, layout=layout)
        self.rank = rank
        self.block = block

    @property
    def storage(self) -> str:
        """The name of the form: `factors` or `interpolative`."""
        return "interpolative" if self.block else "factors"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the inner factor."""
        return self.factors()[0].dtype

    def factors(self) -> tuple[Tensor, Tensor]:
        """Returns both factors as matrices: (r, n), and (m, r) or (m - r, r)."""
        inner, outer = self.weight, self.up.weight
        assert isinstance(inner, Tensor) and isinstance(outer, Tensor)
        return inner.flatten(1), outer.flatten(1)

    def outer(self) -> Tensor:
        """Returns the outer factor (m, r) of the whole weight, whose inner factor is (r, n)."""
        inner, outer = self.factors()
        return self.assemble(torch.eye(self.rank).to(inner), outer.T).T

    def table_entry(self) -> dict[str, Any]:
        """Returns the entry in a checkpoint's layer table; `block` is None for two factors."""
        return {"storage": self.storage, "rank": self.rank, "block": self.block or None}

    def inner(self, x: Tensor) -> Tensor:
        """Maps inputs (..., n) to (..., r), in the layer's layout."""
        raise NotImplementedError

    def rows(self, numbers: Tensor) -> Tensor:
        """Returns the rows (..., n) of the dense weight with these numbers (...)."""
        inner, outer = self.factors()
        if self.perm is None:
            return F.embedding(numbers, outer) @ inner
        blocks = self.perm.long()[numbers // self.block]
        places = blocks * self.block + numbers % self.block  # in concat(inner, outer @ inner)
        chosen = F.embedding(places.clamp(max=self.rank - 1), inner)
        mixed = F.embedding((places - self.rank).clamp(min=0), outer) @ inner
        return torch.where((places < self.rank)[..., None], chosen, mixed)

    def product(self, x: Tensor) -> Tensor:
        """Applies the dense weight, and the bias, to inputs."""
        z, channels = self.inner(x), self.layout.channels
        return self.biased(self.assemble(z, self.up(z), channels))

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """Returns the weight (m, n): the factors multiplied out."""
        inner, outer = (factor.to(dtype) for factor in self.factors())
        return self.assemble(inner.T, inner.T @ outer.T).T

    def assemble(self, z: Tensor, y: Tensor, channels: int = -1) -> Tensor:
        """Puts z and T z into the order of the outputs; for two factors, returns y as it is.

        Args:
            z: r channels.
            y: T z, m - r channels; for two factors, the outputs, m channels.
            channels: the dimension that counts the channels, from the end.
        """
        if self.perm is None:
            return y
        return in_order(torch.cat([z, y], dim=channels), self.perm, self.block, channels)

    def extra_repr(self) -> str:
        """Returns the sizes that `print(model)` shows."""
        sizes = f"{self.in_features}, {self.out_features}, rank={self.rank}, storage={self.storage}"
        return sizes + (f", block={self.block}" if self.block else "")


class LowRankSlot(LowRankLayer):
    """A factorised layer while a checkpoint loads: it owns `weight` (r, n) under the disk name.

    A layer with offloaded tensors stays a slot, because the hooks that fetch the tensors hold the
    slot.
    """

    def __init__(
        self,
        dense: nn.Module,
        factors: FactorShapes,
        layout: Layout,
        *,
        out_features: int,
        in_features: int,
    ) -> None:
        super().__init__(
            in_features=in_features,
            out_features=out_features,
            rank=factors.rank,
            block=factors.block(out_features),
            layout=layout,
        )
        place: dict[str, Any] = {"device": dense.weight.device, "dtype": dense.weight.dtype}
        bias = factors.bias or getattr(dense, "bias", None) is not None
        self.weight = nn.Parameter(torch.empty(factors.weight, **place))
        self.up = layout.outer_part(factors.up[0], factors.rank, **place)
        self.bias = nn.Parameter(torch.empty(out_features, **place)) if bias else None
        perm = None
        if factors.perm is not None:
            perm = torch.empty(factors.perm, dtype=torch.int32, device=place["device"])
        self.register_buffer("perm", perm)
        self.train(dense.training)

    def inner(self, x: Tensor) -> Tensor:
        """Maps inputs (..., n) to (..., r), in the layer's layout."""
        return self.layout.apply(x, self.weight)

    def check(self, name: str) -> None:
        """Raises InputError unless the tensors' shapes fit and `perm` is a permutation."""
        shapes = FactorShapes(
            name=name,
            weight=tuple(self.weight.shape),
            up=tuple(self.up.get_parameter("weight").shape),
            perm=None if self.perm is None else tuple(self.perm.shape),
        )
        shapes.check(self.layout, self.out_features, self.in_features)
        if self.perm is not None:
            order = torch.arange(len(self.perm), dtype=self.perm.dtype, device=self.perm.device)
            if not torch.equal(self.perm.sort().values, order):
                raise damaged(f"layer {name}: perm is not a permutation")


class LowRankModule(LowRankLayer):
    """A factorised layer at run time: `down` and `up` are plain modules.

    They are `nn.Linear`, which PEFT and torchao recognise, or for a convolution plain convolutions.
    A tied embedding has parts that other libraries do not recognise (layouts.py).
    The module shares its tensors with the slot. State dicts keep the disk names.

    Args:
        slot: the slot with the loaded tensors.
    """

    def __init__(self, slot: LowRankSlot) -> None:
        super().__init__(
            in_features=slot.in_features,
            out_features=slot.out_features,
            rank=slot.rank,
            block=slot.block,
            layout=slot.layout,
        )
        self.down = slot.layout.inner_part(slot.rank, slot.in_features, device="meta")
        self.down.weight = slot.weight
        self.up = slot.up
        self.bias = slot.bias
        # Some loaders cast all tensors of a module that is kept in float32, also the permutation.
        self.register_buffer("perm", None if slot.perm is None else slot.perm.to(torch.int32))
        self.register_state_dict_post_hook(_to_disk_names)
        self.register_load_state_dict_pre_hook(_from_disk_names)
        self.train(slot.training)

    @property
    def weight(self) -> Tensor:
        """The inner factor (r, n); some models read the dtype of a layer's `weight`."""
        weight = self.down.weight
        assert isinstance(weight, Tensor)
        return weight

    def inner(self, x: Tensor) -> Tensor:
        """Maps inputs (..., n) to (..., r), in the layer's layout."""
        z: Tensor = self.down(x)
        return z


def _to_disk_names(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    if prefix + "down.weight" in state:
        state[prefix + "weight"] = state.pop(prefix + "down.weight")


def _from_disk_names(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    if prefix + "weight" in state:
        state[prefix + "down.weight"] = state.pop(prefix + "weight")
