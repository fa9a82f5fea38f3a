"""Constraints say what a config value may be beyond its type: `Annotated[float, Range(...)]`.

Every constraint has `accepts(value)`, `describe(base)` for messages and `schema()` for JSON Schema.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated, Any

from lrc_cli.config.patterns import PatternError, check_pattern
from lrc_cli.errors import InputError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY_UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
_BYTES = r"(\d{1,15}(?:\.\d{1,15})?) ?((?:[KMGT]i?)?)B"


@dataclass(frozen=True, kw_only=True)
class Range:
    """Numbers between two bounds; a bound of None is absent, `above` and `below` are strict."""

    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None

    def accepts(self, value: Any) -> bool:
        """Whether the number lies between the bounds."""
        return (
            (self.minimum is None or value >= self.minimum)
            and (self.maximum is None or value <= self.maximum)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def describe(self, base: str) -> str:
        """The bounds in words, for instance "a number above 0 and at most 1"."""
        bounds = {
            "above": self.above,
            "at least": self.minimum,
            "below": self.below,
            "at most": self.maximum,
        }
        words = [f"{word} {bound}" for word, bound in bounds.items() if bound is not None]
        return f"{base} {' and '.join(words)}"

    def schema(self) -> dict[str, Any]:
        """The keywords `minimum`, `maximum` and their exclusive forms."""
        bounds = {
            "minimum": self.minimum,
            "maximum": self.maximum,
            "exclusiveMinimum": self.above,
            "exclusiveMaximum": self.below,
        }
        return {keyword: bound for keyword, bound in bounds.items() if bound is not None}


@dataclass(frozen=True, eq=False)
class OneOf:
    """A name from a registry, which is read anew at each look: a test may add to it."""

    names: Collection[str]

    def accepts(self, value: Any) -> bool:
        """Whether the name is there."""
        return value in self.names

    def describe(self, base: str) -> str:
        """All names, in their order."""
        return f"one of {', '.join(self.names)}"

    def schema(self) -> dict[str, Any]:
        """All names, in their order."""
        return {"enum": list(self.names)}


@dataclass(frozen=True)
class Matches:
    """Texts that a regular expression matches whole; `words` explains the form to a person."""

    regex: str
    words: str

    def accepts(self, value: Any) -> bool:
        """Whether the whole text matches."""
        return re.fullmatch(self.regex, value, re.DOTALL) is not None

    def describe(self, base: str) -> str:
        """The words given."""
        return self.words

    def schema(self) -> dict[str, Any]:
        """The keyword `pattern`, anchored at both ends."""
        return {"pattern": f"^(?:{self.regex})$"}


@dataclass(frozen=True)
class Part:
    """A share of a file by position, [start, end]."""

    def accepts(self, value: Any) -> bool:
        """Whether 0 <= start < end <= 1."""
        start, end = value
        return bool(0 <= start < end <= 1)

    def describe(self, base: str) -> str:
        """The condition in words."""
        return "[start, end] with 0 <= start < end <= 1"

    def schema(self) -> dict[str, Any]:
        """Bounds of the items; JSON Schema cannot say start < end."""
        return {"items": {"type": "number", "minimum": 0, "maximum": 1}}


@dataclass(frozen=True)
class LayerPattern:
    """A pattern on module names: a glob, or "re:" and a regular expression."""

    def accepts(self, value: Any) -> bool:
        """Whether the pattern can be read."""
        return not self.why_not(value)

    def why_not(self, value: Any) -> str:
        """Why the pattern cannot be read, with what to write instead; empty: it can."""
        try:
            check_pattern(value)
        except PatternError as error:
            return str(error)
        return ""

    def describe(self, base: str) -> str:
        """Both forms in words."""
        return 'a glob or "re:" and a valid regular expression'

    def schema(self) -> dict[str, Any]:
        """The schema of any text that is not empty."""
        return {"minLength": 1}


Text = Annotated[str, Matches(r"[^\x00]+", "a text that is not empty")]
Pattern = Annotated[str, LayerPattern()]
Share = Annotated[float, Range(above=0, maximum=1)]
Fraction = Annotated[float, Range(above=0, below=1)]
Portion = Annotated[float, Range(minimum=0, maximum=1)]
Positive = Annotated[float, Range(above=0)]
Count = Annotated[int, Range(minimum=1)]
NotNegative = Annotated[int, Range(minimum=0)]
SequenceLength = Annotated[int, Range(minimum=2)]
Seed = Annotated[int, Range(minimum=0, maximum=2**32 - 1)]
FilePart = Annotated[tuple[float, float], Part()]
ByteSize = Count | Annotated[str, Matches(_BYTES, "a size such as 5GB, 500MB or 1GiB")]
Device = Annotated[str, Matches(r"auto|cpu|cuda(:\d{1,4})?|mps", "auto, cpu, cuda, cuda:N or mps")]
Factory = Annotated[str, Matches(r"\w+(\.\w+)*:\w+(\.\w+)*", 'a text "package.module:function"')]


class FieldError(ValueError):
    """The error for values that are possible alone and not together.

    Args:
        key: the field to point at, with dots below the section that raises.
        message: what is wrong and what is allowed.
    """

    def __init__(self, key: str, message: str) -> None:
        self.key = key
        self.message = message
        super().__init__(f"{key}: {message}")


def parse_bytes(size: str | int) -> int:
    """The number of bytes in a size such as "5GB" (10^9 each), "1GiB" (2^30) or 1000.

    Raises:
        ValueError: the text is not a size.
    """
    if isinstance(size, int):
        return size
    found = re.fullmatch(_BYTES, size)
    if found is None:
        raise ValueError(f"{size!r} is not a size such as 5GB, 500MB or 1GiB")
    return int(float(found[1]) * (_UNITS | _BINARY_UNITS)[found[2]])


def part_of(text: str) -> tuple[float, float]:
    """The share of a file that --part gives as "A:B".

    Raises:
        InputError: the text is no such share.
    """
    try:
        first, last = (float(piece) for piece in text.split(":"))
    except ValueError as error:
        raise InputError(f"--part {text}: not A:B", "write for instance 0.7:1") from error
    if not 0 <= first < last <= 1:
        raise InputError(f"--part {text}: needs 0 <= A < B <= 1", "write for instance 0.7:1")
    return first, last
