"""This module tells whether an embedding only looks up rows of its table, or scales them too.

Some of transformers' classes (Bart's, Gemma's) multiply the rows by their `embed_scale`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Scale:
    """A `Scale` multiplies rows by a number."""

    value: float = 1.0
    is_rounded: bool = False
    """Whether the number is rounded to the rows' dtype first."""

    def __call__(self, rows: Tensor) -> Tensor:
        """Returns the scaled rows."""
        if self.value == 1.0:
            return rows
        if self.is_rounded:
            return rows * torch.tensor(self.value, dtype=rows.dtype, device=rows.device)
        return rows * self.value


PLAIN = Scale()
"""The scale of an embedding that only looks rows up."""


class ScaledEmbedding(nn.Embedding):
    """An embedding that scales the rows that it looks up."""

    def __init__(self, num_embeddings: int, embedding_dim: int, scale: Scale, **place: Any) -> None:
        super().__init__(num_embeddings, embedding_dim, **place)
        self.scale = scale

    def forward(self, input: Tensor) -> Tensor:
        """Looks rows up and scales the rows."""
        return self.scale(super().forward(input))


def new_embedding(num: int, width: int, scale: Scale, **place: Any) -> nn.Embedding:
    """Returns an uninitialised embedding: torch's own class where the scale is PLAIN."""
    if scale == PLAIN:
        return nn.Embedding(num, width, **place)
    return ScaledEmbedding(num, width, scale, **place)


def lookup_scale(module: nn.Module) -> Scale | None:
    """Returns the scale that an embedding's attributes name, also on the meta device.

    `only_scales` then sees whether a class with another forward computes this.

    Returns:
        The scale, or None for a module that is no embedding or names no scale.
    """
    if not isinstance(module, nn.Embedding) or module.max_norm is not None:
        return None
    if type(module).forward is nn.Embedding.forward:
        return PLAIN
    if isinstance(module, ScaledEmbedding):
        return module.scale
    scale, is_rounded = getattr(module, "embed_scale", None), False
    if isinstance(scale, Tensor):  # on the meta device it has no value
        scale, is_rounded = getattr(module, "scalar_embed_scale", None), True
    return Scale(float(scale), is_rounded) if isinstance(scale, int | float) else None


def only_scales(module: nn.Module, scale: Scale) -> bool:
    """Returns whether an embedding, whose table has values, does nothing but scale rows so."""
    if type(module).forward is nn.Embedding.forward:
        return True
    table = module.get_parameter("weight").detach()
    numbers = torch.arange(min(len(table), 8), device=table.device)
    with torch.no_grad():
        return torch.allclose(module(numbers), scale(table[numbers]))


def merge_tables(model: nn.Module) -> None:
    """Puts one module in the place of all embeddings that do the same with the same table.

    An encoder and a decoder then look rows up in one module, whose statistics count for both.
    """
    first: dict[tuple[Any, ...], nn.Module] = {}
    for parent in model.modules():
        for name, part in list(parent._modules.items()):
            scale = None if part is None else lookup_scale(part)
            if part is not None and scale is not None and _is_plain(part, scale):
                same = type(part), id(part.weight), scale
                setattr(parent, name, first.setdefault(same, part))


def _is_plain(module: nn.Module, scale: Scale) -> bool:
    """Returns whether the module's class, table and scale decide all that the module does."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks
    if any(hooks) or module._backward_pre_hooks or "forward" in vars(module):
        return False
    try:
        return only_scales(module, scale)
    except (RuntimeError, TypeError, ValueError):  # it takes other inputs
        return False
