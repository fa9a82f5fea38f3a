"""Hooks on a network's layers: what each layer reads and returns."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from lrc_cli.data.draw import Batch
from lrc_cli.execution.network import Network
from lrc_cli.network.layer import Layer


@contextmanager
def watched(
    network: Network,
    layers: Sequence[Layer],
    look: Callable[[Layer, torch.Tensor, torch.Tensor], Any],
) -> Iterator[None]:
    """Within it, `look(layer, x, y)` runs after each layer, on what it was given and has returned;
    what it returns replaces y, unless it is None."""

    def attach(layer: Layer) -> Any:
        return network.module.get_submodule(layer.name).register_forward_hook(
            lambda _, given, named, y: look(layer, [*given, *named.values()][0], y),
            with_kwargs=True,
        )

    handles = [attach(layer) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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
