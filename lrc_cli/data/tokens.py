"""Texts, conversations and token ids become one stream of tokens, which is cut into sequences."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lrc_cli.data.conversations import Turns, render
from lrc_cli.data.decoder import INPUT, Decoder
from lrc_cli.data.kinds import NO_FINDINGS, Batch, Findings
from lrc_cli.data.processors import Processors
from lrc_cli.data.records import Record, read_records, read_text
from lrc_cli.data.special_tokens import (
    check_reading,
    read_reading,
    special_tokens,
    token_ids,
)
from lrc_cli.errors import InputError

MESSAGES = "messages"
"""The field of a conversation, where text_field has its default."""


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """A stream of tokens. A sequence is a piece of the stream between the special tokens.

    Where a network writes texts from texts, the encoder reads the first half of a piece and the
    decoder goes on with the second half. Where an encoder-decoder only reads texts, both sides
    read the whole piece.
    """

    ids: torch.Tensor
    """The stream, (tokens,) int64."""
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
        pieces = torch.stack([self.ids[start : start + width] for start in starts])
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
    path: Path, *, text_field: str, chat_template: bool, processors: Processors
) -> Tokens:
    """The tokens of a file of texts or records.

    Records hold texts or lists of token ids; with `chat_template` they hold conversations. Texts
    are joined by empty lines. Token ids are taken as they are. The tokenizer's chat template
    renders each conversation.

    Raises:
        InputError: the file cannot be read or is empty; the tokenizer or its template is missing.
    """
    if path.suffix == ".txt":
        if chat_template:
            raise InputError(
                f"{path}: a .txt holds no conversations", "give a .jsonl, or chat_template: false"
            )
        return _tokenised(path, read_text(path), processors)
    field = MESSAGES if chat_template and text_field == "text" else text_field
    records = read_records(path, field)
    if chat_template:
        return _conversations(path, records, processors)
    kinds = [_kind(record, field) for record in records]
    if len(set(kinds)) > 1:
        other = next(i for i, kind in enumerate(kinds) if kind != kinds[0])
        cause = f"{records[other][0]}: {field!r} holds {kinds[other]}, and {kinds[0]} before"
        raise InputError(cause, "give one kind in one file")
    if kinds and kinds[0] == "token ids":
        return _stream([ids for _, ids in records], ([], []), processors, NO_FINDINGS)
    texts = [text for _, text in records]
    empty = sum(not text.strip() for text in texts)
    return _tokenised(path, "\n\n".join(texts), processors, empty_records=empty)


def _kind(record: Record, field: str) -> str:
    place, value = record
    if isinstance(value, str):
        return "text"
    if isinstance(value, list) and value and all(type(x) is int and abs(x) < 2**63 for x in value):
        return "token ids"
    raise InputError(
        f"{place}: no text under the key {field!r}, nor token ids",
        "set text_field to the right key, or chat_template: true for conversations",
    )


def _tokenised(path: Path, text: str, processors: Processors, *, empty_records: int = 0) -> Tokens:
    tokenizer = _tokenizer(path, processors)
    if not text.strip():
        raise InputError(f"{path}: the text is empty", "give a file with text")
    reading = read_reading(tokenizer, text, path)
    check_reading(reading, tokenizer, path)
    return _stream(
        [token_ids(tokenizer, text, path)],
        special_tokens(tokenizer, text, path),
        processors,
        Findings(reading=reading, empty_records=empty_records),
    )


def _conversations(path: Path, records: Sequence[Record], processors: Processors) -> Tokens:
    tokenizer = _tokenizer(path, processors)
    if getattr(tokenizer, "chat_template", None) is None:
        raise InputError(
            f"{path}: the checkpoint's tokenizer has no chat template",
            "put its chat_template.jinja beside the weights, or set chat_template: false",
        )
    rendered = [render(tokenizer, place, messages) for place, messages in records]
    texts = [text for text, _ in rendered if text.strip()]
    if not texts:
        raise InputError(f"{path}: there is no conversation in it", "give a file with some")
    whole = "\n\n".join(texts)
    reading = read_reading(tokenizer, whole, path)
    check_reading(reading, tokenizer, path)
    findings = Findings(
        reading=reading,
        turns=sum((turns for _, turns in rendered), Turns()),
        empty_records=len(records) - len(texts),
    )
    rows = [token_ids(tokenizer, text, path) for text in texts]
    return _stream(rows, special_tokens(tokenizer, whole, path), processors, findings)


def _tokenizer(path: Path, processors: Processors) -> Any:
    if processors.tokenizer is None:
        raise InputError(
            f"{path}: the checkpoint has no tokenizer for a text",
            "put its files beside the weights, or give token ids or model inputs (.npz)",
        )
    return processors.tokenizer


def _stream(
    rows: Sequence[list[int]],
    special: tuple[list[int], list[int]],
    processors: Processors,
    findings: Findings,
) -> Tokens:
    ids = torch.tensor([token for row in rows for token in row], dtype=torch.int64)
    prefix, suffix = special
    return Tokens(
        ids=ids, prefix=prefix, suffix=suffix, decoder=processors.decoder, findings=findings
    )
