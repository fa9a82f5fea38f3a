"""PEFT's LoRA takes a factorised layer by the layer's own name; only this module imports PEFT.

PEFT chooses the module of an adapter by the kind of layer, from a closed list. Kinds can be added
in a single `LoraConfig` only, which a saved adapter does not keep. `register` therefore puts
factorised layers in front of the list.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import Linear, LoraModel
from peft.tuners.mixed import MixedModel
from peft.tuners.tuners_utils import check_adapters_to_merge, check_target_module_exists
from torch import Tensor, nn

from lrc_cli.errors import InputError
from lrc_cli.forms import UP
from lrc_cli.network.keys import BIAS, WEIGHT
from lrc_cli.network.layouts import LINEAR, Layout, Transposed, layout_of
from lrc_cli.network.low_rank.modules import LowRankModule
from lrc_cli.network.low_rank.slots import low_rank_module
from lrc_cli.network.low_rank.stored import StoredLayer, dense_module, dense_weight
from lrc_cli.network.low_rank.tied import Tied

STARTS = (True, False, "gaussian", "orthogonal")
"""The values of `init_lora_weights` that leave the layer's own weight as it is."""

ROWS = (LINEAR, Transposed())
"""The layouts of linear layers, whose inputs and outputs are rows."""

PARTS = 'name its parts instead, as in target_modules=["up", "down"]'

_of_dense_layer = LoraModel._create_new_module
"""PEFT's own choice."""
_of_dense_replacement = MixedModel._replace_module
"""PEFT's own way to put a layer back whose adapters were merged."""


@dataclass(frozen=True, kw_only=True)
class Update:
    """A change of a layer's weight (m, n) by outer @ inner, and of its bias."""

    inner: Tensor
    """(q, n)"""
    outer: Tensor
    """(m, q)"""
    bias: Tensor | None = None
    """(m,)"""


class LoraOnFactors(Linear):
    """A factorised layer with LoRA adapters, which PEFT finds, saves and merges as on `nn.Linear`.

    Args:
        base_layer: the factorised layer.
        adapter_name: the first adapter's name.
        config: the adapter's `LoraConfig`.
        settings: what else PEFT hands to the module of an adapter.
    """

    base_layer: nn.Module
    merged_adapters: list[str]

    def __init__(
        self, base_layer: LowRankModule, adapter_name: str, *, config: Any, **settings: Any
    ) -> None:
        super().__init__(base_layer, adapter_name, config=config, **settings)
        # Factors lie as in `nn.Linear`, also where the dense layer was a transposed `Conv1D`.
        self.fan_in_fan_out = False
        self._before_merging: tuple[nn.Module, ...] = ()

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    def update_layer(self, adapter_name: str, r: int, *rest: Any, config: Any, **more: Any) -> None:
        """Adds an adapter.

        Raises:
            InputError: the adapter would read or change the layer's dense weight.
        """
        _check_config(config, more.get("target_name") or adapter_name)
        super().update_layer(adapter_name, r, *rest, config=config, **more)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merges adapters into the layer, which becomes one of higher rank, or a dense layer.

        Args:
            safe_merge: refuse adapters with numbers that are not finite.
            adapter_names: the adapters; None: all active ones.

        Raises:
            InputError: an adapter has a bias and the layer has none, or numbers are not finite.
        """
        names = check_adapters_to_merge(self, adapter_names)
        names = [name for name in names if name in self.lora_A]
        if not names:
            return
        before = self.base_layer
        after = with_updates(before, [self._update(name) for name in names])
        if safe_merge and not all(torch.isfinite(part).all() for part in after.parameters()):
            raise InputError(
                f"merging {', '.join(names)} gives numbers that are not finite",
                "train the adapter again, it is broken",
            )
        # A tuple keeps the layer out of state dicts.
        self._before_merging = self._before_merging or (before,)
        self.base_layer = after
        self.merged_adapters = [*self.merged_adapters, *names]

    def unmerge(self) -> None:
        """Puts the layer without its merged adapters back, on the device where it is now."""
        if not self._before_merging:
            super().unmerge()  # says that there is nothing to do
            return
        self.base_layer = self._before_merging[0].to(self.weight)
        self._before_merging = ()
        self.merged_adapters = []

    def _update(self, name: str) -> Update:
        inner, outer, scale = self.lora_A[name], self.lora_B[name], self.scaling[name]
        bias = outer.bias
        if bias is not None and self.base_layer.bias is None:
            raise InputError(
                f"adapter {name} has a bias (lora_bias), and a layer that it is on has none",
                "keep the adapter apart, or train it with lora_bias=False",
            )
        return Update(
            inner=inner.weight,
            outer=outer.weight * scale,
            bias=None if bias is None else bias * scale,
        )


@torch.no_grad()
def with_updates(layer: nn.Module, updates: Sequence[Update]) -> nn.Module:
    """Returns a layer whose weight and bias have the updates added, in the layer's dtype.

    Two factors take the updates as further columns and rows. Where the factors would have no fewer
    numbers than the dense weight, and where the layer is dense, the outcome is dense.

    Args:
        layer: a factorised layer, which is not changed, or its dense counterpart.
        updates: the changes.
    """
    if isinstance(layer, LowRankModule):
        (m, n), rank = layer.shape, layer.rank + sum(len(update.inner) for update in updates)
        merged: nn.Module = (
            _with_rank(layer, updates)
            if rank * (m + n) < m * n
            else _with_dense(layer, layer.layout, layer.dtype, updates)
        )
    else:
        layout = layout_of(layer)
        assert layout is not None
        merged = _with_dense(layer, layout, layer.get_parameter("weight").dtype, updates)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return merged.requires_grad_(weight.requires_grad)


def _with_rank(layer: LowRankModule, updates: Sequence[Update]) -> LowRankModule:
    """Returns [outer, updates' outer] @ [inner; updates' inner] as two factors."""
    inner, _ = layer.factors()
    tensors = {
        WEIGHT: torch.cat([inner, *(update.inner.to(inner) for update in updates)]),
        UP: torch.cat([layer.outer(), *(update.outer.to(inner) for update in updates)], dim=1),
    }
    bias = _bias(layer, updates)
    if bias is not None:
        tensors[BIAS] = bias
    return low_rank_module(layer, tensors, layer.layout, layer.shape)


def _with_dense(
    layer: nn.Module, layout: Layout, dtype: torch.dtype, updates: Sequence[Update]
) -> nn.Module:
    """Returns the sum of the weight and the updates' products as a dense layer."""
    weight = dense_weight(layer).clone()
    for update in updates:
        weight += update.outer.to(weight) @ update.inner.to(weight)
    bias = _bias(layer, updates)
    return dense_module(layout, weight.to(dtype), bias, training=layer.training)


