"""What a tokenizer puts around a text, and how much of the text the tokens stand for.

Nothing here looks a tokenizer up by its name. The tokenizer is asked on a piece of the text that is
to be read, because an alphabet of four letters may know no other text. The answer is checked on a
second piece.
"""

import unicodedata
from collections import Counter
from contextlib import AbstractContextManager
from dataclasses import dataclass
from operator import index
from typing import Any

import numpy as np

from lrc_cli.errors import InputError
from lrc_cli.runtime.strangers import blaming_input, contained
from lrc_cli.text import percent

SAMPLE = 1 << 12
"""Characters of a piece that a tokenizer is asked on."""
PIECES = 32
"""The most pieces of a long text that are asked about."""
LIMIT = 0.9
"""A text of which the tokens do not stand for more than this share is refused."""
ALPHABET = "give a text in the tokenizer's alphabet, or token ids (.jsonl with lists of numbers)"


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Says how many characters of a text its tokens stand for; spaces are not counted."""

    characters: int = 0
    """The characters that were looked at."""
    lost: int = 0
    """The characters that no token stands for."""
    unknown: int = 0
    """The characters that only the token for unknown text stands for."""

    def __add__(self, other: "Reading") -> "Reading":
        return Reading(
            characters=self.characters + other.characters,
            lost=self.lost + other.lost,
            unknown=self.unknown + other.unknown,
        )

    @property
    def unread(self) -> float:
        """The share of characters that are lost or unknown."""
        return (self.lost + self.unknown) / self.characters if self.characters else 0.0


def token_ids(tokenizer: Any, text: str, place: object, *, special: bool = False) -> list[int]:
    """Returns the token ids of a text.

    Args:
        place: what holds the text, for messages.
        special: whether the tokenizer adds its special tokens.

    Raises:
        InputError: the tokenizer fails on the text, as one without an unknown token may.
    """
    with _blaming(tokenizer, place):
        return _ids_in(tokenizer(text, verbose=False, add_special_tokens=special))


def _blaming(tokenizer: Any, place: object) -> AbstractContextManager[None]:
    """Returns a context for the code of any tokenizer, which may fail in any way."""
    return blaming_input(f"{place}: {_name(tokenizer)} fails on the text", ALPHABET)


def _ids_in(coded: Any) -> list[int]:
    """Returns the token ids that a tokenizer gives a text.

    Raises:
        ValueError, TypeError, LookupError: they are no list of whole numbers of 64 bits.
    """
    ids = list(map(index, coded["input_ids"]))
    if ids and not (min(ids) >= -(2**63) and max(ids) < 2**63):
        raise ValueError("a token id has more than 64 bits")
    return ids


def special_tokens(tokenizer: Any, text: str, place: object) -> tuple[list[int], list[int]]:
    """Returns the special token ids that the tokenizer puts before and behind a sequence.

    Args:
        text: a text that the tokenizer knows, such as a piece of the data.
        place: what holds the text, for messages.

    Raises:
        InputError: the tokenizer makes no token of the text, or does more to a text than put tokens
            around its tokens.
    """
    ends = [text.lstrip()[:SAMPLE], text.rstrip()[-SAMPLE:]]
    pieces = ends if len(text) <= SAMPLE else [_whole_words(piece) for piece in ends]
    found = [around for piece in pieces if (around := _around(tokenizer, piece, place)) is not None]
    if not found:
        raise InputError(f"{place}: {_name(tokenizer)} makes no token of the text", ALPHABET)
    if _UNCLEAR in found or any(around != found[0] for around in found):
        raise InputError(
            f"{place}: {_name(tokenizer)} changes the tokens of a text when it adds its special"
            " tokens, so the special tokens cannot be told from the text's",
            "give token ids (.jsonl with lists of numbers)",
        )
    return found[0]


_UNCLEAR: tuple[list[int], list[int]] = ([-1], [-1])


def _around(tokenizer: Any, text: str, place: object) -> tuple[list[int], list[int]] | None:
    """Returns the tokens before and behind a text, or None where the text has no token."""
    plain = token_ids(tokenizer, text, place)
    if not plain:
        return None
    whole = token_ids(tokenizer, text, place, special=True)
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    return _UNCLEAR


def _name(tokenizer: Any) -> str:
    return f"the tokenizer {type(tokenizer).__name__}"


# ---------------------------------------------------------------- what is lost


def read_reading(tokenizer: Any, text: str, place: object) -> Reading | None:
    """Returns how much of a text its tokens stand for; of a long text, pieces are looked at.

    The result is None where the tokenizer tells neither the places of its tokens nor their text.

    Raises:
        InputError: the tokenizer fails on the text.
    """
    whole = Reading()
    for piece in pieces_of(text):
        reading = _reading(tokenizer, piece, place)
        if reading is None:
            return None
        whole += reading
    return whole


def pieces_of(text: str) -> list[str]:
    """Returns a short text whole, and of a long text pieces that lie evenly over it.

    A piece begins and ends at a space, where there is one, so that no word is cut.
    """
    if len(text) <= SAMPLE * PIECES:
        return [text]
    step = (len(text) - SAMPLE) // (PIECES - 1)
    return [_whole_words(text[i * step : i * step + SAMPLE]) for i in range(PIECES)]


def _whole_words(piece: str) -> str:
    words = piece.split(maxsplit=1)
    return words[-1].rsplit(maxsplit=1)[0] if words else ""


def check_reading(reading: Reading | None, tokenizer: Any, place: object) -> None:
    """Raises InputError if the tokens stand for nearly nothing of a text."""
    if reading is not None and reading.unread > LIMIT:
        raise InputError(
            f"{place}: {_name(tokenizer)} knows {percent(1 - reading.unread)} of the text's"
            " characters, so the tokens say nearly nothing of the text",
            "give a text in the tokenizer's alphabet (letter case, language), or the tokenizer that"
            " belongs to the checkpoint",
        )


def _reading(tokenizer: Any, text: str, place: object) -> Reading | None:
    """Returns the better of two answers, because each way of asking may see losses where none are.

    Places are wrong behind a character that was dropped, and a tokenizer need not know the way back
    to the text.
    """
    with _blaming(tokenizer, place):
        if not getattr(tokenizer, "is_fast", False):
            return _reading_by_text(tokenizer, text, token_ids(tokenizer, text, place))
        options = {"add_special_tokens": False, "return_offsets_mapping": True}
        coded = tokenizer(text, verbose=False, **options)
        by_places = _reading_by_places(tokenizer, text, coded)
        if not by_places.unread:
            return by_places
        by_text = _reading_by_text(tokenizer, text, _ids_in(coded))
    readings = [by_places] if by_text is None else [by_places, by_text]
    return min(readings, key=lambda reading: reading.unread)


def _reading_by_places(tokenizer: Any, text: str, coded: Any) -> Reading:
    """Counts the characters that lie in no token's span of the text."""
    known, seen = np.zeros(len(text), dtype=bool), np.zeros(len(text), dtype=bool)
    for token, (start, stop) in zip(coded["input_ids"], coded["offset_mapping"], strict=True):
        seen[start:stop] = True
        if token != tokenizer.unk_token_id:
            known[start:stop] = True
    counted = ~np.fromiter((x.isspace() for x in text), dtype=bool, count=len(text))
    return Reading(
        characters=int(counted.sum()),
        lost=int((counted & ~seen).sum()),
        unknown=int((counted & seen & ~known).sum()),
    )


def _reading_by_text(tokenizer: Any, text: str, ids: list[int]) -> Reading | None:
    """Counts the characters, whatever their case and accents, that the decoded tokens lack.

    Where there are unknown tokens, all of these characters count as unknown.
    """
    unknown = getattr(tokenizer, "unk_token_id", None)
    try:
        with contained():
            decoded = tokenizer.decode([token for token in ids if token != unknown])
    except Exception:  # the code of any tokenizer, perhaps without a way back
        return None
    if not isinstance(decoded, str):
        return None
    before, after = _letters(text), _letters(decoded)
    kind = "unknown" if unknown in ids else "lost"
    return Reading(characters=before.total(), **{kind: (before - after).total()})


def _letters(text: str) -> Counter[str]:
    plain = unicodedata.normalize("NFKD", text).casefold()
    return Counter(x for x in plain if not x.isspace() and not unicodedata.combining(x))
