"""Texts, conversations and token ids become one stream of tokens, which is cut into sequences."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import torch

from lrc_cli.data.conversations import Turns, render
from lrc_cli.data.decoder import INPUT, Decoder
from lrc_cli.data.kinds import NO_FINDINGS, Batch, Findings
from lrc_cli.data.passages import (
    Extent,
    Passages,
    extent_for,
    pieces_of_ids,
    pieces_of_records,
    pieces_of_text,
    read_passages,
)
from lrc_cli.data.processors import Processors
from lrc_cli.data.records import Record, read_records, stream_text
from lrc_cli.data.special_tokens import (
    check_reading,
    read_reading,
    special_tokens,
    token_ids,
)
from lrc_cli.errors import InputError
from lrc_cli.runtime.memory import give_back_freed_memory
from lrc_cli.text import some_of

MESSAGES = "messages"
"""The field of a conversation, where text_field has its default."""
TOKEN_IDS = "token ids"
SAMPLE_PIECES = 32
"""The most pieces of a text that the tokenizer is asked about before it reads the text."""


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """A stream of tokens. A sequence is a piece of the stream between the special tokens.

    Where a network writes texts from texts, the encoder reads the first half of a piece and the
    decoder goes on with the second half. Where an encoder-decoder only reads texts, both sides
    read the whole piece.
    """

    ids: torch.Tensor
    """The stream, (tokens,) int32, or int64 where an id needs it."""
    stretches: Sequence[tuple[int, int]]
    """First and last position, exclusive, of what stands without a gap in the file."""
    one_in: int | None
    """One passage of the file in so many is in the stream; None: all of the file is."""
    prefix: list[int]
    """Special tokens before a sequence."""
    suffix: list[int]
    """Special tokens behind a sequence."""
    decoder: Decoder | None
    findings: Findings = NO_FINDINGS

    @property
    def length(self) -> int:
        """The number of tokens."""
        return len(self.ids)

    def width(self, sequence_length: int) -> int:
        """The tokens of a sequence that come from the stream; the others are special tokens."""
        left = sequence_length - len(self.prefix) - len(self.suffix)
        return left if self.decoder is None or left > 1 else 0

    def take(self, starts: Sequence[int], width: int) -> Batch:
        """The inputs `input_ids` (sequences, tokens), and `decoder_input_ids` for a decoder."""
        pieces = torch.stack([self.ids[start : start + width] for start in starts]).long()
        if self.decoder is None:
            return {"input_ids": self._wrapped(pieces)}
        if not self.decoder.generates:
            ids = self._wrapped(pieces)
            return {"input_ids": ids, INPUT: self.decoder.shifted(ids)}
        half = width // 2
        return {
            "input_ids": self._wrapped(pieces[:, :half]),
            INPUT: self.decoder.shifted(pieces[:, half:]),
        }

    def _wrapped(self, pieces: torch.Tensor) -> torch.Tensor:
        before, behind = (
            torch.tensor(special, dtype=pieces.dtype).expand(len(pieces), -1)
            for special in (self.prefix, self.suffix)
        )
        return torch.cat([before, pieces, behind], dim=1)


def read_tokens(
    path: Path,
    *,
    text_field: str,
    chat_template: bool,
    processors: Processors,
    longest: int,
    lacking: Callable[[Tokens], int],
) -> Tokens:
    """The tokens of a file of texts or records; of a long file, the tokens of passages.

    Records hold texts or lists of token ids; with `chat_template` they hold conversations. Texts
    are joined by empty lines. Token ids are taken as they are. The tokenizer's chat template
    renders each conversation.

    Args:
        longest: the most tokens of a sequence that is asked for.
        lacking: how many times as many passages the sequences need; 1 where they have enough.

    Raises:
        InputError: the file cannot be read or is empty; the tokenizer or its template is missing.
    """
    if _is_plain(path) and chat_template:
        raise InputError(
            f"{path}: a .txt holds no conversations", "give a .jsonl, or chat_template: false"
        )
    extent = extent_for(longest)
    while True:
        tokens = _read(path, text_field, chat_template, processors, extent)
        factor = 1 if tokens.one_in is None else lacking(tokens)
        if factor == 1:
            return tokens
        extent = extent.times(factor)


def _read(
    path: Path, text_field: str, chat_template: bool, processors: Processors, extent: Extent
) -> Tokens:
    if _is_plain(path):
        return _texts(path, _Counted(stream_text(path)), processors, extent)
    field = MESSAGES if chat_template and text_field == "text" else text_field
    records = read_records(path, field, with_tools=chat_template)
    if chat_template:
        return _conversations(path, records, processors, extent)
    first = next(records, None)
    values = iter(()) if first is None else _of_one_kind(first, records, field)
    if first is not None and _kind(first, field) == TOKEN_IDS:
        passages = read_passages(pieces_of_ids(values), extent)
        return _stream(passages, passages, ([], []), processors, NO_FINDINGS)
    return _texts(path, _Counted(values, between="\n\n"), processors, extent)


def _of_one_kind(first: Record, others: Iterable[Record], field: str) -> Iterator[Any]:
    """The values of records that are all texts, or all token ids."""
    expected = _kind(first, field)
    yield first[1]
    for record in others:
        kind = _kind(record, field)
        if kind != expected:
            cause = f"{record[0]}: {field!r} holds {kind}, and {expected} before"
            raise InputError(cause, "give one kind in one file")
        yield record[1]


def _kind(record: Record, field: str) -> str:
    place, value = record
    if isinstance(value, str):
        return "text"
    if isinstance(value, list) and value and all(type(x) is int and abs(x) < 2**63 for x in value):
        return TOKEN_IDS
    held = f"an object with the keys {some_of(map(repr, value))}" if isinstance(value, dict) else ""
    raise InputError(
        f"{place}: no text under the key {field!r}, nor token ids{held and f', but {held}'}",
        "set text_field to the right key, or chat_template: true for conversations",
    )


class _Counted:
    """A stream of texts with something between them, which counts the texts that went by."""

    def __init__(self, texts: Iterable[str], between: str = "") -> None:
        self._texts, self._between = texts, between
        self.total = self.empty = 0

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            if self.total:
                yield self._between
            self.total += 1
            self.empty += not text or text.isspace()
            yield text


def _is_plain(path: Path) -> bool:
    """Whether a file is one text, and no records."""
    return path.suffix.lower() == ".txt"


def _texts(path: Path, texts: _Counted, processors: Processors, extent: Extent) -> Tokens:
    tokenizer = _tokenizer(path, processors)
    passages = read_passages(pieces_of_text(texts), extent)
    if texts.empty == texts.total:
        raise InputError(f"{path}: the text is empty", "give a file with text")
    sample = "".join(passages.some(SAMPLE_PIECES))
    reading = read_reading(tokenizer, sample, path)
    check_reading(reading, tokenizer, path)
    return _stream(
        passages,
        ([token_ids(tokenizer, piece, path) for piece in passage] for passage in passages),
        special_tokens(tokenizer, sample, path),
        processors,
        Findings(reading=reading, empty_records=0 if _is_plain(path) else texts.empty),
    )


def _conversations(
    path: Path, records: Iterable[Record], processors: Processors, extent: Extent
) -> Tokens:
    tokenizer = _tokenizer(path, processors)
    if getattr(tokenizer, "chat_template", None) is None:
        raise InputError(
            f"{path}: the checkpoint's tokenizer has no chat template",
            "put its chat_template.jinja beside the weights, or set chat_template: false",
        )
    passages = read_passages(pieces_of_records(records), extent)
    rendered = [
        [render(tokenizer, place, messages) for piece in passage for place, messages in piece]
        for passage in passages
    ]
    texts = [[text for text, _ in passage if text.strip()] for passage in rendered]
    whole = "\n\n".join(chain.from_iterable(texts))
    if not whole:
        raise InputError(f"{path}: there is no conversation in it", "give a file with some")
    reading = read_reading(tokenizer, whole, path)
    check_reading(reading, tokenizer, path)
    findings = Findings(
        reading=reading,
        turns=sum((turns for _, turns in chain.from_iterable(rendered)), Turns()),
        empty_records=sum(map(len, rendered)) - sum(map(len, texts)),
    )
    rows = (
        [token_ids(tokenizer, piece, path) for text in passage for piece in pieces_of_text([text])]
        for passage in texts
    )
    return _stream(passages, rows, special_tokens(tokenizer, whole, path), processors, findings)


def _tokenizer(path: Path, processors: Processors) -> Any:
    if processors.tokenizer is None:
        raise InputError(
            f"{path}: the checkpoint has no tokenizer for a text",
            "put its files beside the weights, or give token ids or model inputs (.npz)",
        )
    return processors.tokenizer


def _stream(
    passages: Passages[Any],
    rows: Iterable[Iterable[list[int]]],
    special: tuple[list[int], list[int]],
    processors: Processors,
    findings: Findings,
) -> Tokens:
    """The tokens of passages.

    Args:
        rows: for each passage, the token ids of its pieces.
        special: the special tokens before and behind a sequence.
    """
    give_back_freed_memory()  # of what was read and not kept
    ids, ends = [torch.zeros(0, dtype=torch.int32)], [0]
    for passage in rows:
        found = list(map(_compact, passage))
        ids += found
        ends.append(ends[-1] + sum(map(len, found)))
    give_back_freed_memory()  # of the tokenizer
    prefix, suffix = special
    return Tokens(
        ids=torch.cat(ids),
        # Passages that are neighbours have no gap between them.
        stretches=[(0, ends[-1])] if passages.one_in == 1 else list(pairwise(ends)),
        one_in=passages.one_in if passages.one_in > 1 else None,
        prefix=prefix,
        suffix=suffix,
        decoder=processors.decoder,
        findings=findings,
    )


def _compact(ids: list[int]) -> torch.Tensor:
    """Returns ids as int32 where they fit, (tokens,)."""
    wide = torch.tensor(ids, dtype=torch.int64)
    narrow = wide.to(torch.int32)
    return narrow if torch.equal(narrow, wide) else wide
