"""This script counts how often the certificate's bounds miss: a table of docs/benchmarks.md.

    .venv/bin/python scripts/coverage.py                 1000 draws
    .venv/bin/python scripts/coverage.py --draws 5000

Some sequences are drawn without replacement, again and again, from a population of sequences whose
tokens are strongly correlated (a sequence effect and noise). The script exits with 1 if any bound
misses more often than its nominal level allows (one-sided binomial test). It also exits with 1 if
the naive token-wise normal interval, shown beside the bounds, does not miss more often: then the
run would prove nothing.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lrc_cli.engine import bernstein_mean_bound, mean_bound, quantile_bound

POPULATION, DRAWN, TOKENS, LAYERS = 1000, 128, 64, 24
DELTA, QUANTILE = 0.05, 0.95
SIGNIFICANCE = 0.001
"""The level of the binomial test: a smaller p-value says that a bound misses too often."""
MIN_DRAWS, MIN_CORRELATION = 500, 0.5

Bound = Callable[[Tensor], float]
"""A function from drawn values, (DRAWN, TOKENS) or (DRAWN,), to an upper bound."""


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """A quantity that every sequence of the population has."""

    name: str
    tokens: Tensor
    """The values, (POPULATION, TOKENS) float64; (POPULATION, 1) if a sequence has one value."""
    upper: float
    lower: float = 0.0
    """Limits of a token's value."""

    @property
    def correlation(self) -> float:
        """The intra-sequence correlation, from a one-way analysis of variance."""
        num = self.tokens.shape[1]
        within = self.tokens.var(dim=1).mean().item()
        between = self.tokens.mean(dim=1).var().item()
        effect = between - within / num
        return effect / (effect + within)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One bound of one quantity, and how it did."""

    quantity: str
    bound: str
    target: float
    found: list[float] = field(default_factory=list)
    must_fail: bool = False
    """The naive interval is there to be seen failing."""

    @property
    def missed(self) -> int:
        """The number of bounds below the target."""
        return sum(bound < self.target - 1e-12 for bound in self.found)

    @property
    def p_value(self) -> float:
        """P(at least that many misses) if each had the probability DELTA."""
        return binomial_tail(len(self.found), self.missed, DELTA)

    @property
    def misses_more(self) -> bool:
        """Whether the misses are more than nominal beyond chance."""
        return self.p_value < SIGNIFICANCE

    @property
    def is_as_it_should(self) -> bool:
        """A bound holds; the naive interval does not."""
        return self.misses_more == self.must_fail


def binomial_tail(num: int, at_least: int, chance: float) -> float:
    """P(Bin(num, chance) >= at_least)."""
    logs = (
        math.lgamma(num + 1) - math.lgamma(j + 1) - math.lgamma(num - j + 1)
        + j * math.log(chance) + (num - j) * math.log1p(-chance)
        for j in range(at_least, num + 1)
    )  # fmt: skip
    return min(1.0, math.fsum(map(math.exp, logs)))


def make_population(seed: int) -> tuple[list[Quantity], Quantity]:
    """Three token-wise quantities, and the largest of the layers' errors per sequence."""
    chance = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=chance, dtype=torch.float64)

    # Disagreement, 0 or 1: each sequence has its own chance of it, near 0 or near 1.
    rate = torch.sigmoid(4 * noise(POPULATION, 1) - 4)
    uniform = torch.rand(POPULATION, TOKENS, generator=chance, dtype=torch.float64)
    disagrees = (uniform < rate).to(torch.float64)
    # Divergence: heavy between sequences, clipped where the certificate would clip.
    divergence = (0.1 * torch.exp(noise(POPULATION, 1) + 0.5 * noise(POPULATION, TOKENS))).clamp(
        max=1.0
    )
    # A difference of losses may have either sign, and is limited on both sides.
    difference = (0.1 + 0.3 * noise(POPULATION, 1) + 0.2 * noise(POPULATION, TOKENS)).clamp(-1, 1)
    errors = torch.exp(0.5 * noise(POPULATION, 1) + 0.3 * noise(POPULATION, LAYERS))
    worst = errors.amax(dim=1, keepdim=True)
    return [
        Quantity(name="top-1 disagreement", tokens=disagrees, upper=1.0),
        Quantity(name="KL, clipped", tokens=divergence, upper=1.0),
        Quantity(name="loss difference, clipped", tokens=difference, lower=-1.0, upper=1.0),
    ], Quantity(name="all layers at once", tokens=worst, upper=math.inf)


