"""Hooks on a network's modules, for as long as a block runs: what each module reads and returns."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from lrc_cli.data.draw import Batch
from lrc_cli.execution.network import Network
from lrc_cli.network.layer import Layer

Before = Callable[[str, tuple[Any, ...], dict[str, Any]], None]
"""Called with a module's name and with the arguments that the module is about to be called with."""
After = Callable[[str, tuple[Any, ...], dict[str, Any], Any], Any]
"""Called with a module's name, the arguments of its call and what it returned. What the function
returns itself takes the place of the module's output, unless it is None."""


@contextmanager
def around_calls(
    module: nn.Module,
    names: Iterable[str],
    *,
    before: Before | None = None,
    after: After | None = None,
) -> Iterator[None]:
    """Within it, functions run before and after every call of some submodules.

    All hooks are gone when the block ends, and when it raises. Where several blocks look at one
    module, the outer block's functions run first.

    Args:
        names: of the submodules, as `get_submodule` takes them.
        before: may raise, to end the pass there.
        after: may replace what the module returned.
    """

    def put_on(name: str, hooks: ExitStack) -> None:
        part = module.get_submodule(name)
        if before is not None:
            hook = part.register_forward_pre_hook(
                lambda _, args, kwargs: before(name, args, kwargs), with_kwargs=True
            )
            hooks.enter_context(hook)
        if after is not None:
            hook = part.register_forward_hook(
                lambda _, args, kwargs, output: after(name, args, kwargs, output), with_kwargs=True
            )
            hooks.enter_context(hook)

    with ExitStack() as hooks:
        for name in names:
            put_on(name, hooks)
        yield


@contextmanager
def watched(
    network: Network,
    layers: Sequence[Layer],
    look: Callable[[Layer, torch.Tensor, torch.Tensor], Any],
) -> Iterator[None]:
    """Within it, `look(layer, x, y)` runs after each layer, on what it was given and has returned;
    what it returns replaces y, unless it is None."""
    by_name = {layer.name: layer for layer in layers}

    def after(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], y: torch.Tensor) -> Any:
        return look(by_name[name], [*args, *kwargs.values()][0], y)

    with around_calls(network.module, by_name, after=after):
        yield


@contextmanager
def hooked(
    network: Network,
    layers: Sequence[Layer],
    hook: Callable[[Layer, torch.Tensor, torch.Tensor], Any],
) -> Iterator[None]:
    """Within it, `hook(layer, inputs, outputs)` runs after each layer, on rows (..., n) and
    (..., m); rows that it returns replace the outputs."""

    def look(layer: Layer, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor | None:
        layout = layer.layout
        rows: torch.Tensor | None = hook(layer, layout.inputs(x), layout.outputs(y))
        if rows is None or layout.channels == -1:
            return rows
        # A change in place of a view would pass by the gradient's hooks on the rows.
        return layout.returned(rows).clone()

    with watched(network, layers, look):
        yield


@contextmanager
def grouping(network: Network, layers: Sequence[Layer]) -> Iterator[dict[str, str]]:
    """Sees, in what runs within it, which layers read the very same rows of one input tensor.

    Yields:
        Filled at the end: {layer name: name of the first layer with the same input}; layers that
        were not reached are absent.
    """
    groups: dict[str, str] = {}
    seen: dict[str, list[tuple[Any, ...]]] = {}
    alive = []  # a tensor that was freed could lend its address to another one

    def look(layer: Layer, x: torch.Tensor, _: torch.Tensor) -> None:
        alive.append(x)
        # The version tells a tensor from itself after a change in place, and the layout one
        # convolution's patches from another's.
        identity = (x.data_ptr(), x._version, *x.shape, *x.stride(), layer.layout)
        seen.setdefault(layer.name, []).append(identity)

    with watched(network, layers, look):
        yield groups
    # A layer may be called several times: only the same inputs in every call are one group.
    first: dict[tuple[tuple[Any, ...], ...], str] = {}
    groups |= {name: first.setdefault(tuple(calls), name) for name, calls in seen.items()}


def input_groups(network: Network, layers: Sequence[Layer], batch: Batch) -> dict[str, str]:
    """As `grouping`, of one forward pass."""
    with torch.no_grad(), grouping(network, layers) as groups:
        network(batch)
    return groups
