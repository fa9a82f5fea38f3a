"""A network's segments run one after another (walk.py), so only one block is in memory at a time.

Most networks are a head (embeddings), a chain of blocks, each fed by the block before, and a tail.
This module tries out on one batch whether a module list is such a chain; no name decides. A network
without a chain is a single segment, which runs whole.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lrc_cli.data.decoder import scored
from lrc_cli.data.draw import Batch
from lrc_cli.execution.constancy import Sketch, sketch, tolerance_of
from lrc_cli.execution.glance import glancing, looked_at
from lrc_cli.execution.hooks import around_calls, hidden_output, watched
from lrc_cli.execution.network import Network, NetworkError, StopForward
from lrc_cli.execution.outputs import floating_outputs
from lrc_cli.execution.placement import block_names
from lrc_cli.execution.tail import EVERYTHING, MOST_POSITIONS, WHOLE_TAIL, Part, Tail
from lrc_cli.network.layer import Layer
from lrc_cli.network.parts import part_of

HEAD, TAIL, WHOLE = "head", "tail", "whole network"
SAME_OUTPUTS = 1e-5
"""The relative difference of outputs up to which it is rounding, where a dtype rounds no more."""

Forward = Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A segment is a part of the network that runs at once."""

    name: str
    """HEAD, TAIL, WHOLE or the module name of a block."""
    layers: list[Layer]
    """The segment's compressible layers, in the order in which they first run."""


@dataclass
class Call:
    """One call of a block: the arguments and the output."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None

    @property
    def hidden(self) -> torch.Tensor | None:
        """The hidden states that came in."""
        found = self.args[0] if self.args else self.kwargs.get("hidden_states")
        return found if isinstance(found, torch.Tensor) and found.is_floating_point() else None

    def others(self) -> list[torch.Tensor]:
        """Returns every other tensor that came in."""
        values = [*self.args, *self.kwargs.values()]
        return [t for value in values for t in _tensors(value) if t is not self.hidden]

    def with_hidden(self, hidden: torch.Tensor | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns the arguments with other hidden states."""
        if self.args:
            return (hidden, *self.args[1:]), self.kwargs
        return (), {**self.kwargs, "hidden_states": hidden}


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


def with_hidden_output(output: Any, hidden: torch.Tensor) -> Any:
    """Returns an output of a block with other hidden states, and with None for other tensors."""
    if isinstance(output, torch.Tensor):
        return hidden
    # A network that reads another tensor (attention weights, say) fails on None: see find_chain.
    return hidden, *(None if list(_tensors(item)) else item for item in output[1:])


@contextmanager
def patched(module: nn.Module, forwards: dict[str, Forward]) -> Iterator[None]:
    """A context in which the named submodules run other forward functions."""
    parts = {name: part_of(module, name) for name in forwards}
    before = {name: vars(part).get("forward") for name, part in parts.items()}
    try:
        for name, part in parts.items():
            vars(part)["forward"] = forwards[name]
        yield
    finally:
        for name, part in parts.items():
            vars(part).pop("forward", None)
            if before[name] is not None:
                vars(part)["forward"] = before[name]


@dataclass(frozen=True, kw_only=True)
class Chain:
    """A chain is blocks that feed one another."""

    names: tuple[str, ...] = ()
    """The blocks' module names in order; empty: there is no chain, and the network runs whole."""
    shape: Any = None
    """An output of the last block, as a pattern for others: a tensor, or a tuple that begins with
    a tensor."""
    tail: Tail = WHOLE_TAIL
    """How what comes after the last block may be cut."""

    @property
    def segments(self) -> tuple[str, ...]:
        """The names of the segments, in order."""
        return (HEAD, *self.names, TAIL) if self.names else (WHOLE,)


