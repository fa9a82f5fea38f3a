"""What scripts/curve.py has measured: a file of JSON lines, the tables and the picture of it."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import exp, fsum, log
from pathlib import Path

from curve_figure import Panel, draw

DENSE = "dense"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One network that was compressed and scored; the file has a line for each.

    Attributes:
        model: the key of `curve.SUBJECTS`.
        method: as on the command line, or "dense".
        share: the kept share of the compressible bytes.
        tokens: training tokens; 0 without training.
        scored: how much was scored: sequences of each text; 0: all that there is.
        scores: by name.
        kept: the share that was kept in the end.
        seconds: wall time of `lrc compress`; of it, `phases` by name.
        commit: the code that made the row.
    """

    model: str
    seed: int
    method: str
    share: float
    tokens: int
    scored: int
    scores: dict[str, float]
    kept: float
    seconds: float
    phases: dict[str, float]
    commit: str

    @property
    def key(self) -> tuple[str, int, str, float, int, int]:
        """What makes it a row of its own."""
        return self.model, self.seed, self.method, self.share, self.tokens, self.scored


class Results:
    """The rows of a file, the last one of each key.

    Args:
        path: the file; it comes into being with the first row.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        # A run that was killed while it wrote leaves half a line, which is measured again.
        rows = [Row(**json.loads(line)) for line in lines if line.endswith("}")]
        self.rows = {row.key: row for row in rows}

    def add(self, row: Row) -> None:
        """Append a row to the file, on the disk before this returns."""
        self.rows[row.key] = row
        self.path.parent.mkdir(parents=True, exist_ok=True)
        whole = not self.path.exists() or self.path.read_bytes()[-1:] in (b"", b"\n")
        with self.path.open("a", encoding="utf-8") as file:
            file.write(("" if whole else "\n") + json.dumps(asdict(row)) + "\n")
            file.flush()
            os.fsync(file.fileno())


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is said of one model's rows.

    Attributes:
        title: of its tables and panels.
        figures: {name of a score: what the picture calls it}.
        relative: whether a figure is a score over the dense network's.
        targets: {(method, share, score): the largest figure that is wanted}.
    """

    title: str
    figures: Mapping[str, str]
    relative: bool
    targets: Mapping[tuple[str, float, str], float]


@dataclass(frozen=True, kw_only=True)
class Group:
    """The rows of one model and one seed that belong together, with its dense network's."""

    subject: Subject
    dense: Row
    rows: Mapping[tuple[str, float], Row]
    """The rows by method and share."""

    @property
    def shares(self) -> list[float]:
        """All shares, largest first."""
        return sorted({share for _, share in self.rows}, reverse=True)

    @property
    def methods(self) -> list[str]:
        """All methods, in the order of the rows."""
        return list(dict.fromkeys(method for method, _ in self.rows))

    def figure(self, method: str, share: float, score: str) -> float | None:
        """The figure of a row; None: it was not measured."""
        row = self.rows.get((method, share))
        if row is None:
            return None
        return row.scores[score] / (self.dense.scores[score] if self.subject.relative else 1.0)


def grouped(
    rows: Iterable[Row], subjects: Mapping[str, Subject], methods: Sequence[str], tokens: int
) -> list[Group]:
    """The rows of these methods by model and seed; a group without a dense row is left out.

    Args:
        methods: in the order of the tables.
        tokens: the training tokens of the rows that were trained.
    """
    by_place: dict[tuple[str, int, int], dict[tuple[str, float], Row]] = {}
    for row in rows:
        if row.tokens in (0, tokens):
            by_place.setdefault((row.model, row.seed, row.scored), {})[row.method, row.share] = row
    groups = []
    order = {name: place for place, name in enumerate(subjects)}
    known = {place: found for place, found in by_place.items() if place[0] in order}
    for (model, *_), found in sorted(known.items(), key=lambda x: (order[x[0][0]], x[0][1:])):
        dense = found.get((DENSE, 1.0))
        ordered = {key: row for name in methods for key, row in found.items() if key[0] == name}
        if dense is not None and ordered:
            groups.append(Group(subject=subjects[model], dense=dense, rows=ordered))
    return groups


