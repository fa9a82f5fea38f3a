"""Hooks show what a network's modules read and return, for as long as a context is open."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from lrc_cli.execution.network import Network
from lrc_cli.network.layer import Layer
from lrc_cli.network.parts import part_of

Before = Callable[[str, tuple[Any, ...], dict[str, Any]], None]
"""A function of a module's name and of the arguments of a call that is about to be made."""
After = Callable[[str, tuple[Any, ...], dict[str, Any], Any], Any]
"""A function of a module's name, the arguments of a call and the output. The function's result
takes the place of the output, unless the result is None."""


@contextmanager
def around_calls(
    module: nn.Module,
    names: Iterable[str],
    *,
    before: Before | None = None,
    after: After | None = None,
) -> Iterator[None]:
    """A context in which functions run before and after every call of some submodules.

    All hooks are gone when the context ends, also by an error. Where several contexts look at one
    module, the functions of the outer context run first.

    Args:
        module: the module with the submodules.
        names: the submodules' names for `get_submodule`.
        before: may raise an error to end the pass.
        after: may replace what the submodule returned.
    """

    def put_on(name: str, hooks: ExitStack) -> None:
        part = part_of(module, name)
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
    """A context in which `look(layer, x, y)` runs after each layer on the layer's input and output.

    The result of `look` replaces y, unless the result is None.
    """
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
    """A context in which `hook(layer, inputs, outputs)` runs after each layer on rows.

    The inputs are rows (..., n), the outputs rows (..., m). Rows that the hook returns replace the
    outputs.
    """

    def look(layer: Layer, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor | None:
        layout = layer.layout
        rows: torch.Tensor | None = hook(layer, layout.inputs(x), layout.outputs(y))
        if rows is None or layout.channels == -1:
            return rows
        # The copy is for gradients' hooks on the rows: a change of a view in place would miss them.
        return layout.returned(rows).clone()

    with watched(network, layers, look):
        yield


@contextmanager
def grouping(network: Network, layers: Sequence[Layer]) -> Iterator[dict[str, str]]:
    """A context that sees which layers read the very same rows of one input tensor.

    Yields:
        {layer name: name of the first layer with the same input}, filled when the context ends.
        Layers that were not reached are absent.
    """
    groups: dict[str, str] = {}
    seen: dict[str, list[tuple[Any, ...]]] = {}
    alive = []  # a tensor that was freed could lend its address to another one

    def look(layer: Layer, x: torch.Tensor, _: torch.Tensor) -> None:
        alive.append(x)
        # The version tells a tensor from the same tensor after a change in place. The layout tells
        # the patches of one convolution from the patches of another.
        identity = (x.data_ptr(), x._version, *x.shape, *x.stride(), layer.layout)
        seen.setdefault(layer.name, []).append(identity)

    with watched(network, layers, look):
        yield groups
    # A layer may be called several times: only the same inputs in every call are one group.
    first: dict[tuple[tuple[Any, ...], ...], str] = {}
    groups |= {name: first.setdefault(tuple(calls), name) for name, calls in seen.items()}


def hidden_output(output: Any) -> torch.Tensor | None:
    """Returns the hidden states of a block's output: the output, a tuple's first item, or None."""
    first = output[0] if isinstance(output, tuple) and output else output
    return first if isinstance(first, torch.Tensor) else None
