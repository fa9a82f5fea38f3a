"""Small pure functions draw inline SVG charts of layers and timings."""

import math
from collections.abc import Callable, Mapping, Sequence

from lrc_cli.report.facts import kept
from lrc_cli.report.markup import Markup, element, join
from lrc_cli.report.record import LayerRecord
from lrc_cli.text import duration, percent, small

Scale = Callable[[float], float]
"""A function from a value to a vertical coordinate."""

WIDTH, HEIGHT = 380, 130
LEFT, RIGHT, TOP, BOTTOM = 36, 4, 8, 8
MAX_DECADES = 4.0
MARGIN = 0.08
"""The room beyond the least and the largest error, in decades."""
BAR_HEIGHT, LABEL_WIDTH, TIME_WIDTH = 22, 110, 90
SINGLES = "other layers"
ERRORS = {"svd": "plain SVD of that rank", "stored": "stored", "optimum": "optimum of that rank"}
"""The errors that are drawn per layer, from back to front."""


def families(layers: Sequence[LayerRecord]) -> dict[str, list[LayerRecord]]:
    """Groups layers whose names differ in numbers only (blocks, experts), e.g. `layers.*.q_proj`.

    Layers without a sibling share one group.
    """
    groups: dict[str, list[LayerRecord]] = {}
    for layer in layers:
        pieces = ["*" if piece.isdecimal() else piece for piece in layer.name.split(".")]
        groups.setdefault(".".join(pieces), []).append(layer)
    singles = [group[0] for group in groups.values() if len(group) == 1]
    several = {name: group for name, group in groups.items() if len(group) > 1}
    return several | ({SINGLES: singles} if singles else {})


def share_chart(layers: Sequence[LayerRecord]) -> Markup:
    """Draws bytes after / before, a bar per layer, a panel per family."""
    top = max([1.0, *map(kept, layers)])

    def vertical(value: float) -> float:
        return HEIGHT - BOTTOM - value / top * (HEIGHT - TOP - BOTTOM)

    ticks = {f"{part * top:.0%}": part * top for part in (0.0, 0.5, 1.0)}
    return _panels(layers, ticks, vertical, _bar, "Kept bytes of")


def error_chart(layers: Sequence[LayerRecord]) -> Markup:
    """Draws relative output errors of stored factors, optimum and plain SVD, on a log axis.

    Layers left dense have no mark; they keep their place.
    """
    low, high = _decades([e for layer in layers for e in _output(layer).values() if e > 0])

    def vertical(value: float) -> float:
        power = math.log10(value) if value > 0 else -math.inf
        share = (min(max(power, low), high) - low) / (high - low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    digits = (1, 2, 5) if high - low < 2.5 else (1,)
    values = [d * 10.0**k for k in range(math.floor(low), math.ceil(high)) for d in digits]
    ticks = {f"{x:g}": x for x in values if low <= math.log10(x) <= high}
    return _panels(layers, ticks, vertical, _point, "Output error of")


def _decades(errors: Sequence[float]) -> tuple[float, float]:
    """Returns the ends of the logarithmic axis."""
    high = math.log10(max(errors, default=1.0)) + MARGIN
    low = math.log10(min(errors, default=0.1)) - MARGIN
    return max(low, high - MAX_DECADES), high


def error_legend() -> Markup:
    """Explains the marks of `error_chart`."""
    items = [
        join(
            element("svg", _symbol(name, 8.0, 8.0, 10.0), viewBox="0 0 16 16", class_="key"), words
        )
        for name, words in ERRORS.items()
    ]
    return element("p", *(element("span", item) for item in items), class_="legend")


def time_chart(timing: Mapping[str, float]) -> Markup:
    """Draws a horizontal bar per phase."""
    longest = max(timing.values(), default=0) or 1.0
    room = 2 * WIDTH - LABEL_WIDTH - TIME_WIDTH
    rows = []
    for index, (phase, seconds) in enumerate(timing.items()):
        y, length = index * BAR_HEIGHT, seconds / longest * room
        rows += [
            element("text", phase, x=0, y=y + 15),
            element(
                "rect", class_="bar", x=LABEL_WIDTH, y=y + 4, width=max(length, 1.0), height=14
            ),
            element("text", duration(seconds), x=LABEL_WIDTH + length + 6, y=y + 15),
        ]
    view = f"0 0 {2 * WIDTH} {len(timing) * BAR_HEIGHT}"
    return element(
        "svg", *rows, viewBox=view, role="img", aria_label="Time per phase", class_="wide"
    )


def _panels(
    layers: Sequence[LayerRecord],
    ticks: Mapping[str, float],
    vertical: Scale,
    mark: Callable[[LayerRecord, float, float, Scale], Markup],
    label: str,
) -> Markup:
    """Draws one panel per family, all on the same vertical scale."""
    grid = [_grid_line(text, vertical(value)) for text, value in ticks.items()]
    figures = []
    for name, group in families(layers).items():
        step = (WIDTH - LEFT - RIGHT) / max(len(group), 8)
        marks = [
            mark(layer, LEFT + (index + 0.5) * step, min(step * 0.75, 12.0), vertical)
            for index, layer in enumerate(group)
        ]
        view = f"0 0 {WIDTH} {HEIGHT}"
        svg = element("svg", *grid, *marks, viewBox=view, role="img", aria_label=f"{label} {name}")
        figures.append(element("figure", element("figcaption", name), svg))
    return element("div", *figures, class_="panels")


def _grid_line(text: str, y: float) -> Markup:
    return join(
        element("line", class_="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y),
        element("text", text, x=LEFT - 4, y=y + 3.5, text_anchor="end"),
    )


def _bar(layer: LayerRecord, x: float, width: float, vertical: Scale) -> Markup:
    share = kept(layer)
    state = "fallback" if layer.facts.fallback else "dense" if layer.facts.is_dense else ""
    title = f"{layer.name}: {percent(share)} kept, {_form(layer)}"
    y = vertical(share)
    return element(
        "rect",
        element("title", title),
        class_=f"bar {state}".rstrip(),
        x=x - width / 2,
        y=y,
        width=width,
        height=vertical(0) - y,
    )


def _form(layer: LayerRecord) -> str:
    if layer.facts.fallback:
        return f"fell back to dense ({layer.facts.reason})"
    if layer.facts.is_dense or layer.facts.rank is None:
        return layer.facts.storage
    return f"{layer.facts.storage} of rank {layer.facts.rank}"


def _point(layer: LayerRecord, x: float, width: float, vertical: Scale) -> Markup:
    errors = _output(layer)
    if not errors:
        return Markup()
    numbers = ", ".join(f"{ERRORS[name]} {small(error)}" for name, error in errors.items())
    symbols = [_symbol(name, x, vertical(error), width) for name, error in errors.items()]
    rank = "" if layer.facts.rank is None else f", rank {layer.facts.rank}"
    title = element("title", f"{layer.name}{rank}: {numbers}")
    return element("g", title, *symbols, class_="point")


def _symbol(name: str, x: float, y: float, width: float) -> Markup:
    radius = max(min(width / 2, 4.0), 1.2)
    if name == "optimum":
        return element("line", class_=name, x1=x - width / 2, x2=x + width / 2, y1=y, y2=y)
    return element("circle", class_=name, cx=x, cy=y, r=radius)


def _output(layer: LayerRecord) -> dict[str, float]:
    """Returns the errors that are drawn; a form without a rank is compared with nothing."""
    errors = layer.facts.errors
    found = {} if errors is None else {name: getattr(errors.output, name) for name in ERRORS}
    return {name: error for name, error in found.items() if error is not None}
