"""Recovery of a planted low-rank layer from noisy outputs: D1 and D2 of docs/theory.md, measured.

    .venv/bin/python scripts/recovery.py
    .venv/bin/python scripts/recovery.py --figure docs/recovery.svg

A layer W is the least-squares fit to outputs M X + E: M of low rank, E white noise, X coloured
inputs. W is compressed back to the rank of M, once fitted to the data (`frobenius`) and once not
(plain SVD of W), and compared with M on X. The script prints the errors over noise level, tokens
and rank, with the slopes in the log-log plane beside the predicted slopes. It exits with 1 if a
slope is off by more than 0.15, if D1 is violated anywhere, or if fitting to the data is not better.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from recovery_bounds import gaussian_noise_bound, recovery_bound, surviving_noise, visible_noise
from recovery_figure import Panel, draw
from torch import Tensor

from lrc_cli.engine import FROBENIUS, SVD, Statistics

TOLERANCE = 0.15
"""The largest error of a slope."""
DELTA = 0.01
"""The probability d of D2 in the figure."""
DRAWS = 8
"""Repetitions of every point."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One planted layer."""

    num_outputs: int = 64
    num_inputs: int = 48
    num_tokens: int = 2048
    rank: int = 4
    noise: float = 0.03
    """Standard deviation of an entry of E; the entries of M X have about 1."""
    decades: float = 2.0
    """Between the largest and the smallest standard deviation of the inputs' principal axes."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """Frobenius norms on X, root mean squares over the draws."""

    x: float
    signal: float
    noise: float
    """||E||"""
    driven: float
    """||(M^ - M) X|| of the layer fitted to the data."""
    agnostic: float
    """The same of plain SVD."""
    predicted: float
    """s sqrt(r (k + m - r)), the theory's first order."""
    d1: float
    """The least ratio of D1's bound to the error over the draws, times the error."""
    d2: float
    """D1 with D2 in the place of the noise, which nobody knows in practice."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Points that differ in one thing."""

    name: str
    unit: str
    """The divisor of errors: "signal" or "noise"."""
    points: list[Point]

    def errors(self, of: str) -> list[float]:
        """The errors of one kind, in the sweep's unit."""
        return [getattr(point, of) / getattr(point, self.unit) for point in self.points]

    def slope(self, of: str) -> float:
        """Least squares in the log-log plane."""
        return fitted_slope([point.x for point in self.points], self.errors(of))


def fitted_slope(x: Sequence[float], y: Sequence[float]) -> float:
    """The slope of log y over log x."""
    u, v = (torch.tensor(values, dtype=torch.float64).log() for values in (x, y))
    u = u - u.mean()
    return (torch.sum(u * v) / torch.sum(u * u)).item()


