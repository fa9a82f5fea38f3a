"""Tensors that no file holds: buffers and attributes that a module's constructor computes.

A loader that builds a module without memory (torch's meta device) loses them, and transformers
leaves the buffers of a checkpoint's own code uninitialised. The module is built twice more here,
with other random numbers and with unused memory filled. What both constructions agree on is what
the user's own code has. What they do not agree on is random, and belongs to no checkpoint.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from lrc_cli.errors import InputError
from lrc_cli.text import some_of

Build = Callable[[], nn.Module]
SEEDS = (1, 2)


def take_constructed(model: nn.Module, build: Build, unread: Collection[str] = ()) -> None:
    """Gives the tensors that no file holds the values that the constructor gives them.

    Args:
        model: the loaded module, in place.
        build: constructs the same module.
        unread: names of parameters and buffers of the state dict that no file holds.

    Raises:
        InputError: two constructions differ in such a tensor.
    """
    if not unread and not loose_tensors(model):
        return
    first, second = _twice(build, unread)
    _check_same(model, loose_tensors(first, unread), loose_tensors(second, unread))
    for name, module in model.named_modules():
        made = _module(first, name)
        if made is not None and type(made) is type(module):
            _take(module, made, name, unread)


def check_constructed(model: nn.Module, build: Build) -> None:
    """Raises InputError if another construction differs in a tensor that no file holds.

    Args:
        model: a module that the same function has built.
    """
    tensors = loose_tensors(model)
    if tensors:
        _, second = _twice(build, (), first=model)
        _check_same(model, tensors, loose_tensors(second))


def loose_tensors(model: nn.Module, unread: Collection[str] = ()) -> dict[str, Tensor]:
    """Returns the tensors that a state dict lacks, by name.

    These are non-persistent buffers and tensors in plain attributes, also within lists and
    dictionaries.

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
        for key, value in _attributes(module):
            found |= {prefix + key + place: x for place, x in _tensors_in(value)}
    return found


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yields a module's own attributes, not torch's tables of what is registered."""
    own = vars(nn.Module())
    return ((key, value) for key, value in vars(module).items() if key not in own)


def _tensors_in(value: Any) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors of a value with their places in it, such as "[0]"."""
    if isinstance(value, Tensor):
        yield "", value
    inner = enumerate(value) if isinstance(value, list | tuple) else ()
    for key, x in value.items() if isinstance(value, dict) else inner:
        yield from ((f"[{key!r}]{place}", tensor) for place, tensor in _tensors_in(x))


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
    """A context in which modules keep no memory of parameters, except for those with some names."""

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


def _take(module: nn.Module, made: nn.Module, name: str, unread: Collection[str]) -> None:
    """Gives a module the tensors of its like."""
    prefix = f"{name}." if name else ""
    loose = module._non_persistent_buffers_set
    for table, source in (
        (module._buffers, made._buffers),
        (module._parameters, made._parameters),
    ):
        for key in table:
            if key in source and (key in loose or prefix + key in unread):
                table[key] = source[key]  # type: ignore[assignment]
    for key, value in list(_attributes(module)):
        if any(True for _ in _tensors_in(value)) and key in vars(made):
            setattr(module, key, vars(made)[key])