def betting(quantity: Quantity, delta: float = DELTA) -> Bound:
    """The certificate's bound of a mean."""
    limits = {"lower": quantity.lower, "upper": quantity.upper, "delta": delta}
    return lambda drawn: mean_bound(drawn.mean(dim=1).tolist(), **limits, population=POPULATION)


def bernstein(quantity: Quantity) -> Bound:
    """The classical bound of a mean, to compare widths with."""
    limits = {"lower": quantity.lower, "upper": quantity.upper, "delta": DELTA}
    return lambda drawn: bernstein_mean_bound(
        drawn.mean(dim=1).tolist(), **limits, population=POPULATION
    )


def order_statistic(drawn: Tensor, delta: float = DELTA) -> float:
    """The certificate's bound of a quantile."""
    found = quantile_bound(
        drawn.mean(dim=1).tolist(), quantile=QUANTILE, delta=delta, population=POPULATION
    )
    assert found is not None, "too few sequences for any statement"
    return found


def all_at_once(jobs: list[tuple[Row, Tensor, Bound]], drawn: Tensor) -> float:
    """The least that a bound is above its target; each has its share of delta."""
    return min(bound(tokens[drawn]) - row.target for row, tokens, bound in jobs)


def tokenwise(drawn: Tensor) -> float:
    """The normal bound of the mean, as if tokens were independent, which nobody must use."""
    deviation = drawn.std().item() / math.sqrt(drawn.numel())
    return drawn.mean().item() + statistics.NormalDist().inv_cdf(1 - DELTA) * deviation


def measure(num_draws: int, seed: int = 0) -> tuple[list[Quantity], list[Row]]:
    """Draw again and again, and apply every bound to each draw."""
    per_token, worst = make_population(seed)
    share = DELTA / (2 * len(per_token) + 1)
    jobs: list[tuple[Row, Tensor, Bound]] = []
    stated: list[tuple[Row, Tensor, Bound]] = []
    for quantity in (*per_token, worst):
        name, tokens = quantity.name, quantity.tokens
        values = tokens.mean(dim=1)
        high = values.sort().values[math.ceil(QUANTILE * POPULATION) - 1].item()
        average = values.mean().item()
        if quantity is not worst:
            row = Row(quantity=name, bound="mean, betting", target=average)
            jobs.append((row, tokens, betting(quantity)))
            stated.append((row, tokens, betting(quantity, share)))
            row = Row(quantity=name, bound="mean, Bernstein", target=average)
            jobs.append((row, tokens, bernstein(quantity)))
            row = Row(quantity=name, bound="mean, token-wise", target=average, must_fail=True)
            jobs.append((row, tokens, tokenwise))
        row = Row(quantity=name, bound=f"{QUANTILE:g} quantile", target=high)
        jobs.append((row, tokens, order_statistic))
        stated.append((row, tokens, partial(order_statistic, delta=share)))
    together = Row(quantity=f"{len(stated)} statements", bound="all of them hold", target=0.0)
    chance = torch.Generator().manual_seed(seed + 1)
    for _ in range(num_draws):
        drawn = torch.randperm(POPULATION, generator=chance)[:DRAWN]
        for row, tokens, bound in jobs:
            row.found.append(bound(tokens[drawn]))
        together.found.append(all_at_once(stated, drawn))
    return per_token, [*(row for row, _, _ in jobs), together]


