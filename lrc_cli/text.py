"""Numbers, sizes, names and errors in words: the one place that rounds what people read."""

import math
from typing import Any

EMPTY = "–"  # noqa: RUF001 - an en dash, in table cells that have nothing to say
"""Stands for a value that was not measured or does not apply."""

BYTE_UNITS = ("B", "kB", "MB", "GB", "TB")


def byte_size(value: float | None) -> str:
    """Bytes in decimal units with three or four digits: 1534705664 -> "1.53 GB"."""
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
    """A share: 0.79779 -> "79.8%"; what is not zero never reads as zero."""
    if value is None:
        return EMPTY
    return "<0.1%" if 0 < value < 0.0005 else f"{value:.1%}"


def small(value: float | None) -> str:
    """An error or a divergence, three significant digits."""
    return EMPTY if value is None else _finite(value, f"{value:.3g}")


def layer_error(value: float | None, floor: float = 0.0) -> str:
    """An error of a layer; below the numerical floor only that it is below is known."""
    return f"< {small(floor)}" if value is not None and value < floor else small(value)


def error_gap(stored: float | None, optimum: float | None, floor: float = 0.0) -> str:
    """What an error is above its optimum, and in relation to it: "0.0002 (+1.7%)"."""
    if stored is None or optimum is None:
        return EMPTY
    if max(stored, optimum) < floor:
        return f"< {small(floor)}"
    share = f" ({(stored - optimum) / optimum:+.1%})" if optimum > floor else ""
    return f"{small(stored - optimum)}{share}"


def perplexity(value: float | None) -> str:
    """20.4371 -> "20.44"; from a thousand on without a fraction, from ten millions on 1.7e+07."""
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
    """Wall time: 7.888 -> "7.9 s", 371 -> "6 min 11 s", 7300 -> "2 h 2 min"."""
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
