"""This module finds the parameter or buffer of a model that each tensor of a checkpoint fills."""

from collections.abc import Callable, Iterable

from torch import nn

from lrc_cli.network.experts import has_experts, without_merging


def module_names(model: nn.Module, keys: Iterable[str]) -> dict[str, str]:
    """Maps a checkpoint's tensor keys to the names of the model's parameters and buffers.

    The search follows transformers' loader: the model's own renamings, then the name with or
    without the base prefix. So a class finds its tensors in the checkpoint of any class of the same
    family. For other modules, the keys are the names in the state dict. Keys that no tensor of the
    model has alone are left out: keys of another head, and keys whose tensors a conversion merges
    or splits (fused experts).

    Args:
        model: the module, on any device; factorised layers go by their disk names.
        keys: tensor names in the checkpoint, dense or factorised.
    """
    known = set(model.state_dict(keep_vars=True))
    rename = _renaming(model)
    prefix = getattr(model, "base_model_prefix", "")
    names = {}
    for key in sorted(keys):  # a renaming that guards others must see its own key first
        renamed, converted = rename(key)
        name = _find(renamed, prefix, known)
        if name is None:
            name, converted = _find(key, prefix, known), False
        if name is not None and not converted:
            names[key] = name
    return names


def places(model: nn.Module, keys: Iterable[str]) -> dict[str, str]:
    """Returns the place in the model of each of a checkpoint's keys that has a place there.

    A key that a conversion merges or splits has a place of its own within the tensor that it goes
    into.
    """
    keys = sorted(keys)
    known = set(model.state_dict(keep_vars=True))
    rename, prefix = _renaming(model), getattr(model, "base_model_prefix", "")
    found = module_names(model, keys)
    for key in keys:
        if key not in found:
            name = _find(rename(key)[0], prefix, known)
            found |= {} if name is None else {key: f"{name} <- {key}"}
    return found


def stored_names(model: nn.Module, keys: Iterable[str]) -> dict[int, str]:
    """Returns the checkpoint's key of each tensor of the model, by id; tied names share an id."""
    state = model.state_dict(keep_vars=True)
    return {id(state[name]): key for key, name in module_names(model, keys).items()}


def converted(model: nn.Module, keys: Iterable[str]) -> set[str]:
    """Returns the keys of the tensors that a conversion merges or splits for this model."""
    rename = _renaming(model)
    return {key for key in sorted(keys) if rename(key)[1]}


def _renaming(model: nn.Module) -> Callable[[str], tuple[str, bool]]:
    """Returns the model's renaming: key -> (name, whether a conversion changes the value)."""
    if not hasattr(model, "base_model_prefix"):
        return lambda key: (key, False)
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        rename_source_key,
    )

    mapping = get_model_conversion_mapping(model)
    if has_experts(model):
        mapping = without_merging(mapping)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]

    def rename(key: str) -> tuple[str, bool]:
        renamed, source = rename_source_key(key, renamings, converters)
        return renamed, source is not None

    return rename


def _find(key: str, prefix: str, known: set[str]) -> str | None:
    """Returns the name of `key` in the model, tried in the order of transformers' loader."""
    candidates = [key]
    if prefix:
        candidates.insert(0, f"{prefix}.{key}")
        if key.startswith(f"{prefix}."):
            candidates.insert(0, key.removeprefix(f"{prefix}."))
    return next((name for name in candidates if name in known), None)
