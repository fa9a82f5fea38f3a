"""Tensors that no file holds: buffers and attributes that a module's constructor computes.

A loader that builds a module without memory (torch's meta device) loses them, and transformers
leaves the buffers of a checkpoint's own code uninitialised. The module is built twice more here,
with other random numbers and with unused memory filled. What both constructions agree on is what
the user's own code has. What they do not agree on is random, and belongs to no checkpoint.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from lrc_cli.errors import InputError
from lrc_cli.text import some_of

Build = Callable[[], nn.Module]
SEEDS = (1, 2)
DEPTH = 4
"""How deep in an attribute tensors are looked for."""


def take_constructed(model: nn.Module, build: Build, unread: Collection[str] = ()) -> None:
    """Gives the tensors that no file holds the values that the constructor gives them.

    Args:
        model: the loaded module, in place.
        build: constructs the same module.
        unread: names of parameters and buffers of the state dict that no file holds.

    Raises:
        InputError: two constructions differ in such a tensor, or it was a parameter's second name.
    """
    if not unread and not loose_tensors(model):
        return
    first, second = _twice(build, unread)
    made = loose_tensors(first, unread)
    _check_same(model, made, loose_tensors(second, unread))
    registered = _registered(model)
    for name, module in model.named_modules():
        like = _module(first, name)
        if like is not None and type(like) is type(module):
            _take(module, like, f"{name}." if name else "", unread, made, registered)


def check_constructed(model: nn.Module, build: Build) -> None:
    """Raises InputError if another construction differs in a tensor that no file holds.

    Args:
        model: a module that the same function has built.
    """
    tensors = loose_tensors(model)
    if tensors:
        _, second = _twice(build, (), first=model)
        _check_same(model, tensors, loose_tensors(second))


def second_names(model: nn.Module) -> set[str]:
    """Returns the places in plain attributes where parameters and buffers lie a second time."""
    registered = _registered(model)
    return {name for name, x in _attribute_tensors(model) if id(x) in registered}


def check_second_names(model: nn.Module, before: Collection[str]) -> None:
    """Raises InputError if a plain attribute still holds a tensor that loading has replaced.

    Args:
        before: the `second_names` of the module before its parameters were replaced.
    """
    stale = sorted(set(before) & loose_tensors(model).keys())
    if stale:
        raise InputError(
            f"{type(model).__name__}: the attribute {stale[0]} is a second name of a parameter,"
            " which it loses when the parameter is loaded",
            "let forward read the parameter itself, or register the module that has it",
        )


def loose_tensors(model: nn.Module, unread: Collection[str] = ()) -> dict[str, Tensor]:
    """Returns the tensors that a state dict lacks, by name.

    These are non-persistent buffers and tensors in plain attributes, also within lists,
    dictionaries and other objects.

    Args:
        unread: names of the state dict that count as well.
    """
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        loose = module._non_persistent_buffers_set
        for key, tensor in [*module._buffers.items(), *module._parameters.items()]:
            if tensor is not None and (key in loose or prefix + key in unread):
                found[prefix + key] = tensor
    registered = _registered(model)
    return found | {name: x for name, x in _attribute_tensors(model) if id(x) not in registered}


def _registered(model: nn.Module) -> set[int]:
    return {id(x) for x in (*model.parameters(), *model.buffers())}


def _attribute_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        for key, value in _attributes(module):
            yield from ((prefix + key + place, x) for place, x in _tensors_in(value))


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yields a module's own attributes, not torch's tables of what is registered.

    Attributes that a hook of torch makes anew before each run are left out.
    """
    own = {*vars(nn.Module()), *_made_anew(module)}
    return ((key, value) for key, value in vars(module).items() if key not in own)


