"""The figure of scripts/curve.py: quality over kept share, a panel for each figure, as an SVG.

The picture has colours of its own for a light and a dark page, and needs nothing but a browser.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lrc_cli.report.markup import Markup, element

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 380, 300, 48, 12, 34, 44
COLUMNS = 2
LEGEND_WIDTH, LEGEND_HEIGHT = 250, 20
CEILING = 100.0
"""The largest ratio that is shown; what lies above leaves the frame."""
TALLEST = 1.5
"""The largest error that is shown."""
COLOURS = {
    "svd": ("#777777", "#999999"),
    "svd-llm": ("#b35900", "#f0a050"),
    "aa-svd": ("#8a3ea8", "#d29be8"),
    "ours": ("#0b62a8", "#6cb8f5"),
}
"""The colours on a light and on a dark page, by the beginning of a method's name."""
OTHERS = [("#00796b", "#5fd0c0"), ("#a8324a", "#f58aa0"), ("#5d6b00", "#c5d35a")]
"""The colours of methods with switches, in turn."""
DASHES = {"": None, "block": "2 3", "recover": "7 3"}
"""The dashes of a line, by the training of its method."""
STYLE = """
.page{fill:#ffffff}.ink{fill:#1f2328}.faint{fill:#59636e}.frame{fill:none;stroke:#8c959f}
.grid{stroke:#d8dee4}.line{fill:none;stroke-width:2}
@media (prefers-color-scheme:dark){.page{fill:#0d1117}.ink{fill:#e6edf3}.faint{fill:#9198a1}
.frame{stroke:#656c76}.grid{stroke:#30363d}}
"""

Spot = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One plot.

    Attributes:
        title: stands above the frame.
        lines: {method: [(kept share, figure above 0)]}, one at least.
        logarithmic: whether figures are ratios, from 1 up on a logarithmic axis.
        dense: the dense network's figure, which a line shows; None: no line.
    """

    title: str
    lines: Mapping[str, Sequence[Spot]]
    logarithmic: bool
    dense: float | None = None

    @property
    def shares(self) -> list[float]:
        """The shares that were measured, ascending."""
        return sorted({share for line in self.lines.values() for share, _ in line})

    @property
    def top(self) -> float:
        """The upper end of the vertical axis."""
        values = [value for line in self.lines.values() for _, value in line]
        shown = CEILING if self.logarithmic else TALLEST
        return min(max(values) * 1.05, shown)

    @property
    def above(self) -> list[str]:
        """The methods all of whose figures are too large to be shown."""
        return [name for name, line in self.lines.items() if min(y for _, y in line) > self.top]

    @property
    def ticks(self) -> list[float]:
        """The values of the vertical axis that have a line and a number."""
        if self.logarithmic:
            fine = (1.2, 1.5) if self.top <= 10 else (1.5,)
            steps = (1, *fine, 2, 3, 5, 10, 20, 50, 100)
            return [step for step in steps if step <= self.top]
        step = 0.1 if self.top <= 0.6 else 0.2
        return [round(i * step, 1) for i in range(int(self.top / step + 1e-9) + 1)]

    def across(self, share: float) -> float:
        """The place of a share on the horizontal axis."""
        low, high = self.shares[0] - 0.03, self.shares[-1] + 0.03
        return LEFT + (share - low) / (high - low) * (WIDTH - RIGHT - LEFT)

    def height(self, value: float) -> float:
        """The place of a figure on the vertical axis."""
        part = math.log(value) / math.log(self.top) if self.logarithmic else value / self.top
        return HEIGHT - BOTTOM - part * (HEIGHT - BOTTOM - TOP)


def draw(panels: Sequence[Panel], labels: Mapping[str, str]) -> str:
    """The panels in two columns over a legend.

    Args:
        labels: by method, what the legend says; a method that is missing is called by its name.
    """
    methods = list(dict.fromkeys(method for panel in panels for method in panel.lines))
    classes = {method: f"m{i}" for i, method in enumerate(methods)}
    columns = min(COLUMNS, len(panels))
    floor = -(-len(panels) // columns) * HEIGHT + LEGEND_HEIGHT
    places = [(i % columns * WIDTH, i // columns * HEIGHT) for i in range(len(panels))]
    drawn = [
        element("g", _panel(panel, classes, labels, i), transform=f"translate({x} {y})")
        for i, (panel, (x, y)) in enumerate(zip(panels, places, strict=True))
    ]
    width = columns * WIDTH
    across = max(1, width // LEGEND_WIDTH)
    legend = [
        _legend(labels.get(method, method), method, classes[method], i % across, i // across)
        for i, method in enumerate(methods)
    ]
    rows = -(-len(methods) // across)
    picture = element(
        "svg",
        element("style", Markup(STYLE + _colours(methods, classes))),
        element("rect", class_="page", width="100%", height="100%"),
        *drawn,
        element("g", *legend, transform=f"translate(0 {floor})"),
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {width} {floor + rows * LEGEND_HEIGHT + 12}",
        font_family="system-ui, sans-serif",
        font_size=12,
        role="img",
        aria_label="quality of compressed networks over the share of the weights that is kept",
    )
    return f"{picture}\n"


def _colours(methods: Sequence[str], classes: Mapping[str, str]) -> str:
    """The rules that colour lines and dots, for both pages; a training has its base's colour."""
    bases = list(dict.fromkeys(map(_base, methods)))
    others = [base for base in bases if base not in COLOURS]
    pairs = COLOURS | {base: OTHERS[i % len(OTHERS)] for i, base in enumerate(others)}
    light, dark = (
        "".join(_rule(classes[method], pairs[_base(method)][page]) for method in methods)
        for page in (0, 1)
    )
    return f"{light}\n@media (prefers-color-scheme:dark){{{dark}}}\n"