def planted(setting: Setting, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """M (m, n), X (n, T) and E (m, T), float64."""
    generator = torch.Generator().manual_seed(seed)

    def gaussian(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    m, n, rank = setting.num_outputs, setting.num_inputs, setting.rank
    axes, _ = torch.linalg.qr(gaussian(n, n))
    scales = torch.logspace(0, -setting.decades, n, dtype=torch.float64)
    matrix = gaussian(m, rank) @ gaussian(rank, n)
    matrix = matrix / torch.linalg.vector_norm(matrix @ (axes * scales)) * math.sqrt(m)
    inputs = (axes * scales) @ gaussian(n, setting.num_tokens)
    return matrix, inputs, setting.noise * gaussian(m, setting.num_tokens)


def measured(setting: Setting, seed: int) -> dict[str, float]:
    """Squared norms of one draw, and D1's ratio."""
    matrix, inputs, noise = planted(setting, seed)
    gram = inputs @ inputs.T / setting.num_tokens
    outputs = matrix @ inputs + noise
    weight = torch.linalg.solve(gram, inputs @ outputs.T / setting.num_tokens).T
    driven = FROBENIUS.factorize(weight, Statistics(gram=gram), setting.rank).dense()
    agnostic = SVD.factorize(weight, Statistics(), setting.rank).dense()
    error = _squared((driven - matrix) @ inputs)
    bound = recovery_bound(visible_noise(noise, inputs), setting.rank, 0.0)
    return {
        "signal": _squared(matrix @ inputs),
        "noise": _squared(noise),
        "driven": error,
        "agnostic": _squared((agnostic - matrix) @ inputs),
        "slack": bound / math.sqrt(error),
    }


def _squared(matrix: Tensor) -> float:
    return matrix.square().sum().item()


def point(setting: Setting, x: float) -> Point:
    """All draws of one setting."""
    found = [measured(setting, seed) for seed in range(DRAWS)]
    size = {
        name: math.sqrt(sum(draw[name] for draw in found) / DRAWS)
        for name in ("signal", "noise", "driven", "agnostic")
    }
    shape = {"num_outputs": setting.num_outputs, "input_rank": setting.num_inputs}
    share = surviving_noise(setting.rank, num_tokens=setting.num_tokens, **shape)
    visible = gaussian_noise_bound(setting.noise, delta=DELTA, **shape)
    return Point(
        x=x,
        predicted=math.sqrt(share * setting.num_tokens * setting.num_outputs) * setting.noise,
        d1=min(draw["slack"] for draw in found) * size["driven"],
        d2=recovery_bound(visible, setting.rank, 0.0),
        **size,
    )


def sweeps() -> list[Sweep]:
    """Noise level, tokens, rank."""
    base = Setting()
    levels = [0.003, 0.006, 0.012, 0.025, 0.05, 0.1]
    tokens = [256, 512, 1024, 2048, 4096, 8192]
    ranks = [1, 2, 4, 8, 16]
    return [
        Sweep(
            name="noise level",
            unit="signal",
            points=[point(replace(base, noise=s), s) for s in levels],
        ),
        Sweep(
            name="tokens",
            unit="signal",
            points=[point(replace(base, num_tokens=t), t) for t in tokens],
        ),
        Sweep(
            name="rank",
            unit="noise",
            points=[point(replace(base, rank=r, noise=0.003), r) for r in ranks],
        ),
    ]


def table(sweep: Sweep) -> str:
    """One line per point, and the slopes."""
    kinds = ("driven", "predicted", "agnostic", "d1", "d2")
    heads = ("data-driven", "predicted", "plain SVD", "D1 at worst", "D1 with D2")
    lines = [
        f"error / {sweep.unit} over {sweep.name}",
        f"{sweep.name:>12}" + "".join(f"{head:>14}" for head in heads),
    ]
    columns = [sweep.errors(kind) for kind in kinds]
    for i, found in enumerate(sweep.points):
        lines.append(f"{found.x:>12g}" + "".join(f"{column[i]:>14.4g}" for column in columns))
    lines.append(f"{'slope':>12}" + "".join(f"{sweep.slope(kind):>14.3f}" for kind in kinds))
    return "\n".join(lines)


def verdicts(found: Sequence[Sweep]) -> bool:
    """Print what holds and what does not; whether everything holds."""
    checks = []
    for sweep in found:
        off = sweep.slope("driven") - sweep.slope("predicted")
        checks.append((abs(off) <= TOLERANCE, f"slope over {sweep.name} off by {off:+.3f}"))
        worst = min(p.agnostic / p.driven for p in sweep.points)
        checks.append((worst > 1, f"plain SVD errs {worst:.2f} times as much or more"))
        slack = min(p.d1 / p.driven for p in sweep.points)
        checks.append((slack >= 1, f"D1 is at least {slack:.2f} times the error"))
    for met, text in checks:
        print(f"{'met   ' if met else 'MISSED'} {text}")
    return all(met for met, _ in checks)


def figure(found: Sequence[Sweep]) -> str:
    """The sweeps as a standalone SVG."""
    names = {
        "driven": "fitted to the data",
        "predicted": "first order",
        "agnostic": "plain SVD",
        "d2": f"D1 with D2 (d = {DELTA:g})",
    }
    panels = [
        Panel(
            title=f"error / {sweep.unit}: slope {sweep.slope('driven'):.2f},"
            f" predicted {sweep.slope('predicted'):.2f}",
            label=sweep.name,
            xs=[found.x for found in sweep.points],
            errors={kind: sweep.errors(kind) for kind in names},
        )
        for sweep in found
    ]
    return draw(panels, names)


def main() -> None:
    """Print the tables and the verdicts, write the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--figure", type=Path, help="where to write the SVG")
    arguments = parser.parse_args()
    found = sweeps()
    print("\n\n".join(map(table, found)), end="\n\n")
    if arguments.figure:
        arguments.figure.write_text(figure(found), encoding="utf-8")
    if not verdicts(found):
        sys.exit(1)


if __name__ == "__main__":
    main()
