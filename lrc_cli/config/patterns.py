"""Layer patterns, which users and strangers write, are matched here and nowhere else.

A pattern is a glob, or "re:" and a regular expression. Python's own engine can try exponentially
many ways to match, so RE2 matches the expressions, in time linear in the name. Python's meaning of
`\\w`, `\\d`, `\\s`, `\\Z` and `{,n}` is kept; `\\b` knows ASCII letters only. Look-around,
back-references, possessive quantifiers and the flags a, L, u and x are not in RE2.
"""

import fnmatch
import re
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import re2

MARK = "re:"
MOST_CHARACTERS = 10_000
"""The longest pattern."""

_WORD = r"\p{L}\p{N}_"
_SPACE = r"\t-\r\x1c-\x20\x{85}\p{Z}"
_OUTSIDE = {
    **{"w": f"[{_WORD}]", "W": f"[^{_WORD}]", "s": f"[{_SPACE}]", "S": f"[^{_SPACE}]"},
    **{"d": r"\p{Nd}", "D": r"\P{Nd}", "Z": r"\z"},
}
_INSIDE = {"w": _WORD, "s": _SPACE, "d": r"\p{Nd}", "D": r"\P{Nd}", "b": r"\x08"}
_TOKEN = re.compile(
    r"\\(?:x..|u.{4}|U.{8}|[0-7]{1,3}|.)|\[\^?\]?|\]|\{\d*,?\d*\}|[^\\\[\]{]+|\{", re.DOTALL
)


class PatternError(ValueError):
    """A pattern cannot be read; the text says why."""


def matches(pattern: str, name: str) -> bool:
    """Whether a layer pattern fits the whole module name.

    Args:
        pattern: a glob, whose `*` crosses dots, or "re:" and a regular expression.
        name: a module name such as "model.layers.0.mlp.up_proj".

    Raises:
        PatternError: the pattern cannot be read.
    """
    return _matcher(pattern)(name)


def check_pattern(pattern: str) -> None:
    """Raises PatternError for a pattern that cannot be read, with what to write instead."""
    _matcher(pattern)


@lru_cache(maxsize=1 << 15)
def _matcher(pattern: str) -> Callable[[str], bool]:
    if not pattern:
        raise PatternError("it is empty")
    if len(pattern) > MOST_CHARACTERS:
        raise PatternError(f"it has more than {MOST_CHARACTERS:,} characters; split it")
    if not pattern.startswith(MARK):
        return lambda name: fnmatch.fnmatchcase(name, pattern)
    expression = _compiled(pattern.removeprefix(MARK))
    return lambda name: expression.fullmatch(name) is not None


def _compiled(expression: str) -> Any:
    try:
        with warnings.catch_warnings(action="ignore"):  # of sets that later versions may have
            re.compile(expression)
    except (re.error, OverflowError, RecursionError) as error:
        raise PatternError(f"{error}; see Python's re") from error
    options = re2.Options()
    options.log_errors = False
    try:
        return re2.compile(_translated(expression), options)
    except re2.error as error:
        why = error.args[0].decode(errors="replace") if error.args else "unknown"
        raise PatternError(
            f"patterns are matched by RE2, which has no look-around, back-reference or possessive"
            f" quantifier ({why}); use several patterns, or `exclude`"
        ) from error


def _translated(expression: str) -> str:
    """The expression in RE2's syntax, which has other names for some of Python's."""
    pieces, inside = [], False
    for token in _TOKEN.findall(expression):
        if token[0] == "[":
            # A bracket within a set is a character, and so is a closing one right at the start.
            pieces.append(token.replace("[", r"\[") if inside else token)
            inside = not (inside and token.endswith("]"))
        elif token == "]":
            pieces.append("]" if inside else r"\]")
            inside = False
        elif token[0] == "\\":
            pieces.append(_escape(token[1:], inside))
        elif token[0] == "{" and not inside:
            pieces.append(_repeated(token))
        else:
            pieces.append(token)
    return "".join(pieces)


def _repeated(braces: str) -> str:
    """The number of repetitions as RE2 reads it: with a lower end and without zeros in front."""
    found = re.fullmatch(r"\{(\d*)(,?)(\d*)\}", braces)
    if found is None or braces == "{}":
        return braces
    least, comma, most = found.groups()
    return f"{{{int(least or 0)}{comma}{int(most) if most else ''}}}"


def _escape(escaped: str, inside: bool) -> str:
    known = (_INSIDE if inside else _OUTSIDE).get(escaped)
    if known is not None:
        return known
    if inside and escaped in "WS":
        raise PatternError(f"\\{escaped} within [...] is not matched; write its characters")
    if escaped[0] in "123456789" and len(escaped) < 3 and not inside:
        raise PatternError(f"RE2 has no back-references such as \\{escaped}; write the text out")
    if escaped[0] in "uU" and len(escaped) > 1:
        return f"\\x{{{escaped[1:]}}}"
    return re.escape(escaped) if not escaped[0].isascii() or escaped == "_" else f"\\{escaped}"
