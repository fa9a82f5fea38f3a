"""The name of a path decides what kind of data it is, and what one sequence of the data is."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from lrc_cli.data.conversations import NO_TURNS, Turns
from lrc_cli.data.special_tokens import Reading

Batch = dict[str, torch.Tensor]

RECORD_SUFFIXES = frozenset({".jsonl", ".csv", ".parquet"})
TEXT_SUFFIXES = RECORD_SUFFIXES | {".txt"}
TENSOR_SUFFIXES = frozenset({".safetensors", ".npz"})
KNOWN = f"{', '.join(sorted(TEXT_SUFFIXES | TENSOR_SUFFIXES))} or a folder of images or audio"


@dataclass(frozen=True, kw_only=True)
class Findings:
    """Says what of a data file does not reach the network."""

    reading: Reading | None = None
    """How much of a text its tokens stand for; None where there is no text or nobody can tell."""
    turns: Turns = NO_TURNS
    """What a chat template left out of conversations."""
    empty_records: int = 0
    """The records that hold no text."""
    linked_folders: Sequence[str] = ()
    """The names of links to folders in a folder of data, which are not followed."""


NO_FINDINGS = Findings()


class Data(Protocol):
    """The positions of one file or folder: its tokens, the rows of its tensors, or its files."""

    @property
    def length(self) -> int:
        """The number of positions."""

    @property
    def findings(self) -> Findings:
        """What does not reach the network."""

    @property
    def stretches(self) -> Sequence[tuple[int, int]]:
        """First and last position, exclusive, of each stretch; a sequence lies in one of them."""

    @property
    def one_in(self) -> int | None:
        """One passage of the file in so many is read; None: all of the file or folder."""

    def width(self, sequence_length: int) -> int:
        """The positions that a sequence of `sequence_length` tokens takes; below 1: none fits."""

    def take(self, starts: Sequence[int], width: int) -> Batch:
        """The model inputs, whose first dimension counts the sequences that begin at `starts`."""


def ending(path: Path) -> str:
    """The suffix of a path, which names the kind of data, in small letters."""
    return path.suffix.lower()


def member(path: Path) -> str:
    """The word for one sequence of this data: `block` for tokens, `row` or `file`."""
    if ending(path) in TEXT_SUFFIXES:
        return "block"
    return "row" if ending(path) in TENSOR_SUFFIXES else "file"


def members(path: Path, sequence_length: int) -> str:
    """The words for many sequences of this data."""
    kind = member(path)
    return f"blocks of {sequence_length} tokens" if kind == "block" else f"{kind}s"