def _made_anew(module: nn.Module) -> set[str]:
    """Returns the names that torch's older weight norm, spectral norm and pruning compute."""
    hooks = module._forward_pre_hooks.values()
    normed = {hook.name for hook in hooks if isinstance(hook, WeightNorm | SpectralNorm)}
    return normed | {hook._tensor_name for hook in hooks if isinstance(hook, BasePruningMethod)}


def _tensors_in(value: Any, depth: int = DEPTH) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors of a value with their places in it, such as "[0]"."""
    if isinstance(value, Tensor):
        yield "", value
        return
    inner: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, list | tuple):
        inner = ((f"[{index}]", x) for index, x in enumerate(value))
    elif isinstance(value, dict):
        inner = ((f"[{key!r}]", x) for key, x in list(value.items()))
    elif not isinstance(value, type) and not callable(value):
        inner = ((f".{key}", x) for key, x in list(getattr(value, "__dict__", {}).items()))
    elif isinstance(value, nn.Module):
        inner = ((f".{key}", x) for key, x in value.state_dict(keep_vars=True).items())
    if depth:
        for place, x in inner:
            yield from ((place + deeper, tensor) for deeper, tensor in _tensors_in(x, depth - 1))


def _twice(
    build: Build, unread: Collection[str], first: nn.Module | None = None
) -> tuple[nn.Module, nn.Module]:
    """Returns two constructions that share nothing but what the constructor settles."""
    keep = {name.rpartition(".")[2] for name in unread}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEEDS[0])
        first = first or _built(build, keep)
        torch.manual_seed(SEEDS[1])
        with _filled_memory():
            return first, _built(build, keep)


def _built(build: Build, keep: Collection[str]) -> nn.Module:
    try:
        with _parameters_on_meta(keep):
            return build()
    except (RuntimeError, InputError):  # a constructor that reads its parameters' values
        return build()


@contextmanager
def _parameters_on_meta(keep: Collection[str]) -> Iterator[None]:
    """A context in which modules keep no memory of parameters, except of the names to keep."""

    def without_memory(_: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta or name in keep:
            return None
        return nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)

    handle = register_module_parameter_registration_hook(without_memory)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _filled_memory() -> Iterator[None]:
    """A context in which `torch.empty` and its like are filled with NaN or with large numbers."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


def _check_same(model: nn.Module, one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    odd = [name for name, x in one.items() if not _is_same(x, other.get(name))]
    odd += [name for name in other if name not in one]
    if odd:
        raise InputError(
            f"{type(model).__name__}: {some_of(odd)} is in no file, and the constructor makes"
            " other numbers each time: random, not initialised, or made of parameters",
            "save it with the checkpoint (persistent=True), or let the constructor set it to"
            " numbers that do not change",
        )


def _is_same(one: Tensor, other: Tensor | None) -> bool:
    if other is None or one.is_meta or other.is_meta:
        return False
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


def _module(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _take(
    module: nn.Module,
    like: nn.Module,
    prefix: str,
    unread: Collection[str],
    made: Collection[str],
    registered: Collection[int],
) -> None:
    """Gives a module the tensors of its like.

    Args:
        prefix: what stands before the names of the module's tensors.
        made: the names of the tensors that the constructor makes.
        registered: the identities of the tensors that have a place in the state dict.
    """
    loose = module._non_persistent_buffers_set
    for table, source in ((module._buffers, like._buffers), (module._parameters, like._parameters)):
        for key in table:
            if key in source and (key in loose or prefix + key in unread):
                table[key] = source[key]  # type: ignore[assignment]
    for key, value in list(_attributes(module)):
        places = [f"{prefix}{key}{at}" for at, x in _tensors_in(value) if id(x) not in registered]
        stale = [place for place in places if place not in made]
        if stale:
            raise InputError(
                f"{type(module).__name__}: the attribute {stale[0]} is a second name of a parameter"
                " or comes from elsewhere, and loading leaves it without numbers",
                "let forward read the parameter itself, or register the tensor as a buffer",
            )
        if places:
            setattr(module, key, vars(like)[key])