def table(group: Group, labels: Mapping[str, str]) -> str:
    """Markdown: the figures of every method at every share."""
    subject = group.subject
    names = " / ".join(subject.figures.values())
    dense = " / ".join(f"{group.dense.scores[score]:.4g}" for score in subject.figures)
    over = ", over the dense network's" if subject.relative else ""
    lines = [
        f"{subject.title}, seed {group.dense.seed}: {names}{over} (dense: {dense})",
        "",
        "| | " + " | ".join(f"{share:g}" for share in group.shares) + " |",
        "| --- |" + " --- |" * len(group.shares),
    ]
    for method in group.methods:
        cells = (_cell(group, method, share) for share in group.shares)
        lines.append(f"| {labels.get(method, method)} | " + " | ".join(cells) + " |")
    lines += ["", *_gains(group, labels), *_verdicts(group), _footnote(group)]
    return "\n".join(lines)


def _cell(group: Group, method: str, share: float) -> str:
    found = [group.figure(method, share, score) for score in group.subject.figures]
    return " / ".join("-" if value is None else number(value) for value in found)


def number(value: float) -> str:
    """A figure in a cell: three decimals, or three digits of a large one."""
    return f"{value:.3f}" if value < 100 else f"{value:.3g}"


def _gains(group: Group, labels: Mapping[str, str]) -> list[str]:
    """For every trained row, what is left of the untrained row's figure."""
    lines = []
    for method in group.methods:
        plain = method.partition("+")[0]
        parts = []
        for share in group.shares if plain != method else ():
            pairs = [
                (group.figure(method, share, score), group.figure(plain, share, score))
                for score in group.subject.figures
            ]
            kept = [_left(after, before, group.subject.relative) for after, before in pairs]
            if all(kept):
                parts.append(f"{share:g}: {' / '.join(f'{x:.2f}' for x in kept)}")
        if parts:
            what = "the logarithm of the ratio" if group.subject.relative else "the error"
            lines.append(f"{labels.get(method, method)} leaves, of {what}: {'; '.join(parts)}.")
    return lines


def _left(after: float | None, before: float | None, relative: bool) -> float | None:
    if after is None or before is None:
        return None
    if not relative:
        return after / before if before else None
    return log(after) / log(before) if before > 1 and after > 0 else None


def _verdicts(group: Group) -> list[str]:
    """The targets of the rows that were measured."""
    lines = []
    for (method, share, score), wanted in group.subject.targets.items():
        value = group.figure(method, share, score)
        if value is not None:
            sign = "met   " if value <= wanted else "MISSED"
            lines.append(f"{sign} {method} at {share:g}, {score}: {value:.3f} <= {wanted:g}")
    return lines


def _footnote(group: Group) -> str:
    commits = ", ".join(dict.fromkeys(row.commit for row in group.rows.values()))
    trained = max(row.tokens for row in group.rows.values())
    tokens = f", {trained:,} training tokens" if trained else ""
    return f"Commit {commits}{tokens}."


def picture(groups: Sequence[Group], labels: Mapping[str, str]) -> str:
    """A panel for every model and figure, with means over the seeds, as an SVG."""
    panels = []
    for subject in dict.fromkeys(id(group.subject) for group in groups):
        same = [group for group in groups if id(group.subject) == subject]
        told = same[0].subject
        for score, title in told.figures.items():
            panels.append(
                Panel(
                    title=f"{told.title}: {title}",
                    lines=_lines(same, score),
                    logarithmic=told.relative,
                    dense=None if told.relative else same[0].dense.scores[score],
                )
            )
    return draw(panels, labels)


def _lines(groups: Sequence[Group], score: str) -> dict[str, list[tuple[float, float]]]:
    """The shares with the geometric mean of the figures over the groups, by method."""
    methods = dict.fromkeys(method for group in groups for method in group.methods)
    shares = sorted({share for group in groups for share in group.shares})
    lines: dict[str, list[tuple[float, float]]] = {}
    for method in methods:
        for share in shares:
            found = [group.figure(method, share, score) for group in groups]
            values = [value for value in found if value]
            if values:
                mean = exp(fsum(map(log, values)) / len(values))
                lines.setdefault(method, []).append((share, mean))
    return lines
