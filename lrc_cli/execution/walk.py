"""A walk leads a network through its segments, over fixed micro-batches."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from lrc_cli.data.draw import Batch
from lrc_cli.errors import RunError
from lrc_cli.execution.chain import (
    HEAD,
    TAIL,
    WHOLE,
    Call,
    Chain,
    Segment,
    passing,
    patched,
    run_tail,
)
from lrc_cli.execution.hooks import hidden_output
from lrc_cli.execution.network import Network, NetworkError, StopForward
from lrc_cli.execution.readahead import read_ahead
from lrc_cli.execution.tail import EVERYTHING, Part
from lrc_cli.network.parts import part_of

Keep = Callable[[torch.Tensor], torch.Tensor]
"""A function that stores a tensor between two segments: `HostMemory.keep` or `Tensor.detach`."""


@dataclass
class Walk:
    """A `Walk` leads one network through its segments, over fixed micro-batches.

    For each micro-batch, the walk holds the hidden states that the next segment reads. The caller
    runs a segment any number of times, then passes the segment with `advance`, in order:

        walk = Walk(network, chain, batches)
        for segment in segments_of(network, chain, layers, batches[0]):
            for index in range(len(batches)):
                with hooked(network, segment.layers, look):
                    walk.run(segment, index)
            walk.advance(segment)

    Two networks of one structure (the dense and the compressed one) share chain and segments.
    """

    network: Network
    chain: Chain
    batches: Sequence[Batch]
    keep: Keep = torch.Tensor.detach
    is_compressed: bool = False
    """Whether the network has factors, over which the network's code may stumble."""
    hidden: dict[int, torch.Tensor] = field(default_factory=dict)
    """The input of the segment that the walk has come to, by micro-batch."""
    _calls: dict[int, dict[str, Call]] = field(default_factory=dict)
    _at: str | None = None
    """The segment that was run last."""

    def parts(self, segment: Segment, index: int) -> list[Part]:
        """Returns the parts in which a segment runs on one micro-batch: several for a tail only."""
        if segment.name != TAIL:
            return [EVERYTHING]
        return self.chain.tail.parts(self.batches[index])

    def run(
        self,
        segment: Segment,
        index: int,
        hidden: torch.Tensor | None = None,
        *,
        part: Part = EVERYTHING,
        gradients: bool = False,
    ) -> Any:
        """Runs a segment on one micro-batch.

        Args:
            segment: the segment.
            index: the number of the micro-batch.
            hidden: the segment's input, this part of it; None: what the walk holds.
            part: which part of the micro-batch to run, one of `parts`.
            gradients: whether autograd records the run.

        Returns:
            The hidden states that the head or a block hands on; the network's outputs for the tail
            and the whole network; None where a hook raised StopForward.

        Raises:
            RunError: the code of a compressed network fails.
        """
        if segment.name != self._at:
            self._at = segment.name
            self._read_neighbours(segment)
        with torch.set_grad_enabled(gradients):
            try:
                return self._run(segment, index, hidden, part)
            except StopForward:
                return None
            except NetworkError as error:
                if self.is_compressed:
                    raise compressed_failure(error) from error
                raise

    def _run(self, segment: Segment, index: int, hidden: torch.Tensor | None, part: Part) -> Any:
        batch = self.batches[index]
        if segment.name == WHOLE:
            return self.network(batch)
        if segment.name == HEAD:
            return self._run_head(batch, index)
        if hidden is None:
            # The block gets a copy, because a block may change its input in place. Also, how a
            # matrix product rounds may depend on where in memory a tensor begins, and a tensor in a
            # file begins elsewhere.
            hidden = part.of(self.hidden[index]).to(self.network.device, copy=True)
        if segment.name == TAIL:
            return run_tail(self.network, self.chain, batch, part, hidden)
        args, kwargs = self._calls[index][segment.name].with_hidden(hidden)
        return hidden_output(self.network.run_block(segment.name, batch, args, kwargs))

    def _read_neighbours(self, segment: Segment) -> None:
        """Begins to read the two neighbouring blocks: the walk goes on to one of the two.

        Advice for pages that are in memory costs nothing.
        """
        names = self.chain.names
        if segment.name in names:
            place = names.index(segment.name)
            for name in (*names[max(place - 1, 0) : place], *names[place + 1 : place + 2]):
                read_ahead(part_of(self.network.module, name))

    def _run_head(self, batch: Batch, index: int) -> torch.Tensor:
        entered: dict[str, Call] = {}
        with patched(self.network.module, passing(self.chain, entered, None)):
            try:
                self.network(batch)
            except StopForward:
                if len(entered) < len(self.chain.names):  # a hook has stopped the run
                    raise
        first = entered[self.chain.names[0]].hidden
        assert first is not None
        if not torch.is_grad_enabled():
            self._calls[index] = self._reusing(entered, next(reversed(self._calls.values()), {}))
        return first

    def _kept(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the tensor as `keep` stores it; GPU tensors and repeating views stay the same."""
        repeats = tensor.untyped_storage().nbytes() < tensor.nbytes
        return tensor if repeats or tensor.device.type != "cpu" else self.keep(tensor)

    def _reusing(self, calls: Mapping[str, Call], earlier: Mapping[str, Call]) -> dict[str, Call]:
        """Returns the calls without hidden states, with their other tensors stored by `_kept`.

        A tensor that equals a tensor of the `earlier` calls is held once: masks and positions are
        mostly the same in every micro-batch.
        """
        known: dict[int, torch.Tensor] = {}

        def shared(new: Any, old: Any) -> Any:
            if not isinstance(new, torch.Tensor):
                return new
            if id(new) not in known:
                known[id(new)] = old if _is_same(new, old) else self._kept(new)
            return known[id(new)]

        slim: dict[str, Call] = {}
        for name, call in calls.items():
            leaves, form = tree_flatten(call.with_hidden(None))
            others: list[Any] = [None] * len(leaves)
            if name in earlier:
                found, other_form = tree_flatten((earlier[name].args, earlier[name].kwargs))
                others = found if form == other_form else others
            slim[name] = Call(*tree_unflatten(list(map(shared, leaves, others)), form))
        return slim

    def advance(self, segment: Segment) -> None:
        """Passes a segment: the segment's outputs become the inputs of the next segment."""
        if segment.name in (TAIL, WHOLE):
            return  # nothing comes after it
        for index in range(len(self.batches)):
            self.pass_on(segment, index, self.run(segment, index))

    def pass_on(self, segment: Segment, index: int, output: Any) -> None:
        """Passes a segment with one micro-batch, for which a whole run has returned `output`."""
        if segment.name not in (TAIL, WHOLE):
            self.hidden[index] = self.keep(output)


class Pair:
    """A `Pair` leads the dense and the compressed network side by side over the same micro-batches.

    Args:
        dense: the dense network.
        compressed: the compressed network, of the same structure.
        chain: the chain of both.
        batches: the micro-batches.
        keep: the function that stores tensors between two segments.
    """

    def __init__(
        self,
        dense: Network,
        compressed: Network,
        chain: Chain,
        batches: Sequence[Batch],
        keep: Keep = torch.Tensor.detach,
    ) -> None:
        self.dense = Walk(dense, chain, batches, keep)
        self.compressed = Walk(compressed, chain, batches, keep, is_compressed=True)

    def parts(self, segment: Segment, index: int) -> list[Part]:
        """See Walk."""
        return self.dense.parts(segment, index)

    def run(
        self,
        segment: Segment,
        index: int,
        watching: Sequence[AbstractContextManager[None]] = (nullcontext(), nullcontext()),
        *,
        part: Part = EVERYTHING,
    ) -> tuple[Any, Any] | None:
        """Leads both networks through a segment with one micro-batch.

        Args:
            segment: the segment.
            index: the number of the micro-batch.
            part: which part of the micro-batch to run, one of `parts`.
            watching: the contexts to enter around the dense and around the compressed run.

        Returns:
            The networks' outputs; None before the last segment.
        """
        outputs = []
        for walk, watch in zip((self.dense, self.compressed), watching, strict=True):
            with watch:
                outputs.append(walk.run(segment, index, part=part))
            walk.pass_on(segment, index, outputs[-1])
        return (outputs[0], outputs[1]) if segment.name in (TAIL, WHOLE) else None


def compressed_failure(error: NetworkError) -> RunError:
    """Returns the error for a network whose code fails on factors in the place of its weights."""
    failure = RunError(
        f"the compressed network fails: {error.reason}",
        "exclude the layers whose weight its code reads, with compression.exclude",
    )
    failure.has_trace = True
    return failure


def _is_same(new: torch.Tensor, old: Any) -> bool:
    if not isinstance(old, torch.Tensor) or new.shape != old.shape or new.dtype != old.dtype:
        return False
    return torch.equal(new, old.to(new.device))