def _rule(name: str, colour: str) -> str:
    return f".{name}{{stroke:{colour}}}.dot.{name}{{fill:{colour};stroke:none}}"


def _base(method: str) -> str:
    return method.partition("+")[0]


def _dashes(method: str) -> str | None:
    return DASHES[method.partition("+")[2]]


def _legend(label: str, method: str, name: str, column: int, row: int) -> Markup:
    x, y = LEFT + column * LEGEND_WIDTH, row * LEGEND_HEIGHT
    line = {"x1": x, "x2": x + 30, "y1": y, "y2": y, "stroke_dasharray": _dashes(method)}
    return Markup(
        element("line", class_=f"line {name}", **line)
        + element("circle", class_=f"dot {name}", cx=x + 15, cy=y, r=3.5)
        + element("text", label, class_="ink", x=x + 38, y=y + 4)
    )


def _panel(
    panel: Panel, classes: Mapping[str, str], labels: Mapping[str, str], index: int
) -> Markup:
    box = {"x": LEFT, "y": TOP, "width": WIDTH - RIGHT - LEFT, "height": HEIGHT - BOTTOM - TOP}
    clip = f"frame{index}"
    parts = [element("clipPath", element("rect", **box), id=clip)]
    for tick in panel.ticks:
        y = panel.height(tick)
        parts.append(element("line", class_="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y))
        parts.append(_text(f"{tick:g}", LEFT - 6, y + 4, "end"))
    for share in panel.shares:
        parts.append(_text(f"{share:g}", panel.across(share), HEIGHT - BOTTOM + 16, "middle"))
    if panel.dense:
        y = panel.height(panel.dense)
        ends = {"x1": LEFT, "x2": WIDTH - RIGHT, "y1": y, "y2": y}
        parts.append(element("line", class_="frame", stroke_dasharray="1 3", **ends))
        parts.append(_text("dense", WIDTH - RIGHT - 4, y - 4, "end"))
    drawn = [_line(panel, method, classes[method]) for method in panel.lines]
    parts.append(element("g", *drawn, clip_path=f"url(#{clip})"))
    parts.append(element("rect", class_="frame", **box))
    for i, method in enumerate(panel.above):
        words = f"above the frame: {labels.get(method, method)}"
        parts.append(_text(words, WIDTH - RIGHT - 6, TOP + 16 + 16 * i, "end"))
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(element("text", panel.title, class_="ink", x=LEFT, y=TOP - 12))
    parts.append(_text("kept share of the compressed weights", middle, HEIGHT - 10, "middle"))
    return Markup("".join(parts))


def _line(panel: Panel, method: str, name: str) -> Markup:
    spots = [(panel.across(share), panel.height(value)) for share, value in panel.lines[method]]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
    dots = [
        element(
            "circle",
            element("title", f"{method} at {share:g}: {value:.4g}"),
            class_=f"dot {name}",
            cx=x,
            cy=y,
            r=3.5,
        )
        for (x, y), (share, value) in zip(spots, panel.lines[method], strict=True)
    ]
    dashes = _dashes(method)
    line = element("polyline", class_=f"line {name}", points=path, stroke_dasharray=dashes)
    return Markup(line + "".join(dots))


def _text(text: str, x: float, y: float, anchor: str) -> Markup:
    return element("text", text, class_="faint", x=x, y=y, text_anchor=anchor)
