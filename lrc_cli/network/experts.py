"""This module replaces fused experts by a list of experts, whose matrices are `nn.Linear` layers.

transformers merges the matrices that a checkpoint holds for each expert into three-dimensional
parameters (for checkpoints that hold merged matrices, see fused_experts.py). Every expert is
factorised alone, from the tokens that are routed to the expert. So the fused module gives way to a
list that computes the same, and whose layers have the checkpoint's names. There is no table of
models: the attributes that transformers' decorator sets tell fused experts, and transformers'
conversions tell the names.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lrc_cli.network.low_rank.stored import replace_modules

FUSED = {"gate_up_proj": 2, "down_proj": 1}
"""The parameters of fused experts, of shape (experts, outputs, inputs), each with the number of the
checkpoint's matrices for each expert in the parameter."""


class Expert(nn.Module):
    """An expert computes y = down(activation(gate(x), up(x))).

    Args:
        names: the checkpoint's names of the layers gate, up and down, or of two layers if the first
            computes gate and up together.
        layers: the layers, in the same order.
        activate: maps gate(x) and up(x), put together along the last dimension, to down's input.
    """

    def __init__(
        self, names: Sequence[str], layers: Sequence[nn.Linear], activate: Callable[..., Tensor]
    ) -> None:
        super().__init__()
        self._names, self._activate = tuple(names), activate
        for name, layer in zip(names, layers, strict=True):
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        """Maps tokens (t, n) to (t, n)."""
        *first, down = (self.get_submodule(name) for name in self._names)
        parts = [layer(x) for layer in first]
        y: Tensor = down(self._activate(parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)))
        return y


class FusedOrigin(Protocol):
    """The fused module of a checkpoint's fused tensors, for which a list of experts stands."""

    def together(self, experts: "Experts") -> nn.Module:
        """Returns the fused module again, from a list of dense experts."""


class Experts(nn.ModuleList):
    """A list of experts in the place of fused experts."""

    stored: FusedOrigin | None = None
    """The fused module, if the checkpoint holds fused tensors; None: it holds single matrices."""

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Returns the weighted sum (t, n) of every token's experts' outputs.

        Args:
            hidden: tokens (t, n).
            top_k_index: the experts (t, k) of each token.
            top_k_weights: the experts' weights (t, k).
        """
        total = torch.zeros_like(hidden)
        for index, expert in enumerate(self):
            token, place = torch.where(top_k_index == index)
            if len(token):
                y = expert(hidden[token]) * top_k_weights[token, place, None]
                total = total.index_add(0, token, y.to(total.dtype))
        return total


def unfuse(model: nn.Module) -> None:
    """Replaces fused experts by lists, in place, where the checkpoint holds each expert's matrices.

    Weights are views of the fused weights, also on the meta device.
    """
    names = _matrix_names(model)
    if names is None:
        return
    new = {part: _unfused(part, names) for part in model.modules() if is_fused(part)}
    replace_modules(model, new)


def is_fused(module: nn.Module) -> bool:
    """Returns whether a module is fused experts for `unfuse`: no bias, gate before up."""
    flags: dict[str, Any] = {
        "has_gate": True,
        "has_bias": False,
        "is_transposed": False,
        "is_concatenated": True,
        "has_post_expert_norm": False,
    }
    known = all(getattr(module, name, None) is flag for name, flag in flags.items())
    return known and set(module._parameters) == set(FUSED) and hasattr(module, "_apply_gate")


def has_experts(model: nn.Module) -> bool:
    """Returns whether a list has replaced fused experts anywhere in the model."""
    return any(isinstance(part, Experts) for part in model.modules())


def is_expert(model: nn.Module, name: str) -> bool:
    """Returns whether a module lies in a list of experts, so that a router chooses its tokens."""
    parts = name.split(".")
    above = (".".join(parts[:end]) for end in range(1, len(parts)))
    return any(isinstance(model.get_submodule(path), Experts) for path in above)


def without_merging(conversions: Iterable[Any]) -> list[Any]:
    """Returns transformers' conversions without the conversions that merge experts."""
    return [x for x in conversions if not _merged_parameter(x)]


def _merged_parameter(conversion: Any) -> str | None:
    """Returns the parameter of fused experts into which a conversion merges matrices, or None."""
    from transformers.core_model_loading import MergeModulelist

    operations = getattr(conversion, "operations", ())
    if not any(isinstance(operation, MergeModulelist) for operation in operations):
        return None
    name = str(conversion._original_target_patterns[0]).rpartition(".")[2]
    matches = FUSED.get(name) == len(conversion._original_source_patterns)
    return name if matches and len(conversion._original_target_patterns) == 1 else None


def _matrix_names(model: nn.Module) -> tuple[str, ...] | None:
    """Returns the checkpoint's names of gate, up and down; None where it holds no such experts."""
    if not any(is_fused(part) for part in model.modules()):
        return None
    from transformers.conversion_mapping import get_model_conversion_mapping

    found: dict[str, list[str]] = {}
    for conversion in get_model_conversion_mapping(model):
        parameter = _merged_parameter(conversion)
        if parameter is not None:
            # "mlp.experts.*.gate_proj.weight" -> "gate_proj"
            sources = conversion._original_source_patterns
            found[parameter] = [
                source.split("*.")[-1].removesuffix(".weight") for source in sources
            ]
    names = tuple(name for parameter in FUSED for name in found.get(parameter, ()))
    plain = all(name.isidentifier() for name in names)
    return names if plain and len(names) == sum(FUSED.values()) else None


def _unfused(fused: nn.Module, names: Sequence[str]) -> Experts:
    gate_up, down = (fused.get_parameter(name).detach() for name in FUSED)
    fused._parameters.clear()  # only the activation is used on
    activate: Callable[..., Tensor] = fused._apply_gate  # type: ignore[assignment]
    experts = [
        Expert(names, [linear_of(x) for x in (*gate_up[i].chunk(2), down[i])], activate)
        for i in range(len(down))
    ]
    return Experts(experts).train(fused.training)


def linear_of(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """Returns a layer with exactly this weight (m, n) and bias (m,), without copies."""
    outputs, inputs = weight.shape
    layer = nn.Linear(inputs, outputs, bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias)
    return layer
