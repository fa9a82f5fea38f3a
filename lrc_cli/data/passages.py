"""A long text is read in passages that lie evenly over the text; a shorter text is read whole.

A tokenizer takes hundreds of bytes a character and a second or two a megabyte, so 500 MB are not
tokenised for a few sequences. The text goes by as a stream and is cut into pieces, which are
tokenised one by one. A passage is a number of neighbouring pieces, so many that several sequences
fit in. Every k-th passage is read; k is the smallest power of two that leaves no more than a given
number of passages. Where k is 1 the passages join into one, which is the whole text.

Neither a seed nor the tokenizer decides where a passage lies, nor how the stream arrives.
"""

import math
import pickle
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Generic, TypeVar, cast

from lrc_cli.data.records import Record, WithTools

Part = TypeVar("Part")

PIECE = 1 << 14
"""Characters of a piece, at the least; only the last piece of a text may be shorter."""
AHEAD = 1 << 12
"""Characters behind the first `PIECE` in which a good place for the cut is looked for."""
PIECE_IDS = 1 << 12
"""Token ids of a piece, where a file holds token ids."""
MOST_PIECES = 512
"""Pieces that are read of a file, about, unless the sequences that are asked for need more."""
CHARACTERS_A_TOKEN = 4
"""Characters of a token, roughly; passages of another text hold more or fewer sequences."""
SEQUENCES_A_PASSAGE = 16
"""Sequences that a passage holds at the least, roughly."""

SINGLE_SPACE = re.compile(r"(?<=\S) (?=\S)")
WHITE_SPACE = re.compile(r"(?<=\S)\s")


@dataclass(frozen=True, kw_only=True)
class Extent:
    """Says how much of a file is read."""

    pieces: int
    """The pieces of a passage."""
    passages: int
    """The most passages that are read."""

    def times(self, factor: int) -> "Extent":
        """As much, `factor` times."""
        return Extent(pieces=self.pieces, passages=self.passages * factor)


@dataclass(frozen=True, kw_only=True)
class Passages(Generic[Part]):
    """The passages of a file that are read; the pieces of each are unpacked one by one."""

    packed: list[list[bytes]]
    one_in: int
    """One passage in so many is read; 1: the whole file."""

    def __len__(self) -> int:
        return len(self.packed)

    def __iter__(self) -> Iterator[Iterator[Part]]:
        return (map(self._unpack, passage) for passage in self.packed)

    def some(self, most: int) -> Iterator[Part]:
        """At most so many pieces, which lie evenly over all that are read."""
        pieces = list(chain.from_iterable(self.packed))
        return map(self._unpack, pieces[:: max(1, math.ceil(len(pieces) / most))])

    def _unpack(self, piece: bytes) -> Part:
        return cast(Part, pickle.loads(zlib.decompress(piece)))


def extent_for(tokens: int) -> Extent:
    """How much of a file is read at first, for sequences of at most so many tokens."""
    pieces = max(1, math.ceil(SEQUENCES_A_PASSAGE * CHARACTERS_A_TOKEN * tokens / PIECE))
    return Extent(pieces=pieces, passages=max(2, math.ceil(MOST_PIECES / pieces)))


def read_passages(pieces: Iterable[Part], extent: Extent) -> Passages[Part]:
    """The passages of a stream of pieces that are read; no more than twice their text is held.

    It is held packed: a character of a text can take four bytes of memory, and a token id 36.
    """
    stream = iter(pieces)
    kept: list[list[bytes]] = []
    number, one_in = 0, 1
    while passage := list(islice(stream, extent.pieces)):
        number += 1
        if number % one_in:
            continue
        kept.append([_packed(piece) for piece in passage])
        if len(kept) > extent.passages:
            kept, one_in = kept[1::2], 2 * one_in
    return Passages(packed=kept, one_in=one_in)


def _packed(piece: Any) -> bytes:
    return zlib.compress(pickle.dumps(piece), level=1)


# ---------------------------------------------------------------- pieces


def pieces_of_text(texts: Iterable[str]) -> Iterator[str]:
    """The pieces of a stream of texts, end to end.

    A piece ends before the first single space behind its first `PIECE` characters, because nearly
    all tokenizers begin a token there. Where none of the next `AHEAD` characters is a single space,
    a piece ends before other white space, and where none is white space, after `PIECE` characters.
    """
    waiting: list[str] = []
    length = 0
    for text in texts:
        waiting.append(text)
        length += len(text)
        if length <= PIECE + AHEAD:
            continue
        whole, start = "".join(waiting), 0
        while len(whole) - start > PIECE + AHEAD:
            stop = _cut(whole, start)
            yield whole[start:stop]
            start = stop
        waiting, length = [whole[start:]], len(whole) - start
    if length:
        yield "".join(waiting)


def _cut(text: str, start: int) -> int:
    first = start + PIECE
    for place in (SINGLE_SPACE, WHITE_SPACE):
        found = place.search(text, first, first + AHEAD + 1)
        if found:
            return found.start()
    return first


def pieces_of_ids(rows: Iterable[list[int]]) -> Iterator[list[int]]:
    """The pieces of `PIECE_IDS` token ids of a stream of lists, end to end."""
    stream = chain.from_iterable(rows)
    while piece := list(islice(stream, PIECE_IDS)):
        yield piece


def pieces_of_records(records: Iterable[Record]) -> Iterator[list[Record]]:
    """The pieces of whole records, each with `PIECE` characters of text or a little more."""
    piece: list[Record] = []
    length = 0
    for record in records:
        piece.append(record)
        # A record's place does not count: it holds the path, and a file may be moved.
        length += _characters(record[1])
        if length >= PIECE:
            yield piece
            piece, length = [], 0
    if piece:
        yield piece


def _characters(value: Any) -> int:
    """The characters of all strings in a value."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, WithTools):
        return _characters(value.messages) + _characters(value.tools)
    inner = value.values() if isinstance(value, dict) else value
    return sum(map(_characters, inner)) if isinstance(value, dict | list) else 0
