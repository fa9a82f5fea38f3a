"""Sequences of model inputs are drawn from data files; no two purposes share a token.

A text is read whole, or in passages if it is long (passages.py). A purpose cuts its part of the
tokens into sequences, none of which crosses from one passage into another, and permutes the
sequences. In a tensor file a sequence is a row, in a folder a file. Purposes take sequences in turn
and skip everything that was taken before.
"""

import hashlib
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from pathlib import Path

import torch

from lrc_cli.data.decoder import told_apart
from lrc_cli.data.folders import read_folder
from lrc_cli.data.kinds import (
    KNOWN,
    NO_FINDINGS,
    RECORD_SUFFIXES,
    TENSOR_SUFFIXES,
    TEXT_SUFFIXES,
    Batch,
    Data,
    Findings,
    ending,
    members,
)
from lrc_cli.data.processors import Processors
from lrc_cli.data.records import ONE_A_LINE
from lrc_cli.data.rows import read_rows
from lrc_cli.data.tokens import read_tokens
from lrc_cli.errors import InputError
from lrc_cli.reading import check_on_disk
from lrc_cli.runtime.files import tensor_bytes
from lrc_cli.runtime.memory import give_back_freed_memory

__all__ = ["Batch", "Purpose", "Sequences", "draw"]

SPARE = 4
"""All purposes take one in so many of the tokens that are read of a long text, at the most."""
PERMUTED = 5_000_000
"""Up to so many sequences are permuted; more are drawn from one by one."""
GROWTH = 8
"""So many times as much is read where no sequence lies in a purpose's part."""


@dataclass(frozen=True, kw_only=True)
class Purpose:
    """A use of sequences: their file, the part of the file, and their number."""

    name: str
    path: Path
    part: tuple[float, float] = (0.0, 1.0)
    """Share of the tokens that are read of the file, of its rows or files, by position."""
    sequence_length: int
    """Tokens of a sequence, special tokens included; tensor files and folders ignore it."""
    num_sequences: int
    required: bool
    """True when the user wrote the number: fewer sequences are then an error."""
    text_field: str = "text"
    chat_template: bool = False
    own_draw: bool = False
    """Whether the permutation is independent of other purposes, as statements with a probability
    need; otherwise purposes with equally many free sequences share a permutation."""


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """Sequences drawn for one purpose, ready to be model inputs."""

    name: str
    inputs: Batch
    """Tensors whose first dimension counts the sequences."""
    population: int
    """Number of sequences in the part that were free to be drawn."""
    sha256: str
    """Hash of the drawn inputs."""
    findings: Findings = NO_FINDINGS
    """What of the data does not reach the network."""
    one_in: int | None = None
    """One passage of the file in so many was read; None: all of the file."""
    repeated: int = 0
    """Number of sequences that equal another one, drawn for the same or an earlier purpose."""

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    @property
    def num_tokens(self) -> int:
        """The number of tokens of all sequences; of rows where inputs have no token dimension."""
        ids = self.inputs.get("input_ids")
        return len(self) if ids is None else ids.numel()

    def split(self, count: int) -> "tuple[Sequences, Sequences]":
        """The first `count` sequences, and the rest."""
        first = {name: tensor[:count] for name, tensor in self.inputs.items()}
        rest = {name: tensor[count:] for name, tensor in self.inputs.items()}
        return replace(self, inputs=first), replace(self, inputs=rest)

    def apart_from(self, others: "Iterable[Sequences]") -> "Sequences":
        """The sequences that equal none of the others; the very same object where all do so."""
        taken = {row for other in others for row in _row_hashes(other.inputs)}
        kept = [i for i, row in enumerate(_row_hashes(self.inputs)) if row not in taken]
        if len(kept) == len(self):
            return self
        inputs = {name: tensor[kept] for name, tensor in self.inputs.items()}
        return replace(self, inputs=inputs, sha256=_hash(inputs))

    def batches(self, size: int) -> Iterator[Batch]:
        """Micro-batches of at most `size` sequences, in order."""
        for start in range(0, len(self), size):
            yield {name: tensor[start : start + size] for name, tensor in self.inputs.items()}


