"""Which module of a model each of a checkpoint's tensors belongs to."""

from collections.abc import Callable, Iterable

from torch import nn

from lrc_cli.network.experts import has_experts, without_merging


def module_names(model: nn.Module, keys: Iterable[str]) -> dict[str, str]:
    """Maps a checkpoint's tensor keys to the names of the model's parameters and buffers.

    Follows transformers' loader: the model's own renamings, then with or without its base prefix,
    so that any class of a family finds its tensors in any other's checkpoint. Another module's keys
    are its state dict's. Keys without a tensor of their own in the model are left out: those of
    another head, and those that a conversion merges or splits (fused experts).

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


def stored_names(model: nn.Module, keys: Iterable[str]) -> dict[int, str]:
    """The checkpoint's key of each of the model's tensors, by id: tied ones have one."""
    state = model.state_dict(keep_vars=True)
    return {id(state[name]): key for key, name in module_names(model, keys).items()}


def converted(model: nn.Module, keys: Iterable[str]) -> set[str]:
    """Those of a checkpoint's tensors that a conversion merges or splits for this model."""
    rename = _renaming(model)
    return {key for key in sorted(keys) if rename(key)[1]}


def _renaming(model: nn.Module) -> Callable[[str], tuple[str, bool]]:
    """The model's checkpoint renamings: key -> (name, whether a conversion changes its value)."""
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
    """The name of `key` in the model, tried in the order of transformers' loader."""
    candidates = [key]
    if prefix:
        candidates.insert(0, f"{prefix}.{key}")
        if key.startswith(f"{prefix}."):
            candidates.insert(0, key.removeprefix(f"{prefix}."))
    return next((name for name in candidates if name in known), None)
