"""Numbers, sizes, names and errors become words here, the only place that rounds for people."""

import math
import re
import unicodedata
from collections.abc import Iterable
from typing import Any

from lrc_cli.errors import Interrupted, Stray

EMPTY = "–"  # noqa: RUF001 - an en dash, in table cells that have nothing to say
"""The sign for a value that was not measured or does not apply."""

_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Controls, signs of layout without a shape, halves of surrogate pairs, separators of lines."""
_NOT_ASCII = re.compile("[^ -~]")
_SHORT = {"\n": "n", "\r": "r", "\t": "t"}

BYTE_UNITS = ("B", "kB", "MB", "GB", "TB")


def byte_size(value: float | None) -> str:
    """A number of bytes in decimal units with three or four digits: 1534705664 -> "1.53 GB"."""
    if value is None:
        return EMPTY
    power = 0
    while value >= 999.5 and power < len(BYTE_UNITS) - 1:
        value, power = value / 1000, power + 1
    digits = 0 if power == 0 else max(0, 2 - int(math.log10(max(value, 1))))
    return f"{value:.{digits}f} {BYTE_UNITS[power]}"


def count(value: int | None) -> str:
    """An exact whole number: 6390128 -> "6,390,128"."""
    return EMPTY if value is None else f"{value:,}"


def percent(value: float | None) -> str:
    """A share: 0.79779 -> "79.8%". A share above zero never reads as zero."""
    if value is None:
        return EMPTY
    return "<0.1%" if 0 < value < 0.0005 else f"{value:.1%}"


def small(value: float | None) -> str:
    """An error or a divergence with three significant digits."""
    return EMPTY if value is None else _finite(value, f"{value:.3g}")


def layer_error(value: float | None, floor: float = 0.0) -> str:
    """An error of a layer. Below the numerical floor the text says only that it is below."""
    return f"< {small(floor)}" if value is not None and value < floor else small(value)


def error_gap(stored: float | None, optimum: float | None, floor: float = 0.0) -> str:
    """The difference of an error and its optimum, and the relative one: "0.0002 (+1.7%)"."""
    if stored is None or optimum is None:
        return EMPTY
    if max(stored, optimum) < floor:
        return f"< {small(floor)}"
    share = f" ({(stored - optimum) / optimum:+.1%})" if optimum > floor else ""
    return f"{small(stored - optimum)}{share}"


def perplexity(value: float | None) -> str:
    """A perplexity: 20.4371 -> "20.44"; no fraction from 1000 on, an exponent from 1e7 on."""
    if value is None:
        return EMPTY
    if value < 1000:
        return f"{value:.2f}"
    return _finite(value, f"{value:,.0f}" if value < 1e7 else f"{value:.3g}")


def factor(value: float | None) -> str:
    """A ratio: 1.1834 -> "1.183x"."""
    if value is None:
        return EMPTY
    return _finite(value, f"{value:.3f}x" if value < 10 else f"{value:.3g}x")


def duration(seconds: float) -> str:
    """A wall time: 7.888 -> "7.9 s", 371 -> "6 min 11 s", 7300 -> "2 h 2 min"."""
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 1 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _finite(value: float, text: str) -> str:
    # A ruined network's perplexity may be beyond what a float holds.
    return text if math.isfinite(value) else "infinite"


def one_line(error: BaseException) -> str:
    """An error's text on one line."""
    return " ".join(told(error).split())[:500]


def named(error: BaseException) -> str:
    """An error's type and its text on one line."""
    error = error.error if isinstance(error, Stray) else error
    kind, text = type(error).__name__, one_line(error)
    return f"{kind}: {text}" if text else kind


def told(error: BaseException) -> str:
    """An error's text, also where the error's own code fails to tell the text."""
    try:
        return str(error)
    except Interrupted:
        raise
    except BaseException:  # whatever a stranger's __str__ raises
        return "(its text cannot be had)"


def some_of(keys: Any) -> str:
    """The first few of many names."""
    names = sorted(keys)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def visible(text: str, keep: str = "") -> str:
    """A text whose control characters are shown escaped: ESC becomes the four characters \\x1b.

    Names and messages may come from strangers. Written as they are, some characters move a
    terminal's cursor, end a line, turn the direction of writing or cannot be written at all.

    Args:
        text: any text, also with halves of surrogate pairs.
        keep: control characters that stay, such as a newline.
    """
    if text.isprintable():
        return text
    return _NOT_ASCII.sub(lambda found: _visible(found[0], keep), text)


def _visible(character: str, keep: str) -> str:
    if character in keep or unicodedata.category(character) not in _HIDDEN:
        return character
    number = ord(character)
    form = f"x{number:02x}" if number < 0x100 else f"u{number:04x}"
    return "\\" + _SHORT.get(character, form if number < 0x10000 else f"U{number:08x}")


def visible_lines(lines: Iterable[str]) -> str:
    """Lines, each with its control characters escaped, as one text: no name begins a line."""
    return "\n".join(map(visible, lines))


def cut(text: str, longest: int) -> str:
    """A text whose middle is left out where the text is longer than `longest` characters."""
    if len(text) <= longest:
        return text
    begin, end = longest * 2 // 3, longest // 3
    return f"{text[:begin]} [... {len(text) - begin - end:,} characters ...] {text[-end:]}"