@dataclass
class _File:
    """A data file with the positions that are taken."""

    data: Data
    text_field: str
    chat_template: bool
    taken: list[tuple[int, int]] = field(default_factory=list)

    def without_taken(self, starts: range) -> Iterator[range]:
        """The positions of `starts`, a step apart, at which so long a stretch holds nothing taken.

        Millions of rows stay a few ranges.
        """
        width, passed = starts.step, 0
        for first, last in sorted(self.taken):
            yield starts[passed : max(passed, (first - starts.start) // width)]
            passed = max(passed, -((starts.start - last) // width))
        yield starts[passed:]


def draw(purposes: Sequence[Purpose], *, processors: Processors, seed: int) -> dict[str, Sequences]:
    """Draw every purpose's sequences, in the order given, without replacement across purposes.

    Args:
        purposes: a purpose without a sequence left is absent from the result.
        processors: the processors of the checkpoint.
        seed: the seed of the permutations.

    Raises:
        InputError: a file is missing, empty or of an unknown kind, has fewer sequences than asked,
            or is read by two of its fields; or two purposes have one name.
    """
    _check_names(purposes)
    # Opening a tokenizer leaves some 30 MB of freed memory behind.
    give_back_freed_memory()
    files: dict[Path, _File] = {}
    drawn: dict[str, Sequences] = {}
    seen: set[bytes] = set()
    for purpose in purposes:
        key = _place(purpose)
        if key not in files:
            sharing = [other for other in purposes if _place(other) == key]
            files[key] = _open(purpose, sharing, processors)
        _check_reading(purpose, files[key])
        sequences = _take(purpose, files[key], seed)
        if sequences is not None:
            repeated = _count_repeated(sequences.inputs, seen)
            drawn[purpose.name] = replace(sequences, repeated=repeated)
    return drawn


def _check_names(purposes: Sequence[Purpose]) -> None:
    names = [purpose.name for purpose in purposes]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise InputError(f"two sets of sequences are called {name!r}", "rename one of them")


def _check_reading(purpose: Purpose, file: _File) -> None:
    # Positions in the text of one field say nothing about positions in the text of another field.
    if ending(purpose.path) not in RECORD_SUFFIXES:
        return
    if purpose.text_field != file.text_field:
        raise InputError(
            f"{purpose.name}: {purpose.path} is read by text_field {file.text_field!r} already,"
            f" not {purpose.text_field!r}",
            "read one file by one field, or write the other field into a file of its own",
        )
    if purpose.chat_template != file.chat_template:
        raise InputError(
            f"{purpose.name}: {purpose.path} is read with chat_template:"
            f" {str(file.chat_template).lower()} already",
            "read one file in one way",
        )


def _place(purpose: Purpose) -> Path:
    # Path.resolve raises RuntimeError on a loop of links, which is then no file.
    return Path(os.path.realpath(purpose.path))


def _open(purpose: Purpose, sharing: Sequence[Purpose], processors: Processors) -> _File:
    try:
        data = _read(purpose, sharing, processors)
    except InputError as error:
        # A text that has only a path is named by its path.
        named = error.message.startswith(f"{purpose.name}:")
        prefix = "" if named else f"{purpose.name}: "
        raise InputError(f"{prefix}{error.message}", error.remedy) from error
    return _File(data=data, text_field=purpose.text_field, chat_template=purpose.chat_template)


def _read(purpose: Purpose, sharing: Sequence[Purpose], processors: Processors) -> Data:
    path = purpose.path
    if not path.exists():
        raise InputError(
            f"{path}: no such file", "check the path (relative to the working directory)"
        )
    check_on_disk(path)
    if path.is_file() and ending(path) in TEXT_SUFFIXES:
        return read_tokens(
            path,
            text_field=purpose.text_field,
            chat_template=purpose.chat_template,
            processors=processors,
            longest=max(other.sequence_length for other in sharing),
            lacking=partial(_lacking, sharing),
        )
    if path.is_file() and ending(path) in TENSOR_SUFFIXES:
        return read_rows(path)
    # The path's suffix must say what a sequence is, also where the data is absent.
    if path.is_dir() and ending(path) not in TEXT_SUFFIXES | TENSOR_SUFFIXES:
        return read_folder(path, processors)
    remedy = f"use {KNOWN}"
    if ending(path) == ".json":
        remedy = f"write one record a line: {ONE_A_LINE}"
    if ending(path) in (".gz", ".zst", ".bz2", ".xz", ".zip"):
        remedy = f"unpack it, and {remedy}"
    raise InputError(f"{path}: not a kind of data this version reads", remedy)


def _take(purpose: Purpose, file: _File, seed: int) -> Sequences | None:
    width = file.data.width(purpose.sequence_length)
    if width < 1:
        raise InputError(
            f"{purpose.name}: sequence_length {purpose.sequence_length} leaves no room for text",
            "ask for more than the special tokens",
        )
    spans = _spans(purpose, file.data, width)
    free = [part for span in spans for part in file.without_taken(span)]
    ends = list(accumulate(len(part) for part in free))
    population = ends[-1] if ends else 0
    order = _order(population, purpose.num_sequences, _generator(purpose, seed))
    chosen = [_entry(free, ends, i) for i in order]
    if len(chosen) < purpose.num_sequences and purpose.required:
        unit = members(purpose.path, purpose.sequence_length)
        raise InputError(
            f"{purpose.name}: {purpose.path} has {population} free {unit} in its part,"
            f" {purpose.num_sequences} were asked for",
            "ask for fewer or shorter sequences, widen the part, or give more data",
        )
    if not chosen:
        return None
    file.taken += [(start, start + width) for start in chosen]
    inputs = told_apart(file.data.take(chosen, width))
    return Sequences(
        name=purpose.name,
        inputs=inputs,
        population=population,
        sha256=_hash(inputs),
        findings=file.data.findings,
        one_in=file.data.one_in,
    )


def _spans(purpose: Purpose, data: Data, width: int) -> Iterator[range]:
    """The positions at which sequences begin, end to end in every stretch of the purpose's part."""
    first, last = (int(share * data.length) for share in purpose.part)
    for begin, end in data.stretches:
        yield range(max(first, begin), min(last, end) - width + 1, width)


def _order(population: int, count: int, generator: torch.Generator) -> list[int]:
    """At most `count` different numbers below `population`, in random order.

    A permutation of far more numbers than are needed would take most of the time.
    """
    if population <= PERMUTED or SPARE * count > population:
        return torch.randperm(population, generator=generator)[:count].tolist()
    found: dict[int, None] = {}
    while len(found) < count:
        found |= dict.fromkeys(torch.randint(population, (count,), generator=generator).tolist())
    return list(found)[:count]


def _entry(ranges: Sequence[range], ends: Sequence[int], index: int) -> int:
    """An entry of ranges that stand end to end.

    Args:
        ends: how many entries each range and all before it have together.
    """
    which = bisect_right(ends, index)
    return ranges[which][index - ends[which]]


def _lacking(purposes: Sequence[Purpose], data: Data) -> int:
    """How many times as much of a file its purposes need, a power of two; 1: enough is read.

    Enough is a few times what all purposes together take, in the part of every purpose. So earlier
    purposes leave the later ones enough, and there is something to choose from.
    """
    widths = [data.width(purpose.sequence_length) for purpose in purposes]
    if min(widths) < 1:
        return 1
    pairs = list(zip(purposes, widths, strict=True))
    needed = SPARE * sum(purpose.num_sequences * width for purpose, width in pairs)
    rooms = [width * sum(map(len, _spans(purpose, data, width))) for purpose, width in pairs]
    if not min(rooms):
        return GROWTH
    times = -(-needed // min(rooms))
    return 1 << (times - 1).bit_length()


def _generator(purpose: Purpose, seed: int) -> torch.Generator:
    if purpose.own_draw:
        digest = hashlib.sha256(f"{seed} {purpose.name}".encode()).digest()
        seed = int.from_bytes(digest[:4], "little")
    return torch.Generator().manual_seed(seed)


def _count_repeated(inputs: Batch, seen: set[bytes]) -> int:
    """The number of sequences whose inputs were there before; `seen` gains the others' hashes."""
    before, rows = len(seen), _row_hashes(inputs)
    seen.update(rows)
    return before + len(rows) - len(seen)


def _row_hashes(inputs: Batch) -> list[bytes]:
    """The sha256 of every sequence's inputs."""
    rows = zip(*(inputs[name] for name in sorted(inputs)), strict=True)
    return [hashlib.sha256(b"".join(bytes(tensor_bytes(x)) for x in row)).digest() for row in rows]


def _hash(inputs: Batch) -> str:
    digest = hashlib.sha256()
    for name in sorted(inputs):
        tensor = inputs[name]
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def micro_batch(sequences: Sequences, positions: int) -> int:
    """The number of sequences, at least one, that have about `positions` positions together."""
    return max(1, positions // num_positions(sequences))


def num_positions(sequences: Sequences) -> int:
    """The positions of a sequence, at least one: tokens, or rows of features of floating-point
    inputs."""
    widest = max(
        tensor[0].numel() // (tensor.shape[-1] if tensor.is_floating_point() else 1)
        for tensor in sequences.inputs.values()
    )
    return max(widest, 1)