def find_chain(
    network: Network,
    batch: Batch,
    watching: AbstractContextManager[Any] | None = None,
    names: Sequence[str] | None = None,
) -> Chain:
    """Returns the blocks of the module list with the most parameters, if they form a chain.

    The blocks form a chain under four conditions. One pass calls each block once, in order, on
    exactly the hidden states that the block before returned. The blocks' other inputs do not depend
    on what blocks compute. Of all that blocks return, only the last block's hidden states reach the
    network's output. A block that runs by itself does what it does in a whole pass, which is tried
    once for a network. Hidden states are a block's output, or the first item of the output.

    Args:
        network: the network.
        batch: a micro-batch to try the blocks on.
        watching: a context to enter around one whole pass; the pass is then made in any case.
        names: the blocks of another module list, to be tried in place of the largest one.
    """
    names = tuple(block_names(network.module) if names is None else names)
    if len(names) < 2 and watching is None:
        return Chain()
    # Checks look at some positions of what the largest list of blocks returns.
    is_largest = names == block_names(network.module)
    tokens = looked_at(network, batch) if is_largest else None
    noted = _Noted(keeps_inputs=names not in network.apart)
    hooks = around_calls(network.module, names, before=noted.enter, after=noted.leave)
    with watching or nullcontext(), hooks, glancing(network, batch, tokens):
        outputs = _run(network, batch)
    last = hidden_output(noted.output)
    if len(names) < 2 or not noted.is_linked or [name for name, _ in noted.calls] != list(names):
        return Chain()
    # A second pass computes nothing in the blocks: their other inputs and the network's outputs
    # must come out the same.
    chain = Chain(names=names, shape=noted.output)
    entered: dict[str, Call] = {}
    if tokens is not None and last is not None:
        last = last[:, tokens]
    try:
        with patched(network.module, passing(chain, entered, last)):
            again = _run(network, batch)
    except NetworkError:
        return Chain()  # the network reads what blocks return beside the hidden states
    same_inputs = all(
        _equal(call.others(), entered[name].others()) if name in entered else False
        for name, call in noted.calls
    )
    if not same_inputs or not _equal(floating_outputs(outputs), floating_outputs(again)):
        return Chain()
    if names not in network.apart:
        network.apart[names] = _run_apart(network, batch, noted)
    if not network.apart[names]:
        return Chain()
    assert last is not None
    return replace(chain, tail=_find_tail(network, chain, batch, tokens, last, outputs))


def _find_tail(
    network: Network,
    chain: Chain,
    batch: Batch,
    tokens: slice | None,
    hidden: torch.Tensor,
    outputs: Any,
) -> Tail:
    """Returns how the tail may be cut, by comparing it on parts with the whole.

    Args:
        tokens: the positions that `hidden` has; None: all.
        hidden: the hidden states that the last block returned.
        outputs: what the network made of them.
    """
    found, ids = floating_outputs(outputs), batch.get(scored(batch)[0])
    if ids is None or ids.ndim != 2:
        return WHOLE_TAIL
    shape = ids.shape if tokens is None else ids[:, tokens].shape
    if any(x.shape[:2] != shape for x in (hidden, *found)) or shape[1] < 2:
        return WHOLE_TAIL
    tail = Tail(position_bytes=4 * sum(x[0, 0].numel() for x in found))
    longest = max(MOST_POSITIONS, ids.shape[1])
    if tail.parts({"input_ids": ids.new_empty(1, longest)}) == [EVERYTHING]:
        return WHOLE_TAIL  # no micro-batch is cut
    first = 0 if tokens is None else tokens.start
    for tried in (tail, replace(tail, cuts_inputs=False)):
        if all(_is_alike(network, replace(chain, tail=tried), batch, first, hidden, found)):
            return tried
    return WHOLE_TAIL


