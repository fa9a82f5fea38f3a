"""This module finds the model's state dict in what a training loop saved."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, Protocol, TypeVar

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

TOP = "."
"""The name of the state dict that the tensors at the top of a file make."""
KEY = "model.state_dict"
CHOOSE = (
    f"choose one with {KEY} (--state-dict of inspect, eval and verify, state_dict of lrc_cli.load)"
)
SHOWN = 6
"""The most state dicts that a message lists."""


class Shaped(Protocol):
    """A tensor, or what describes a tensor."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The number of entries in each dimension."""


T = TypeVar("T", bound=Shaped)
State = Mapping[str, T]
Named = tuple[str, State[T]]
"""A state dict with the keys that lead to it, with dots between."""
Targets = Callable[[Iterable[str]], Mapping[str, str]]
"""A function that returns the place in a module of each key that has a place there."""


def find_state(
    tree: Mapping[Any, Any],
    leaf: type[T],
    where: Path,
    *,
    chosen: str | None = None,
    is_same: Callable[[T, T], bool] = lambda first, second: first is second,
) -> dict[str, T]:
    """Returns the chosen state dict in a tree of mappings, or the only one.

    A state dict is the tensors at the top, or a mapping of nothing but tensors, such as
    "state_dict" or "model". Mappings one step deeper count only where there is no other, unless
    they are chosen. Copies with equal tensors count as one.

    Args:
        tree: what a training loop saved; its leaves may be anything.
        leaf: the type of a tensor in this tree; has a `shape`.
        where: the file or directory that messages name.
        chosen: the keys that lead to the state dict, with dots between; TOP: the tensors at the
            top; None: the only state dict.
        is_same: whether two tensors are equal.

    Raises:
        InputError: there is no such state dict, or there are several.
    """
    found = _unasked(tree, leaf) if chosen is None else _asked(tree, leaf, chosen)
    states = [state for _, state in found]
    if states and all(_is_copy(states[0], other, is_same) for other in states[1:]):
        return dict(states[0])
    listed = found if chosen is None and found else _all_states(tree, leaf)
    if not listed:
        kinds = ", ".join(f"{key!r} ({type(value).__name__})" for key, value in tree.items())
        raise InputError(
            f"{where}: holds no state dict, only {kinds[:200] or 'nothing'}",
            "save only the state dict to compress: torch.save(model.state_dict(), FILE)",
        )
    if chosen is None:
        cause = f"holds {'several state dicts' if found else 'state dicts only deep inside'}"
    else:
        cause = f"{chosen!r} ({KEY}) names {'several state dicts' if found else 'no state dict'}"
        cause += " of those there" if found else ", and there are"
    raise InputError(f"{where}: {cause}: {_totals(listed)}", CHOOSE)


def _is_copy(first: State[T], second: State[T], is_same: Callable[[T, T], bool]) -> bool:
    return first.keys() == second.keys() and all(
        is_same(tensor, second[name]) for name, tensor in first.items()
    )


def _totals(states: Sequence[Named[T]]) -> str:
    """Returns the names of state dicts with their numbers of tensors and entries, largest first."""
    sizes = [
        (sum(math.prod(x.shape) for x in state.values()), len(state), name)
        for name, state in states
    ]
    sizes.sort(key=lambda row: -row[0])
    texts = [
        f"{name!r}{' (the top)' * (name == TOP)} of {count:,} tensor{'s' * (count > 1)} with"
        f" {total:,} numbers"
        for total, count, name in sizes[:SHOWN]
    ]
    more = len(sizes) - len(texts)
    return "; ".join([*texts, *([f"{more:,} more"] if more else [])])


def _unasked(tree: Mapping[Any, Any], leaf: type[T]) -> list[Named[T]]:
    """Returns the state dicts of which the only one is taken where none is chosen."""
    found = _tensors_of(TOP, tree, leaf)
    found += [(name, state) for name, state in _mappings(tree) if _is_state(state, leaf)]
    found = found or [
        (f"{outer}.{name}", state)
        for outer, mapping in _mappings(tree)
        for name, state in _mappings(mapping)
        if _is_state(state, leaf)
    ]
    # Class weights and running statistics beside a network are vectors.
    return [(name, state) for name, state in found if _has_matrix(state)] or found


def _asked(tree: Mapping[Any, Any], leaf: type[T], chosen: str) -> list[Named[T]]:
    """Returns the state dicts that keys with dots between lead to; a key may hold dots."""
    if chosen == TOP:
        return _tensors_of(TOP, tree, leaf)
    found: list[Named[T]] = []
    for key, inner in _mappings(tree):
        if key == chosen:
            found += _tensors_of(chosen, inner, leaf)
        elif chosen.startswith(f"{key}."):
            deeper = _asked(inner, leaf, chosen[len(key) + 1 :])
            found += [(chosen, state) for _, state in deeper]
    return found


def _tensors_of(name: str, tree: Mapping[Any, Any], leaf: type[T]) -> list[Named[T]]:
    """Returns the tensors of a mapping if they make a state dict; other entries do not count."""
    state = {key: value for key, value in tree.items() if isinstance(value, leaf)}
    return [(name, state)] if _is_state(state, leaf) else []


def _all_states(tree: Mapping[Any, Any], leaf: type[T]) -> list[Named[T]]:
    """Returns every state dict that can be chosen; mappings that hold themselves count once."""
    found: list[Named[T]] = []
    waiting: list[tuple[str, Mapping[Any, Any]]] = [(TOP, tree)]
    seen = {id(tree)}
    for name, mapping in waiting:  # the list grows while it is read
        found += _tensors_of(name, mapping, leaf)
        for key, inner in _mappings(mapping):
            if id(inner) not in seen:
                seen.add(id(inner))
                waiting.append((key if name == TOP else f"{name}.{key}", inner))
    return found


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
