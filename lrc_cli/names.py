"""What a checkpoint's headers say, and which module of a model each of its tensors belongs to."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from lrc_cli.errors import InputError

FORMAT_VERSION = 1
"""The newest on-disk format that this version reads, and the one it writes."""

UPGRADE = "upgrade it with: pip install --upgrade lrc_cli"
"""The remedy for a checkpoint that is newer than this version."""


@dataclass(frozen=True, kw_only=True)
class Header:
    """One tensor's entry in a safetensors header."""

    shape: tuple[int, ...]
    """Its shape."""
    dtype: str
    """Its dtype in the spelling of safetensors: F32, BF16, I32, ..."""


def read_headers(files: Iterable[str | Path]) -> dict[str, Header]:
    """Tensor name -> header over all files of a checkpoint; reads no tensor data.

    Raises:
        InputError: for a file that is not safetensors.
    """
    headers = {}
    for file in files:
        with open_tensors(file) as handle:
            for key in handle.keys():  # noqa: SIM118 - a handle is no mapping
                entry = handle.get_slice(key)
                headers[key] = Header(shape=tuple(entry.get_shape()), dtype=entry.get_dtype())
    return headers


def open_tensors(file: str | Path) -> Any:
    """A safetensors handle whose tensors are views of the mapped file.

    Raises:
        InputError: for a missing file, or one that is not safetensors.
    """
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file} is not a readable safetensors file: {error}") from error


def check_version(version: object, where: str) -> None:
    """Raises InputError for a format version that this lrc does not read."""
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise InputError(f"{where} has format_version {version!r}", "write the checkpoint again")
    if version > FORMAT_VERSION:
        raise InputError(
            f"{where} has format_version {version}, and this lrc reads up to {FORMAT_VERSION}",
            UPGRADE,
        )


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
