"""A whole network runs on one micro-batch here, and its tail on some positions at a time."""

from contextlib import suppress
from typing import Any

import torch

from lrc_cli.data.kinds import Batch
from lrc_cli.execution.chain import Chain, run_tail
from lrc_cli.execution.hooks import around_calls, hidden_output
from lrc_cli.execution.network import Network, StopForward
from lrc_cli.execution.tail import EVERYTHING, Part


class InParts:
    """A network's run on one micro-batch, with or without gradients, as the caller has set.

        run = InParts(network, chain, batch)
        for part in run.parts:
            loss_of(run.outputs(part)).backward()
            run.collect()
        run.backward()

    Args:
        network: the network.
        chain: the blocks of this network, or of a network of the same structure.
        batch: the micro-batch.
    """

    def __init__(self, network: Network, chain: Chain, batch: Batch) -> None:
        self.network, self.chain, self.batch = network, chain, batch
        self.parts = chain.tail.parts(batch)
        self._hidden: torch.Tensor | None = None
        self._gradients: dict[int, torch.Tensor] = {}
        """The gradients of all parts by the last hidden states, one a probe."""
        if self.parts != [EVERYTHING]:
            self._hidden = _last_hidden(network, chain, batch)
            self._given = self._hidden.detach().requires_grad_(self._hidden.requires_grad)

    def outputs(self, part: Part) -> Any:
        """Returns the network's outputs for one of the parts."""
        if self._hidden is None:
            return self.network(self.batch)
        # The network may change its input in place, which a leaf does not allow: hence a clone.
        given = part.of(self._given).clone()
        return run_tail(self.network, self.chain, self.batch, part, given)

    def collect(self, probe: int = 0) -> None:
        """Puts by what a backward pass of one part has left at the last block.

        Args:
            probe: a number for the gradients that go through the blocks together.
        """
        if self._hidden is None or self._given.grad is None:
            return
        total = self._gradients.setdefault(probe, self._given.grad)
        if total is not self._given.grad:
            total += self._given.grad
        self._given.grad = None

    def backward(self) -> None:
        """Takes the gradients that were collected from the last block to the first."""
        left = len(self._gradients)
        for gradient in self._gradients.values():
            left -= 1
            assert self._hidden is not None
            self._hidden.backward(gradient, retain_graph=left > 0)


def _last_hidden(network: Network, chain: Chain, batch: Batch) -> torch.Tensor:
    """Runs a network up to its last block, and returns the hidden states that it hands on."""
    found: list[torch.Tensor | None] = []

    def take(_: str, __: Any, ___: Any, output: Any) -> None:
        found.append(hidden_output(output))
        raise StopForward

    with around_calls(network.module, chain.names[-1:], after=take), suppress(StopForward):
        network(batch)
    assert found and found[0] is not None
    return found[0]
