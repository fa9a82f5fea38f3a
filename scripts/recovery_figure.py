"""The figure of scripts/recovery.py: log-log panels as a standalone SVG, without dependencies."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lrc_cli.report.markup import Markup, element

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 300, 260, 52, 40, 28, 10
LEGEND_WIDTH = 190
COLOURS = {"driven": "#1464a0", "agnostic": "#c44", "predicted": "#1464a0", "d2": "#888"}
MARKS = {"driven": "●", "agnostic": "▲", "predicted": "—", "d2": "- -"}

Spot = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One plot."""

    title: str
    label: str
    """The label of the horizontal axis."""
    xs: list[float]
    """The positions on the horizontal axis, ascending and above 0."""
    errors: dict[str, list[float]]
    """One value above 0 for each x, for each kind (the keys of COLOURS)."""

    def limits(self) -> tuple[Spot, Spot]:
        """The ends of both axes, as powers of ten."""
        values = [math.log10(value) for column in self.errors.values() for value in column]
        across = math.log10(self.xs[0]) - 0.1, math.log10(self.xs[-1]) + 0.1
        return across, (min(values) - 0.15, max(values) + 0.15)

    def place(self, x: float, y: float) -> Spot:
        """The place of a point in the panel."""
        (left, right), (low, high) = self.limits()
        across = (math.log10(x) - left) / (right - left)
        up = (math.log10(y) - low) / (high - low)
        floor = HEIGHT - BOTTOM
        return LEFT + across * (WIDTH - RIGHT - LEFT), floor - up * (floor - TOP)


def draw(panels: Sequence[Panel], names: Mapping[str, str]) -> str:
    """The panels side by side over a legend.

    Args:
        names: by kind, what the legend says.
    """
    placed = [
        element("g", _panel(panel), transform=f"translate({i * WIDTH} 0)")
        for i, panel in enumerate(panels)
    ]
    legend = [
        element(
            "text",
            f"{MARKS[kind]} {name}",
            x=LEFT + i * LEGEND_WIDTH,
            y=HEIGHT + 16,
            fill=COLOURS[kind],
        )
        for i, (kind, name) in enumerate(names.items())
    ]
    picture = element(
        "svg",
        element("rect", width="100%", height="100%", fill="white"),
        *placed,
        *legend,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {WIDTH * len(panels)} {HEIGHT + 28}",
        font_family="sans-serif",
        font_size=11,
    )
    return f"{picture}\n"


def _panel(panel: Panel) -> Markup:
    parts = [_frame(panel)]
    for x in panel.xs:
        across, _ = panel.place(x, 1.0)
        parts.append(_text(f"{x:g}", across, HEIGHT - BOTTOM + 14, "middle"))
    low, high = panel.limits()[1]
    for power in range(math.ceil(low), math.floor(high) + 1):
        _, height = panel.place(panel.xs[0], 10.0**power)
        parts.append(_text(f"{10.0**power:g}", LEFT - 5, height + 4, "end"))
        ends = {"x1": LEFT, "x2": WIDTH - RIGHT, "y1": height, "y2": height}
        parts.append(element("line", stroke="#ddd", **ends))
    for kind, column in panel.errors.items():
        spots = [panel.place(x, y) for x, y in zip(panel.xs, column, strict=True)]
        parts += _drawn(kind, spots)
    return Markup("".join(parts))


def _drawn(kind: str, spots: list[Spot]) -> list[Markup]:
    """A line for what the theory says, marks for what was measured."""
    colour = COLOURS[kind]
    if kind in ("predicted", "d2"):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        dashes = "5 4" if kind == "d2" else None
        return [
            element("polyline", points=path, fill="none", stroke=colour, stroke_dasharray=dashes)
        ]
    if kind == "driven":
        return [element("circle", cx=x, cy=y, r=3.5, fill=colour) for x, y in spots]
    corners = [
        f"{x - 4:.1f},{y + 4:.1f} {x + 4:.1f},{y + 4:.1f} {x:.1f},{y - 4:.1f}" for x, y in spots
    ]
    return [element("polygon", points=path, fill=colour) for path in corners]


def _frame(panel: Panel) -> Markup:
    box = {"width": WIDTH - RIGHT - LEFT, "height": HEIGHT - BOTTOM - TOP}
    middle = (LEFT + WIDTH - RIGHT) / 2
    return Markup(
        element("rect", x=LEFT, y=TOP, fill="none", stroke="#999", **box)
        + _text(panel.title, middle, TOP - 9, "middle")
        + _text(panel.label, middle, HEIGHT - 10, "middle")
    )


def _text(text: str, x: float, y: float, anchor: str) -> Markup:
    return element("text", text, x=x, y=y, text_anchor=anchor)