def measure_certificate(file: Path, num_draws: int, seed: int = 0) -> list[Row]:
    """Draw half of the values of a certificate again and again: they are a population of their own.

    The limits are the certificate's, and so is the quantile. Each statement alone has DELTA, and
    all together share it.
    """
    certificate = json.loads(file.read_text(encoding="utf-8"))["certificate"]
    values = {k: torch.tensor(x) for k, x in certificate["values"].items() if k != "layers"}
    size, quantile = certificate["num_sequences"], certificate["quantile"]
    jobs: list[tuple[Row, Tensor, Callable[[list[float], float], float | None]]] = []
    for name, found in values.items():
        limit = certificate["clips"].get(name, 1.0)
        lower = -limit if name == "loss_difference" else 0.0
        clipped = found.double().clamp(lower, limit)
        bound = partial(_mean_of, lower=lower, upper=limit, population=size)
        row = Row(quantity=name, bound="mean, betting", target=clipped.mean().item())
        jobs.append((row, clipped, bound))
        high = found.double().sort().values[math.ceil(quantile * size) - 1].item()
        row = Row(quantity=name, bound=f"{quantile:g} quantile", target=high)
        jobs.append(
            (row, found.double(), partial(_quantile_of, quantile=quantile, population=size))
        )
    together = Row(quantity=f"{len(jobs)} statements", bound="all of them hold", target=0.0)
    chance = torch.Generator().manual_seed(seed)
    for _ in range(num_draws):
        drawn = torch.randperm(size, generator=chance)[: size // 2]
        margins = []
        for row, found, bound in jobs:
            sample = found[drawn].tolist()
            alone, shared = bound(sample, DELTA), bound(sample, DELTA / len(jobs))
            # Where too few were drawn for a quantile nothing is stated, and nothing is missed.
            row.found.append(math.inf if alone is None else alone)
            margins.append(math.inf if shared is None else shared - row.target)
        together.found.append(min(margins))
    return [*(row for row, _, _ in jobs), together]


def _mean_of(sample: list[float], delta: float, **limits: float) -> float:
    return mean_bound(sample, delta=delta, **limits)  # type: ignore[arg-type]


def _quantile_of(
    sample: list[float], delta: float, *, quantile: float, population: int
) -> float | None:
    return quantile_bound(sample, quantile=quantile, delta=delta, population=population)


def table(rows: list[Row]) -> str:
    """The rows as Markdown."""
    lines = [
        "| quantity | bound | truth | miss rate | nominal | p-value | median width | verdict |",
        "|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        width = statistics.median(row.found) - row.target
        verdict = "misses more" if row.misses_more else "holds"
        rate = f"{row.missed / len(row.found):.1%}"
        lines.append(
            f"| {row.quantity} | {row.bound} | {row.target:.4f} | {rate} | {DELTA:.0%}"
            f" | {row.p_value:.2g} | {width:.4f} | {verdict} |"
        )
    return "\n".join(lines)


def verdict(quantities: list[Quantity], rows: list[Row]) -> int:
    """The exit code: 0 if everything is as it should be; says on stderr what is not."""
    code = 0
    for quantity in quantities:
        if quantity.correlation < MIN_CORRELATION:
            print(f"{quantity.name}: tokens are not correlated enough", file=sys.stderr)
            code = 1
    for row in rows:
        if not row.is_as_it_should:
            what = "does not fail" if row.must_fail else "misses more than nominal"
            print(f"{row.quantity}: {row.bound} {what}", file=sys.stderr)
            code = 1
    return code


def number_of_draws(text: str) -> int:
    """An argument: fewer draws would not tell a bound that holds from one that does not."""
    if int(text) < MIN_DRAWS:
        raise argparse.ArgumentTypeError(f"at least {MIN_DRAWS} draws are needed")
    return int(text)


def main() -> None:
    """Draw, print the table and exit with the verdict."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--draws", type=number_of_draws, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--certificate", type=Path, help="draw from the values of a certificate.json instead"
    )
    arguments = parser.parse_args()
    if arguments.certificate is not None:
        rows = measure_certificate(arguments.certificate, arguments.draws, arguments.seed)
        print(table(rows))
        sys.exit(verdict([], rows))
    quantities, rows = measure(arguments.draws, arguments.seed)
    print(
        f"{arguments.draws} draws of {DRAWN} of {POPULATION} sequences of {TOKENS} tokens,"
        f" without replacement; {LAYERS} layers; delta {DELTA:g}."
    )
    for quantity in quantities:
        print(f"Intra-sequence correlation of {quantity.name}: {quantity.correlation:.2f}")
    print(f"\n{table(rows)}")
    sys.exit(verdict(quantities, rows))


if __name__ == "__main__":
    main()
