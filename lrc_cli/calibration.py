"""Texts and tensor files -> blocks of model inputs, drawn so that no two purposes share a token.

A text file is tokenised whole; a purpose cuts its part of the tokens into blocks and permutes them.
In a tensor file a block is a row. Purposes take blocks in turn and skip whatever was taken before.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from lrc_cli.checkpoint.headers import tensor_bytes
from lrc_cli.errors import InputError

Batch = dict[str, torch.Tensor]

TEXT_SUFFIXES = {".txt", ".jsonl"}
TENSOR_SUFFIXES = {".safetensors"}


@dataclass(frozen=True, kw_only=True)
class Purpose:
    """What blocks are wanted for: their file, their part of it, and how many."""

    name: str
    path: Path
    part: tuple[float, float] = (0.0, 1.0)
    """Share of the file's tokens (or rows), by position."""
    sequence_length: int
    """Tokens of a block, special tokens included; tensor files ignore it."""
    num_sequences: int
    required: bool
    """True when the user wrote the number: fewer blocks are then an error."""
    text_field: str = "text"
    own_draw: bool = False
    """Whether its permutation is independent of the other purposes', as statements with a
    probability need; otherwise purposes with as many free blocks share one."""


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """Blocks drawn for one purpose, ready to be model inputs."""

    name: str
    inputs: Batch
    """Tensors whose first dimension counts the blocks."""
    population: int
    """Blocks of the part that were free to be drawn."""
    sha256: str
    """Hash of the drawn inputs."""

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    @property
    def num_tokens(self) -> int:
        """Positions of all blocks: their tokens, or rows for inputs without a token dimension."""
        ids = self.inputs.get("input_ids")
        return len(self) if ids is None else ids.numel()

    def split(self, count: int) -> "tuple[Sequences, Sequences]":
        """The first `count` blocks, and the rest."""
        first = {name: tensor[:count] for name, tensor in self.inputs.items()}
        rest = {name: tensor[count:] for name, tensor in self.inputs.items()}
        return replace(self, inputs=first), replace(self, inputs=rest)

    def batches(self, size: int) -> Iterator[Batch]:
        """Micro-batches of at most `size` blocks, in order."""
        for start in range(0, len(self), size):
            yield {name: tensor[start : start + size] for name, tensor in self.inputs.items()}


@dataclass
class _File:
    """The positions of one file: all its tokens, or the rows of its tensors."""

    length: int
    tensors: Batch
    text_field: str
    taken: list[tuple[int, int]] = field(default_factory=list)

    def is_free(self, start: int, stop: int) -> bool:
        return all(stop <= first or last <= start for first, last in self.taken)


def draw(purposes: Sequence[Purpose], *, tokenizer: Any, seed: int) -> dict[str, Sequences]:
    """Draw every purpose's blocks, in the order given, without replacement across purposes.

    Args:
        purposes: a purpose without a block left is absent from the result.
        tokenizer: the checkpoint's own tokenizer, or None where only tensor files are read.
        seed: of the permutations.

    Raises:
        InputError: a file is missing, empty or of an unknown kind, has fewer blocks than asked, or
            is read by two of its fields; or two purposes have one name.
    """
    _check_names(purposes)
    files: dict[Path, _File] = {}
    drawn: dict[str, Sequences] = {}
    for purpose in purposes:
        key = purpose.path.resolve()
        if key not in files:
            files[key] = _read(purpose, tokenizer)
        _check_field(purpose, files[key])
        sequences = _take(purpose, files[key], tokenizer, seed)
        if sequences is not None:
            drawn[purpose.name] = sequences
    return drawn


def _check_names(purposes: Sequence[Purpose]) -> None:
    names = [purpose.name for purpose in purposes]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise InputError(f"two sets of sequences are called {name!r}", "rename one of them")


def _check_field(purpose: Purpose, file: _File) -> None:
    # Positions in the text of one field say nothing about positions in that of another.
    if purpose.path.suffix == ".jsonl" and purpose.text_field != file.text_field:
        raise InputError(
            f"{purpose.name}: {purpose.path} is read by text_field {file.text_field!r} already,"
            f" not {purpose.text_field!r}",
            "read one file by one field, or write the other field into a file of its own",
        )