def _bias(layer: nn.Module, updates: Sequence[Update]) -> Tensor | None:
    """Returns a copy of the layer's bias with the updates added, None where it has none."""
    bias = layer.bias
    if not isinstance(bias, Tensor):
        return None
    return bias.detach() + sum(x.bias.to(bias) for x in updates if x.bias is not None)


def _check_config(config: Any, name: str) -> None:
    """Raises InputError for an adapter that needs the layer's dense weight."""
    variants = [
        field.name
        for field in config.__dataclass_fields__.values()
        if field.metadata.get("is_lora_variant") and getattr(config, field.name)
    ]
    if config.init_lora_weights not in STARTS:
        variants.append(f"init_lora_weights={config.init_lora_weights!r}")
    if variants:
        raise InputError(
            f"layer {name} is factorised, and {variants[0]} needs a dense weight",
            f"use plain LoRA, or {PARTS}",
        )


def _new_module(config: Any, adapter: str, target: Any, **settings: Any) -> Any:
    """Returns PEFT's module for an adapter on a layer.

    Raises:
        InputError: the layer is stored in another way than as the factors of a linear layer, or
            its parts are to have adapters too.
    """
    if not isinstance(target, StoredLayer | Tied) or settings.get("parameter_name") is not None:
        return _of_dense_layer(config, adapter, target, **settings)
    name = settings.pop("target_name")
    if not isinstance(target, LowRankModule) or target.layout not in ROWS:
        raise InputError(
            f"layer {name} is compressed, and LoRA takes by name only linear layers in memory",
            f"leave {name.rpartition('.')[2]} out of target_modules, or {PARTS}",
        )
    if any(check_target_module_exists(config, f"{name}.{part}") for part in ("up", "down")):
        raise InputError(
            f"target_modules names layer {name} and its parts up and down",
            "name either layers or parts, with exclude_modules or a pattern that ends at the layer",
        )
    settings.pop("parameter_name", None)
    return LoraOnFactors(target, adapter, config=config, target_name=name, **settings)


def _replace_module(model: Any, parent: Any, name: str, new: Any, old: Any) -> None:
    """Puts a layer into a model of mixed adapters, which would set the weight of dense layers."""
    if isinstance(new, StoredLayer | Tied):
        setattr(parent, name, new)
    else:
        _of_dense_replacement(model, parent, name, new, old)


def register() -> None:
    """Lets PEFT's LoRA take factorised layers by their names. A second call changes nothing."""
    LoraModel._create_new_module = staticmethod(_new_module)
    MixedModel._replace_module = _replace_module
