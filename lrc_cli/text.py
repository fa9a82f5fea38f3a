"""Numbers, sizes, names and errors become words here, the only place that rounds for people."""

import math
from typing import Any

EMPTY = "–"  # noqa: RUF001 - an en dash, in table cells that have nothing to say
"""The sign for a value that was not measured or does not apply."""

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
    return " ".join(str(error).split())[:500]


def named(error: BaseException) -> str:
    """An error's type and its text on one line."""
    return f"{type(error).__name__}: {one_line(error)}" if str(error) else type(error).__name__


def some_of(keys: Any) -> str:
    """The first few of many names."""
    names = sorted(keys)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