def _is_alike(
    network: Network,
    chain: Chain,
    batch: Batch,
    first: int,
    hidden: torch.Tensor,
    wanted: list[torch.Tensor],
) -> Iterator[bool]:
    """Yields whether the tail's outputs on parts of one sequence are these parts of the whole.

    Args:
        first: the position in the batch that `hidden` begins with.
    """
    tolerance = max(SAME_OUTPUTS, 4 * torch.finfo(network.dtype).eps)
    length = hidden.shape[1]
    size = min(chain.tail.positions, length // 2)
    for start in (0, length - size):
        part = Part(rows=slice(0, 1), tokens=slice(start, start + size))
        there = replace(part, tokens=slice(first + start, first + start + size))
        try:
            with torch.no_grad():
                outputs = run_tail(network, chain, batch, there, part.of(hidden).clone())
        except NetworkError:
            yield False
            return
        parts = floating_outputs(outputs)
        yield len(parts) == len(wanted)
        for own, whole in zip(parts, map(part.of, wanted), strict=True):
            yield own.shape == whole.shape
            off, norm = ((x).float().flatten(2).norm(dim=-1) for x in (own - whole, whole))
            yield bool((off <= tolerance * norm).all())  # NaN is unlike everything


def run_tail(network: Network, chain: Chain, batch: Batch, part: Part, hidden: torch.Tensor) -> Any:
    """Runs what comes after the last block, and returns the network's outputs for a part.

    Args:
        batch: the micro-batch.
        part: what to run of the micro-batch.
        hidden: this part of the last block's hidden states; the network may change it in place.
    """
    with patched(network.module, passing(chain, {}, hidden)):
        return network(chain.tail.inputs(batch, part))


class _Noted:
    """The calls of blocks in one pass.

    Args:
        keeps_inputs: whether inputs and outputs are kept as they were when a block was called and
            when it returned: another block may change them in place.
    """

    def __init__(self, *, keeps_inputs: bool) -> None:
        self.keeps_inputs = keeps_inputs
        self.calls: list[tuple[str, Call]] = []
        self.sketches: list[Sketch] = []
        """What is kept of the hidden states that each call returned."""
        self.output: Any = None
        """What the last call returned."""
        self.is_linked = True
        """Whether each block got exactly what the block before it has returned."""

    def enter(self, name: str, args: Any, kwargs: Any) -> None:
        """Notes a call before it is made."""
        call = Call(args, kwargs)
        if call.hidden is None or (self.calls and call.hidden is not hidden_output(self.output)):
            self.is_linked = False
        elif self.keeps_inputs:
            call = Call(*call.with_hidden(call.hidden.clone()))
        self.calls.append((name, call))

    def leave(self, _: str, __: Any, ___: Any, output: Any) -> None:
        """Notes what a call has returned."""
        self.output, hidden = output, hidden_output(output)
        if hidden is None:
            self.is_linked = False
        elif self.keeps_inputs:
            self.sketches.append(sketch(hidden))


@torch.no_grad()
def _run_apart(network: Network, batch: Batch, noted: _Noted) -> bool:
    """Returns whether blocks do by themselves what they have done in a whole pass.

    The blocks run last to first, so none finds what the block before it may have left elsewhere.
    """
    for (name, call), wanted in reversed(list(zip(noted.calls, noted.sketches, strict=True))):
        try:
            found = hidden_output(network.run_block(name, batch, call.args, call.kwargs))
        except NetworkError:
            return False
        if found is None or not wanted.distance(sketch(found)) <= tolerance_of(network):
            return False
    return True


def _run(network: Network, batch: Batch) -> Any:
    with torch.no_grad():
        return network(batch)


def _equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(
        a.shape == b.shape and torch.equal(a, b) for a, b in zip(first, second, strict=True)
    )


def passing(
    chain: Chain, entered: dict[str, Call], last: torch.Tensor | None
) -> dict[str, Forward]:
    """Returns forward functions with which blocks hand on their input and note their call.

    Args:
        chain: the blocks.
        entered: filled with every block's call, by block name.
        last: what the last block returns in place of its input; None ends the pass there.
    """

    def forward_of(name: str) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Any:
            entered[name] = call = Call(args, kwargs)
            if name != chain.names[-1]:
                assert call.hidden is not None
                return with_hidden_output(chain.shape, call.hidden)
            if last is None:
                raise StopForward
            return with_hidden_output(chain.shape, last)

        return forward

    return {name: forward_of(name) for name in chain.names}


def places(
    network: Network, chain: Chain, layers: Sequence[Layer], batch: Batch
) -> dict[str, list[str]]:
    """Returns the names of the segments in which each layer runs, by layer name.

    The layers stand in the order in which they first run. Layers that `batch` does not reach are
    absent.
    """
    tokens = looked_at(network, batch)
    with placing(network, chain.names, layers) as found, glancing(network, batch, tokens):
        _run(network, batch)
    return found


@contextmanager
def placing(
    network: Network, names: Sequence[str], layers: Sequence[Layer]
) -> Iterator[dict[str, list[str]]]:
    """A context in which one pass fills in what `places` returns.

    Args:
        network: the network.
        names: the blocks' module names.
        layers: the layers to look for.

    Yields:
        The names of each layer's segments, by layer name.
    """
    found: dict[str, list[str]] = {}
    now = [HEAD if names else WHOLE]

    def look(layer: Layer, _: torch.Tensor, __: torch.Tensor) -> None:
        seen = found.setdefault(layer.name, [])
        if now[0] not in seen:
            seen.append(now[0])

    def enter(name: str, *_: Any) -> None:
        now[0] = name

    def leave(*_: Any) -> None:
        now[0] = TAIL

    # A block may itself be a layer: the layer is looked at before the block is left.
    with (
        around_calls(network.module, names, before=enter),
        watched(network, layers, look),
        around_calls(network.module, names, after=leave),
    ):
        yield found


def segments_of(
    network: Network, chain: Chain, layers: Sequence[Layer], batch: Batch
) -> list[Segment]:
    """Returns the network's segments, each with the layers that first run in the segment.

    Layers that `batch` does not reach are in no segment.
    """
    return arrange(chain, layers, places(network, chain, layers, batch))


def arrange(
    chain: Chain, layers: Sequence[Layer], found: Mapping[str, Sequence[str]]
) -> list[Segment]:
    """Returns the segments in order, with the layers where `places` found them."""
    by_name = {layer.name: layer for layer in layers}
    return [
        Segment(name=name, layers=[by_name[x] for x, seen in found.items() if seen[0] == name])
        for name in chain.segments
    ]