def _take(purpose: Purpose, file: _File, tokenizer: Any, seed: int) -> Sequences | None:
    is_text = purpose.path.suffix in TEXT_SUFFIXES
    prefix, suffix = special_tokens(tokenizer) if is_text else ([], [])
    width = purpose.sequence_length - len(prefix) - len(suffix) if is_text else 1
    if width < 1:
        raise InputError(
            f"{purpose.name}: sequence_length {purpose.sequence_length} leaves no room for text",
            f"ask for more than the {len(prefix) + len(suffix)} special tokens",
        )
    first, last = (int(share * file.length) for share in purpose.part)
    starts = [s for s in range(first, last - width + 1, width) if file.is_free(s, s + width)]
    order = torch.randperm(len(starts), generator=_generator(purpose, seed)).tolist()
    chosen = [starts[i] for i in order[: purpose.num_sequences]]
    if len(chosen) < purpose.num_sequences and purpose.required:
        unit = f"blocks of {purpose.sequence_length} tokens" if is_text else "rows"
        raise InputError(
            f"{purpose.name}: {purpose.path} has {len(starts)} free {unit} in its part,"
            f" {purpose.num_sequences} were asked for",
            "ask for fewer or shorter sequences, widen the part, or give more data",
        )
    if not chosen:
        return None
    file.taken += [(start, start + width) for start in chosen]
    if is_text:
        ids = file.tensors["input_ids"]
        rows = [torch.tensor(prefix + ids[s : s + width].tolist() + suffix) for s in chosen]
        inputs = {"input_ids": torch.stack(rows)}
    else:
        inputs = {name: tensor[chosen] for name, tensor in file.tensors.items()}
    return Sequences(name=purpose.name, inputs=inputs, population=len(starts), sha256=_hash(inputs))


def _generator(purpose: Purpose, seed: int) -> torch.Generator:
    if purpose.own_draw:
        digest = hashlib.sha256(f"{seed} {purpose.name}".encode()).digest()
        seed = int.from_bytes(digest[:4], "little")
    return torch.Generator().manual_seed(seed)


def _hash(inputs: Batch) -> str:
    digest = hashlib.sha256()
    for name in sorted(inputs):
        tensor = inputs[name]
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The token ids that the tokenizer puts before and behind a sequence of its own accord."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a", add_special_tokens=True)["input_ids"]
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    return [], []


def _read(purpose: Purpose, tokenizer: Any) -> _File:
    path = purpose.path
    if not path.exists():
        raise InputError(
            f"{purpose.name}: {path}: no such file",
            "check the path (relative to the working directory)",
        )
    if path.is_file() and path.suffix in TENSOR_SUFFIXES:
        return _read_tensors(purpose)
    if path.is_file() and path.suffix in TEXT_SUFFIXES:
        if tokenizer is None:
            raise InputError(
                f"{purpose.name}: {path}: the checkpoint has no tokenizer for a text",
                "put its files beside the weights, or give model inputs as .safetensors",
            )
        return _read_tokens(purpose, tokenizer)
    known = ", ".join(sorted(TEXT_SUFFIXES | TENSOR_SUFFIXES))
    raise InputError(
        f"{purpose.name}: {path}: not a kind of data this version reads", f"use {known}"
    )


def _read_tensors(purpose: Purpose) -> _File:
    path = purpose.path
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path}: cannot be read as safetensors ({error})", "write it again"
        ) from error
    lengths = {len(tensor) if tensor.ndim else 0 for tensor in tensors.values()}
    if len(lengths) != 1 or not min(lengths):
        raise InputError(
            f"{path}: the tensors' first dimensions differ or are empty",
            "the first dimension of every tensor must count the same sequences",
        )
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InputError(f"{path}: tensor {name} holds NaN or infinity", "clean the data")
    return _File(length=lengths.pop(), tensors=tensors, text_field=purpose.text_field)


def _read_tokens(purpose: Purpose, tokenizer: Any) -> _File:
    text = read_text(purpose.path, purpose.text_field)
    if not text.strip():
        raise InputError(
            f"{purpose.name}: {purpose.path}: the text is empty", "give a file with text"
        )
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    tensors = {"input_ids": torch.tensor(ids)}
    return _File(length=len(ids), tensors=tensors, text_field=purpose.text_field)


def read_text(path: Path, text_field: str) -> str:
    """The text of a .txt file, or of the `text_field` of every line of a .jsonl file.

    Raises:
        InputError: not readable, not UTF-8, not JSON, or a line without the field.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error})", "convert it to UTF-8") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})", "check the file") from error
    if path.suffix != ".jsonl":
        return text
    rows = []
    # Only "\n" ends a record: `splitlines` would also cut at U+2028, which JSON may hold as it is.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(
                f"{path}:{number}: not valid JSON ({error.msg})", "mend the line"
            ) from error
        if not isinstance(row, dict) or not isinstance(row.get(text_field), str):
            raise InputError(
                f"{path}:{number}: no text under the key {text_field!r}",
                "set text_field to the right key",
            )
        rows.append(row[text_field])
    return "\n\n".join(rows)
