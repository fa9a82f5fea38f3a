"""A network's chains are cut into windows here, each with a nonlinearity.

Every list of modules that is a chain has windows: the blocks of an encoder, for instance, and then
the blocks of a decoder. To match one matrix to its outputs would be the fit that is already made,
so blocks that are linear go together with the next block that is not. No name decides: the blocks
are tried out.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lrc_cli.data.draw import Batch
from lrc_cli.execution.chain import Chain, Segment, arrange, find_chain, places
from lrc_cli.execution.hooks import around_calls
from lrc_cli.execution.losses import drawing
from lrc_cli.execution.network import Network, NetworkError
from lrc_cli.execution.placement import block_lists
from lrc_cli.execution.walk import Walk
from lrc_cli.network.layer import Layer

SCALES = (0.01, 1.0, 100.0)
"""The root mean squares of the inputs on which blocks are tried."""
ROUNDING, LEAST = 2.0, 1e-4
"""The relative error that rounding may leave in a linear block: in units of the dtype's, at least
so much."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """Neighbouring blocks of a chain that are trained together."""

    chain: Chain
    segments: Sequence[Segment]
    """The blocks, in order."""
    layers: Sequence[Layer]
    """The layers that run in these blocks alone, and may be trained."""

    @property
    def blocks(self) -> tuple[str, ...]:
        """The module names of the blocks."""
        return tuple(segment.name for segment in self.segments)

    def holds(self, name: str) -> bool:
        """Returns whether a module or a parameter of this name lies in one of the blocks."""
        return any(f"{name}.".startswith(f"{block}.") for block in self.blocks)


def find_windows(network: Network, layers: Sequence[Layer], batch: Batch) -> list[Window]:
    """Returns the windows of all chains, in the order in which they run.

    A chain without a layer, or without a nonlinearity, has no windows.

    Args:
        network: the dense network.
        layers: the layers that may be trained.
        batch: one sequence to try the network on.
    """
    windows = []
    for chain in _chains(network, batch):
        windows += _windows_of(network, chain, layers, batch)
    return windows if any(window.layers for window in windows) else []


def _chains(network: Network, batch: Batch) -> list[Chain]:
    """Returns the lists of modules that are chains, in the order in which they run."""
    lists = {names[0]: names for names in block_lists(network.module) if len(names) > 1}
    order: dict[str, None] = {}

    def note(name: str, *_: Any) -> None:
        order.setdefault(name)

    with torch.no_grad(), around_calls(network.module, lists, before=note):
        network(batch)
    found = [find_chain(network, batch, names=lists[name]) for name in order]
    return [chain for chain in found if chain.names]


def _windows_of(
    network: Network, chain: Chain, layers: Sequence[Layer], batch: Batch
) -> list[Window]:
    """Returns the windows of one chain: every block ends one, unless the window is linear."""
    found = places(network, chain, layers, batch)
    head, *blocks, _ = arrange(chain, layers, found)
    walk = Walk(network, chain, [batch])
    walk.advance(head)
    cut: list[list[Segment]] = [[]]
    for segment in blocks:
        cut[-1].append(segment)
        if not _is_linear(walk, segment):
            cut.append([])
        walk.advance(segment)
    *whole, rest = cut
    if not whole:
        return []
    whole[-1] += rest
    windows = []
    for segments in whole:
        blocks_of = {segment.name for segment in segments}
        own = [
            x for x in layers if _lies_in(x, blocks_of) and {*found.get(x.name, ())} <= blocks_of
        ]
        windows.append(Window(chain=chain, segments=segments, layers=own))
    return windows


def _lies_in(layer: Layer, blocks: Collection[str]) -> bool:
    own = layer.tied_to is None
    return own and any(f"{layer.name}.".startswith(f"{name}.") for name in blocks)


def _is_linear(walk: Walk, segment: Segment) -> bool:
    """Returns whether a block maps the middle of two inputs to the middle of their outputs.

    Inputs of other sizes show other nonlinearities: biases hide rectifiers from small inputs, and
    a residual path hides a normalised branch from large ones.
    """
    hidden = walk.hidden[0]
    generator = drawing(0, 0)
    tolerance = max(LEAST, ROUNDING * torch.finfo(hidden.dtype).eps)
    for scale in SCALES:
        a, b = (scale * torch.randn(hidden.shape, generator=generator) for _ in range(2))
        try:
            first, second, middle = (
                walk.run(segment, 0, x.to(walk.network.device, hidden.dtype)).float()
                for x in (a, b, (a + b) / 2)
            )
        except NetworkError:
            return False  # a block that refuses an input is not linear
        off, size = ((x.square().sum().sqrt()) for x in (middle - (first + second) / 2, middle))
        if off > tolerance * (size + (first - second).square().sum().sqrt()):
            return False
    return True
