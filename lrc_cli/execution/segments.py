"""This module cuts a network into segments to be measured, and assigns each layer to a segment."""

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass

import torch

from lrc_cli.data.draw import Batch
from lrc_cli.execution.chain import (
    HEAD,
    Call,
    Chain,
    Segment,
    arrange,
    find_chain,
    passing,
    patched,
    placing,
)
from lrc_cli.execution.glance import looked_at
from lrc_cli.execution.hooks import grouping, hidden_output, watched
from lrc_cli.execution.network import Network, StopForward
from lrc_cli.execution.outputs import floating_outputs
from lrc_cli.execution.placement import block_names
from lrc_cli.network.layer import Layer

NO_CHAIN = "its blocks are no chain"


@dataclass(frozen=True, kw_only=True)
class Segmentation:
    """A `Segmentation` holds the segments in which a network is measured."""

    chain: Chain
    segments: list[Segment]
    """The segments in order; every wanted layer is in exactly one segment."""
    leaders: dict[str, str]
    """{layer: the first layer of the same segment that reads the very same input}."""
    reason: str
    """Why the network runs whole; empty where the network is cut."""


def find_segments(
    network: Network,
    layers: Sequence[Layer],
    graded: Collection[str],
    batch: Batch,
    also: AbstractContextManager[None] | None = None,
) -> Segmentation:
    """Cuts a network into segments, by what one batch shows.

    A network is not cut where something would be lost: where a layer runs in several segments, or
    where gradients reach a layer by another way than from block to block.

    Args:
        network: the network.
        layers: the layers to measure.
        graded: the names of the layers whose output gradients are wanted.
        batch: a micro-batch to try the network on.
        also: a context to enter around a whole pass.
    """
    with ExitStack() as watching:  # one pass tells everything
        groups = watching.enter_context(grouping(network, layers))
        found = watching.enter_context(placing(network, block_names(network.module), layers))
        watching.enter_context(also or nullcontext())
        chain = find_chain(network, batch, watching)
    reason = NO_CHAIN if not chain.names else ""
    for layer in layers:
        inside = next((x for x in chain.names if f"{layer.name}.".startswith(f"{x}.")), None)
        # Another batch may reach a layer that this batch does not reach, such as an expert.
        seen = found.setdefault(layer.name, [inside] if inside else [])
        if chain.names and len(seen) != 1:
            reason = f"{layer.name} runs in {len(seen)} of its segments"
    if not reason and _is_bypassed(network, chain, layers, graded, batch, found):
        reason = "what comes before its blocks goes round them"
    if reason:
        chain = Chain()
        found = {layer.name: [*chain.segments] for layer in layers}
    segments = arrange(chain, layers, found)
    first: dict[tuple[str, str], str] = {}
    leaders = {
        layer.name: first.setdefault((segment.name, groups.get(layer.name, layer.name)), layer.name)
        for segment in segments
        for layer in segment.layers
    }
    return Segmentation(chain=chain, segments=segments, leaders=leaders, reason=reason)


def _is_bypassed(
    network: Network,
    chain: Chain,
    layers: Sequence[Layer],
    graded: Collection[str],
    batch: Batch,
    found: dict[str, list[str]],
) -> bool:
    """Returns whether graded layers of the head reach blocks or tail past the hidden states."""
    head = [x for x in layers if x.name in graded and found[x.name] == [HEAD]]
    if not head:
        return False
    entered: dict[str, Call] = {}
    with watched(network, head, lambda _, __, y: y.requires_grad_().clone()):
        with patched(network.module, passing(chain, entered, None)), suppress(StopForward):
            network(batch)
        # Blocks may change the shape of hidden states: the tail takes the last block's shape.
        last = hidden_output(chain.shape)
        tokens = looked_at(network, batch)
        assert last is not None
        last = torch.zeros_like(last if tokens is None else last[:, tokens])
        with patched(network.module, passing(chain, entered, last)):
            outputs = network(batch)
    others = [tensor for call in entered.values() for tensor in call.others()]
    return any(tensor.requires_grad for tensor in [*others, *floating_outputs(outputs)])
