"""The tasks share this code: rows of their tables, running `lrc compress`, counting errors."""

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from lrc_cli import compress, load
from lrc_cli.config import load_config
from lrc_cli.runtime.progress import Progress

ROOT = Path(__file__).resolve().parents[2]
MODELS, DATA = ROOT / ".cache" / "models", ROOT / ".cache" / "data"

DENSE, SVD, FROBENIUS, OURS = "dense", "svd", "frobenius", "ours"
UNIFORM = (
    "compression.allocation=uniform",
    "compression.storage=factors",
    "compression.rank_multiple=1",  # nothing of the size is left unused
)
ROWS: Mapping[str, tuple[str, ...]] = {
    SVD: ("compression.method=svd", *UNIFORM, "compression.sequential=false"),
    FROBENIUS: ("compression.method=frobenius", *UNIFORM, "compression.sequential=false"),
    OURS: (),
}
"""The settings of each row, beside the task's config, whose settings are ours."""


def sparing(layer: str) -> dict[str, tuple[str, ...]]:
    """ROWS, and the baselines once more with one layer left dense inside the same size.

    Equal shares give a classifier's narrow last layer a rank far below the number of its classes.
    These rows are printed beside the others; no target is about them.
    """
    spared = f'compression.layers={{"{layer}": {{size: 1.0}}}}'
    others = {f"{row}, last layer dense": (*ROWS[row], spared) for row in (SVD, FROBENIUS)}
    return {SVD: ROWS[SVD], FROBENIUS: ROWS[FROBENIUS], **others, OURS: ROWS[OURS]}


Scores = dict[str, float]
"""Figures of one network by name."""


class Missing(Exception):
    """One sentence for the user: what is not there, and how it comes there."""


class Check(NamedTuple):
    """A target beside what was measured."""

    words: str
    holds: bool


@dataclass(kw_only=True)
class Results:
    """The results of one task.

    Attributes:
        scores: by row, the dense network included.
        reports: by compressed row, what `lrc compress` says.
        notes: sentences under the table.
    """

    scores: dict[str, Scores] = field(default_factory=dict)
    reports: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Task:
    """One kind of network on its own task.

    Attributes:
        title: the heading of its table.
        size: the share of the compressible bytes at which its targets are stated.
        run: measures, given an empty folder of its own and a size.
        checks: the targets, of all rows' scores.
    """

    title: str
    size: float
    run: Callable[[Path, float], Results]
    checks: Callable[[Mapping[str, Scores]], Sequence[Check]]


def compressed(config: str, size: float, output: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """The report of `lrc compress` with a config of configs/ and overrides."""
    settings = [*overrides, f"compression.size={size}", f"output.path={output}"]
    print(f"compressing to {output.relative_to(ROOT)}", file=sys.stderr, flush=True)
    parsed = load_config(ROOT / "configs" / config, [*settings, "evaluation=[]"])
    return compress(parsed, force=True, progress=Progress(quiet=True))


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a task compresses, and how a network is scored.

    Attributes:
        config: the name of a file of configs/.
        overrides: settings beside the config, for every row.
        score: the scores of a network, the dense one first.
        model: the checkpoint.
        factory: the config's key `model.factory`.
        dtype: the dtype in which a network is scored; None: as stored.
    """

    config: str
    overrides: Sequence[str]
    score: Callable[[nn.Module], Scores]
    model: Path
    factory: str | None = None
    dtype: str | None = "float32"

    @property
    def settings(self) -> list[str]:
        """All overrides of the config that the rows share."""
        factory = [f"model.factory={self.factory}"] if self.factory else []
        return [f"model.path={self.model}", *factory, *self.overrides]

    def score_written(self, path: Path) -> Scores:
        """The scores of the checkpoint at `path`."""
        return self.score(load(path, factory=self.factory, dtype=self.dtype))


def compare(
    setting: Setting, folder: Path, size: float, rows: Mapping[str, tuple[str, ...]] = ROWS
) -> Results:
    """Score the dense network, compress it by every row, and score what was written."""
    results = Results(scores={DENSE: setting.score_written(setting.model)})
    for row, settings in rows.items():
        output = folder / row.replace(", ", "-").replace(" ", "-")
        overrides = [*setting.settings, *settings]
        results.reports[row] = compressed(setting.config, size, output, overrides)
        results.scores[row] = setting.score_written(output)
    return results


def needed(path: Path) -> Path:
    """`path`, which scripts/fetch_demo.py brings. Raises Missing."""
    if not path.exists():
        raise Missing(f"{path.relative_to(ROOT)} is missing; run scripts/fetch_demo.py --tasks")
    return path


def beats(scores: Mapping[str, Scores], name: str, *, higher: bool = False) -> list[Check]:
    """Whether ours is better than both others in the figure `name`."""
    ours, checks = scores[OURS][name], []
    for row in (SVD, FROBENIUS):
        other = scores[row][name]
        holds = ours > other if higher else ours < other
        sign = "above" if higher else "below"
        checks.append(
            Check(words=f"{name}: ours {ours:.4f} {sign} {row}'s {other:.4f}", holds=holds)
        )
    return checks


# ---------------------------------------------------------------- texts


def split_articles(text: str, share: float) -> tuple[list[str], list[str]]:
    """The articles of data/wikipedia.txt: the first ones, `share` of the text, and the others."""
    articles = text.strip().split("\n\n")
    wanted = share * sum(map(len, articles))
    count = total = 0
    while total < wanted:
        total += len(articles[count])
        count += 1
    return articles[:count], articles[count:]


def sentences(paragraph: str) -> list[str]:
    """A paragraph's sentences: cut behind . ! ? before a capital."""
    return re.split(r"(?<=[a-z0-9\)\"][.!?])\s+(?=[A-Z\"])", paragraph.strip())


def edits(wanted: Sequence[Any], given: Sequence[Any]) -> int:
    """Levenshtein's distance: insertions, deletions and replacements."""
    row = list(range(len(given) + 1))
    for i, a in enumerate(wanted, 1):
        previous, row[0] = row[0], i
        for j, b in enumerate(given, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (a != b))
    return row[-1]


class ErrorRate:
    """Edits of networks' texts over the length of what was wanted, one network after the other.

    Args:
        wanted: what each of the inputs says, in characters or in words.
    """

    def __init__(self, wanted: Sequence[Sequence[Any]]) -> None:
        self.wanted, self.total = wanted, sum(map(len, wanted))
        self.counts: list[np.ndarray] = []
        """The edits of every input, for each network that was scored."""

    def of(self, given: Sequence[Sequence[Any]]) -> float:
        """The rate of the next network."""
        pairs = zip(self.wanted, given, strict=True)
        self.counts.append(np.array([edits(a, b) for a, b in pairs], np.float64))
        return float(self.counts[-1].sum() / self.total)

    def standard_error(self) -> float:
        """The standard error of the last network's rise over the first, on the same inputs."""
        rises = self.counts[-1] - self.counts[0]
        return float(rises.std(ddof=1) * len(rises) ** 0.5 / self.total)
