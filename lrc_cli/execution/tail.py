"""The tail of a network runs on some positions at a time, so that logits take little memory.

A language model makes a number for every token of its vocabulary at every position: for 262,144
tokens and 2048 positions, 2 GB in float32, several times over with softmax and gradients. What
comes after the last block mostly treats every position by itself. `find_chain` tries this out.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from lrc_cli.data.decoder import scored
from lrc_cli.data.kinds import Batch

OUTPUT_BYTES = 64 << 20
"""The bytes that the outputs of a tail take at once, in float32."""
MOST_POSITIONS = 2048
"""No micro-batch of several sequences has more positions."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Some positions of some sequences of a micro-batch."""

    rows: slice = field(default_factory=lambda: slice(None))
    """The sequences."""
    tokens: slice = field(default_factory=lambda: slice(None))
    """The positions in each of the sequences."""

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns this part of a tensor (sequences, tokens, ...), as a view."""
        return tensor if self == EVERYTHING else tensor[self.rows, self.tokens]

    def cut(self, batch: Batch) -> Batch:
        """Returns this part of the inputs that have an entry for every token of the tail."""
        if self == EVERYTHING:
            return batch
        shape = batch[scored(batch)[0]].shape
        return {name: self.of(x) for name, x in batch.items() if x.shape[:2] == shape}

    @property
    def start(self) -> int:
        """The number of the part's first sequence in its micro-batch."""
        return self.rows.start or 0


EVERYTHING = Part()


@dataclass(frozen=True, kw_only=True)
class Tail:
    """How a network's tail may be cut."""

    position_bytes: int = 0
    """The bytes of the outputs for one position in float32; 0: the tail runs whole."""
    cuts_inputs: bool = True
    """Whether the network gets the same part of its inputs, or all tokens of a part's sequences."""

    @property
    def positions(self) -> int:
        """The number of positions that run at once, where the tail is cut."""
        return max(OUTPUT_BYTES // self.position_bytes, 1)

    def parts(self, batch: Batch) -> list[Part]:
        """Returns the parts of a micro-batch, whose outputs take up to OUTPUT_BYTES each."""
        if not self.position_bytes:
            return [EVERYTHING]
        rows, tokens = batch[scored(batch)[0]].shape
        positions = self.positions
        if rows * tokens <= positions:
            return [EVERYTHING]
        if tokens <= positions:
            return [Part(rows=x) for x in _slices(rows, positions // tokens)]
        return [
            Part(rows=row, tokens=some)
            for row in _slices(rows, 1)
            for some in _slices(tokens, positions)
        ]

    def inputs(self, batch: Batch, part: Part) -> Batch:
        """Returns the inputs with which the network runs its tail on a part."""
        if part == EVERYTHING:
            return batch
        whole = {name: x[part.rows] for name, x in batch.items()}
        return {**whole, **part.cut(batch)} if self.cuts_inputs else whole


WHOLE_TAIL = Tail()


def _slices(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))
