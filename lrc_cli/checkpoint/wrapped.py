"""Where in what a training loop saved the state dict of the model is, if only one can be."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from lrc_cli.errors import InputError

PREFIXES = ("module.", "_orig_mod.")
"""What DataParallel (and its distributed kin) and torch.compile put before every name."""

T = TypeVar("T")


def find_state(tree: Mapping[Any, Any], leaf: type[T], where: Path) -> dict[str, T]:
    """The one state dict in a tree of mappings; prefixes that wrappers put before all names go.

    It is the tensors at the top, or a mapping of nothing but tensors, such as "state_dict" or
    "model": there must be exactly one. Only where there is none, mappings one step deeper count.

    Args:
        tree: what a training loop saved; its leaves may be anything.
        leaf: the type of a tensor here; has a `shape`.
        where: for messages.

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
            "save the one to compress by itself: torch.save(model.state_dict(), FILE)",
        )
    return without_prefixes(next(iter(found.values())))


def _mappings(tree: Mapping[Any, Any]) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    return ((str(key), value) for key, value in tree.items() if isinstance(value, Mapping))


def _is_state(tree: Mapping[Any, Any], leaf: type) -> bool:
    """Whether all entries are named tensors, of which one is more than a number or mere bytes."""
    return all(isinstance(k, str) and isinstance(v, leaf) for k, v in tree.items()) and any(
        len(value.shape) and not _is_generator(value) for value in tree.values()
    )


def _is_generator(value: Any) -> bool:
    """Whether it looks like the state of a random number generator: a vector of bytes."""
    return getattr(value, "dtype", None) == torch.uint8 and len(value.shape) == 1


def without_prefixes(state: Mapping[str, T]) -> dict[str, T]:
    """The state without the prefixes that all its names have of a wrapper."""
    for prefix in PREFIXES:
        if state and all(name.startswith(prefix) for name in state):
            return without_prefixes({k.removeprefix(prefix): v for k, v in state.items()})
    return dict(state)
