"""This module finds the model's state dict in what a training loop saved, if there is only one."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, TypeVar

import torch

from lrc_cli.errors import InputError

WRAPPERS = frozenset(
    {
        "module",
        "_orig_mod",
        "_fsdp_wrapped_module",
        "_checkpoint_wrapped_module",
        "_forward_module",
    }
)
"""The parts that wrappers put into names: DataParallel (also the distributed one, and averaged
models), torch.compile, FSDP, activation checkpointing, Fabric."""
LEADING = frozenset({"model", "net", "network"})
"""The first parts of names in the modules that Lightning trains, where all names have one."""
AVERAGED = "n_averaged"
"""The count of averaged models that torch's `AveragedModel` has beside its module."""
MOST_PARTS = 8
"""A name with more wrappers than this loses all of them or none."""

T = TypeVar("T")
Targets = Callable[[Iterable[str]], Mapping[str, str]]
"""A function that returns the place in a module of each key that has a place there."""


def find_state(tree: Mapping[Any, Any], leaf: type[T], where: Path) -> dict[str, T]:
    """Returns the only state dict in a tree of mappings.

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
    # Class weights and running statistics beside a network are vectors.
    with_matrices = {name: state for name, state in found.items() if _has_matrix(state)}
    found = with_matrices or found
    if len(found) != 1:
        names = ", ".join(repr(name) if name else "the top" for name in list(found)[:4])
        kinds = ", ".join(f"{key!r} ({type(value).__name__})" for key, value in tree.items())
        raise InputError(
            f"{where}: holds several state dicts ({names})"
            if found
            else f"{where}: holds no state dict, only {kinds[:200] or 'nothing'}",
            "save only the state dict to compress: torch.save(model.state_dict(), FILE)",
        )
    return dict(next(iter(found.values())))


def _mappings(tree: Mapping[Any, Any]) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    return ((str(key), value) for key, value in tree.items() if isinstance(value, Mapping))


def _is_state(tree: Mapping[Any, Any], leaf: type) -> bool:
    """Returns whether all entries are named tensors, not all of them numbers or mere bytes."""
    return all(isinstance(k, str) and isinstance(v, leaf) for k, v in tree.items()) and any(
        len(value.shape) and not _is_generator(value) for value in tree.values()
    )


def _has_matrix(state: Mapping[Any, Any]) -> bool:
    return any(len(value.shape) > 1 for value in state.values())


def _is_generator(value: Any) -> bool:
    """Returns whether a value looks like a random number generator's state: a vector of bytes."""
    return getattr(value, "dtype", None) == torch.uint8 and len(value.shape) == 1


def bare(key: str) -> str:
    """Returns a tensor's name without the parts that wrappers put into names."""
    return ".".join(part for part in key.split(".") if part not in WRAPPERS)


def unwrapped_names(shapes: Mapping[str, Sequence[int]], targets: Targets) -> dict[str, str | None]:
    """Returns the names that a module has for the tensors that wrappers renamed.

    A name that the module has a place for stays. Any other name loses as few of the wrappers' parts
    as makes the module have a place for what is left. Tensors for which this does not help keep
    their names, and are left out of the result. The count of an averaged model becomes None.

    Args:
        shapes: the shape of each tensor by its stored name.
        targets: the places of names in the module.

    Raises:
        InputError: without wrappers' parts, a name could be one of several of the module's.
    """
    fitting = targets(shapes)
    strays = [key for key in shapes if key not in fitting]
    others = [key for key in shapes if key != AVERAGED]
    firsts = {bare(key).partition(".")[0] for key in others}
    leading = firsts if len(firsts) == 1 and firsts <= LEADING else set()
    options = {key: _without_wrappers(key, WRAPPERS | leading) for key in strays}
    places = targets({name for names in options.values() for name in names})
    found: dict[str, str | None] = {}
    for key, names in options.items():
        fit = [name for name in names if name in places]
        if len({places[name] for name in fit}) > 1:
            raise InputError(
                f"{key} is the module's {fit[0]} or its {fit[1]}, under a wrapper's name",
                "save the state dict of the module without its wrapper",
            )
        if fit:
            found[key] = fit[0]
    is_averaged = all(key.startswith("module.") for key in others) and others
    if AVERAGED in strays and is_averaged and shapes[AVERAGED] in ((), (1,)):
        found[AVERAGED] = None
    return found


def _without_wrappers(key: str, wrappers: Iterable[str]) -> list[str]:
    """Returns the names that are left of a key when wrappers' parts go, the longest names first."""
    parts = key.split(".")
    removable = [i for i, part in enumerate(parts[:-1]) if part in wrappers]
    if len(removable) > MOST_PARTS:
        return [".".join(x for i, x in enumerate(parts) if i not in removable)]
    names = []
    for count in range(1, len(removable) + 1):
        for gone in combinations(removable, count):
            names.append(".".join(x for i, x in enumerate(parts) if i not in gone))
    return list(dict.fromkeys(names))
