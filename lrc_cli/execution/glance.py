"""Checks look at the outputs for some positions only, where all of them would take much memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lrc_cli.data.decoder import scored
from lrc_cli.data.kinds import Batch
from lrc_cli.execution import tail
from lrc_cli.execution.hooks import around_calls, hidden_output
from lrc_cli.execution.network import Network, NetworkError
from lrc_cli.execution.outputs import floating_outputs
from lrc_cli.execution.placement import block_names


def glance(network: Network, batch: Batch) -> Any:
    """Runs a network on one sequence, and returns its outputs for the positions of `looked_at`."""
    with glancing(network, batch, looked_at(network, batch)):
        return network(batch)


@contextmanager
def glancing(network: Network, batch: Batch, tokens: slice | None) -> Iterator[None]:
    """A context in which the network's last block returns some of its positions only.

    Args:
        tokens: what `looked_at` returns for the batch.
    """
    if tokens is None:
        yield
        return
    shape = batch[scored(batch)[0]].shape

    def narrow(_: str, __: Any, ___: Any, output: Any) -> Any:
        hidden = hidden_output(output)
        if hidden is None or hidden.ndim < 3 or hidden.shape[:2] != shape:
            return None
        few = hidden[:, tokens]
        return few if isinstance(output, torch.Tensor) else (few, *output[1:])

    with around_calls(network.module, block_names(network.module)[-1:], after=narrow):
        yield


def looked_at(network: Network, batch: Batch) -> slice | None:
    """Returns the positions of a sequence that checks look at: the last ones before padding.

    The result is None, which stands for all positions, where logits for all of them take little
    memory, and where the network cannot make outputs for some. The network tries this out once.
    """
    ids_name, mask_name = scored(batch)
    ids, mask = batch.get(ids_name), batch.get(mask_name)
    if ids is None or ids.ndim != 2 or len(ids) != 1 or not block_names(network.module):
        return None
    width = max(tail.OUTPUT_BYTES // (4 * max(network.vocabulary, 1)), 2)
    if ids.shape[1] <= width:
        return None
    is_real = mask is not None and mask.shape == ids.shape and bool(mask.any())
    stop = ids.shape[1] if mask is None or not is_real else int(mask[0].nonzero().max()) + 1
    tokens = slice(max(stop - width, 0), max(stop, 2))
    kind = tuple((name, tuple(x.shape)) for name, x in batch.items())
    if kind not in network.glances:
        network.glances[kind] = _has_outputs_for(network, batch, tokens)
    return tokens if network.glances[kind] else None


@torch.no_grad()
def _has_outputs_for(network: Network, batch: Batch, tokens: slice) -> bool:
    """Returns whether the network makes outputs for these positions, and for no others."""
    calls: list[str] = []
    last = block_names(network.module)[-1:]
    try:
        with (
            around_calls(network.module, last, after=lambda name, *_: calls.append(name)),
            glancing(network, batch, tokens),
        ):
            found = floating_outputs(network(batch))
    except NetworkError:
        return False
    wanted = (1, tokens.stop - tokens.start)
    return len(calls) == 1 and bool(found) and all(x.shape[:2] == wanted for x in found)
