"""Backward passes run each block again here, so activations of one block live at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.checkpoint import checkpoint

from lrc_cli.execution.chain import Chain, Forward, patched
from lrc_cli.execution.network import Network
from lrc_cli.network.parts import part_of


@contextmanager
def recomputing(network: Network, chain: Chain) -> Iterator[None]:
    """A context in which autograd keeps what enters each block, and nothing of what blocks compute.

    A network without a chain keeps all its activations.
    """
    with patched(network.module, {name: _again(network, name) for name in chain.names}):
        yield


def _again(network: Network, name: str) -> Forward:
    run = part_of(network.module, name).forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        # The hook that puts a block's parameters on the device passes replaced forwards over.
        network.placement.occupy(name)
        return run(*args, **kwargs)

    return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)
