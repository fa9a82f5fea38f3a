"""This module finds the model's state dict in what a training loop saved, if there is only one."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from lrc_cli.errors import InputError

PREFIXES = ("module.", "_orig_mod.")
"""The prefixes that DataParallel (also the distributed one) and torch.compile put on every name."""

T = TypeVar("T")


def find_state(tree: Mapping[Any, Any], leaf: type[T], where: Path) -> dict[str, T]:
    """Returns the only state dict in a tree of mappings, without the prefixes of wrappers.

    A state dict is the tensors at the top, or a mapping of nothing but tensors, such as
    "state_dict" or "model". Mappings one step deeper count only where there is no other.

    Args:
        tree: what a training loop saved; its leaves may be anything.
        leaf: the type of a tensor in this tree; has a `shape`.
        where: the file or directory that messages name.

    Raises:
        InputError: there is no state dict, or several.
    """
    top = {key: value for key, value in tree.items() if isinstance(value, leaf)}
    found: dict[str, Mapping[Any, Any]] = {"": top} if _is_state(top, leaf) else {}
    found |= {name: state for name, state in _mappings(tree) if _is_state(state, leaf)}
    if not found:
        found = {
            f"{outer}.{name}": state
            for outer, mapping in _mappings(tree)
            for name, state in _mappings(mapping)
            if _is_state(state, leaf)
        }
    if len(found) != 1:
        names = ", ".join(repr(name) if name else "the top" for name in list(found)[:4])
        kinds = ", ".join(f"{key!r} ({type(value).__name__})" for key, value in tree.items())
        raise InputError(
            f"{where}: holds several state dicts ({names})"
            if found
            else f"{where}: holds no state dict, only {kinds[:200] or 'nothing'}",
            "save only the state dict to compress: torch.save(model.state_dict(), FILE)",
        )
    return without_prefixes(next(iter(found.values())))


def _mappings(tree: Mapping[Any, Any]) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    return ((str(key), value) for key, value in tree.items() if isinstance(value, Mapping))


def _is_state(tree: Mapping[Any, Any], leaf: type) -> bool:
    """Returns whether all entries are named tensors, not all of them numbers or mere bytes."""
    return all(isinstance(k, str) and isinstance(v, leaf) for k, v in tree.items()) and any(
        len(value.shape) and not _is_generator(value) for value in tree.values()
    )


def _is_generator(value: Any) -> bool:
    """Returns whether a value looks like a random number generator's state: a vector of bytes."""
    return getattr(value, "dtype", None) == torch.uint8 and len(value.shape) == 1


def without_prefixes(state: Mapping[str, T]) -> dict[str, T]:
    """Returns the state without the wrappers' prefixes that all names have."""
    for prefix in PREFIXES:
        if state and all(name.startswith(prefix) for name in state):
            return without_prefixes({k.removeprefix(prefix): v for k, v in state.items()})
    return dict(state)
