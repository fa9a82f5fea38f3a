"""What a network returned is searched for tensors here."""

from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from lrc_cli.errors import InputError


def floating_outputs(outputs: Any) -> list[torch.Tensor]:
    """Returns the floating-point tensors that a model returned.

    Where there are logits, only the logits count. Tensors inside of nested tuples count only where
    there are no others.

    Raises:
        InputError: the model returned nothing that can hold tensors, such as None.
    """
    if isinstance(outputs, torch.Tensor):
        return [outputs] if outputs.is_floating_point() else []
    logits = getattr(outputs, "logits", None)
    if logits is not None:
        return [logits]
    if not isinstance(outputs, Iterable):
        raise InputError(
            f"the network returns {type(outputs).__name__}", "its forward must return tensors"
        )
    values = list(outputs.values() if hasattr(outputs, "values") else outputs)
    for found in (values, tree_leaves(values)):
        tensors = [v for v in found if isinstance(v, torch.Tensor) and v.is_floating_point()]
        if tensors:
            return tensors
    return []


def all_finite(tensors: Any) -> bool:
    """Returns whether a nested structure's floating-point tensors hold no NaN and no infinity."""
    leaves = [leaf for leaf in tree_leaves(tensors) if isinstance(leaf, torch.Tensor)]
    return all(bool(x.isfinite().all()) for x in leaves if x.is_floating_point())
