"""Confidence bounds are tested against brute force, in exact arithmetic, and by repeated draws."""

import math
import random
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import combinations, pairwise, permutations

import pytest
import torch

from lrc_cli.engine import (
    bernstein_mean_bound,
    capital,
    mean_bound,
    quantile_bound,
    quantile_order,
    sequences_needed,
)

MEAN_BOUNDS = {"betting": mean_bound, "bernstein": bernstein_mean_bound}


def binomial_tail(num: int, k: int, chance: Fraction) -> Fraction:
    """Returns P(Bin(num, chance) >= k)."""
    terms = (math.comb(num, j) * chance**j * (1 - chance) ** (num - j) for j in range(k, num + 1))
    return sum(terms, Fraction(0))


def hypergeometric_tail(num: int, k: int, population: int, hits: int) -> Fraction:
    """Returns P(at least k of num drawn are hits)."""
    ways = sum(
        math.comb(hits, j) * math.comb(population - hits, num - j) for j in range(k, num + 1)
    )
    return Fraction(ways, math.comb(population, num))


def smallest(tail: Callable[[int], Fraction], num: int, delta: float) -> int | None:
    return next((k for k in range(1, num + 1) if tail(k) <= Fraction(delta)), None)


def misses_too_often(missed: int, num_draws: int, delta: float) -> bool:
    """Makes the one-sided binomial test at 0.001."""
    terms = (
        math.comb(num_draws, j) * delta**j * (1 - delta) ** (num_draws - j)
        for j in range(missed, num_draws + 1)
    )
    return math.fsum(terms) < 0.001


def quantile_of(population: Sequence[float], share: str) -> float:
    """Returns the smallest value that at least this share of the population does not exceed."""
    return sorted(population)[math.ceil(Fraction(share) * len(population)) - 1]


# ---------------------------------------------------------------- quantiles


@pytest.mark.parametrize(
    ("delta", "needed"), [(0.05, 59), (0.05 / 7, 97), (0.05 / 217, 164), (1 - 0.95, 59)]
)
def test_sequences_needed(delta: float, needed: int) -> None:
    assert sequences_needed(0.95, delta) == needed
    assert quantile_order(needed, 0.95, delta) == needed
    assert quantile_order(needed - 1, 0.95, delta) is None


def test_sequences_needed_is_exact_where_the_power_meets_the_level() -> None:
    assert sequences_needed(0.5, 0.125) == 3
    assert sequences_needed(0.5, 0.1249) == 4
    assert sequences_needed(0.1, 0.9) == 1


@pytest.mark.parametrize("quantile", ["0.5", "0.9", "0.95"])
@pytest.mark.parametrize("delta", [0.3, 0.05, 0.05 / 7])
def test_the_order_is_the_smallest_with_a_small_tail(quantile: str, delta: float) -> None:
    share = Fraction(quantile)
    for num in (1, 2, 5, 20, 59, 60, 97, 130):
        found = quantile_order(num, float(quantile), delta)
        assert found == smallest(lambda k, n=num: binomial_tail(n, k, share), num, delta)


@pytest.mark.parametrize("population", [30, 131, 200])
@pytest.mark.parametrize("quantile", ["0.5", "0.9", "0.95"])
def test_without_replacement_both_tails_are_small(population: int, quantile: str) -> None:
    share, delta = Fraction(quantile), 0.05
    below = math.ceil(share * population) - 1
    for num in (5, 20, 29, 60, 130):
        if num >= population:
            continue
        orders = [
            smallest(lambda k, n=num: binomial_tail(n, k, share), num, delta),
            smallest(lambda k, n=num: hypergeometric_tail(n, k, population, below), num, delta),
        ]
        expected = None if None in orders else max(k for k in orders if k is not None)
        assert quantile_order(num, float(quantile), delta, population) == expected


def test_the_finite_tail_may_ask_for_more_than_the_binomial_one() -> None:
    for num, population, quantile, orders in ((6, 7, 0.3, (2, 3)), (17, 23, 0.7, (12, 13))):
        assert quantile_order(num, quantile, 0.6) == orders[0]
        assert quantile_order(num, quantile, 0.6, population) == orders[1]


@pytest.mark.parametrize("values", [range(9), [0, 0, 0, 1, 1, 2, 2, 2, 2], [0] * 8 + [5]])
def test_over_all_draws_the_quantile_is_missed_rarely_enough(values: Sequence[float]) -> None:
    """Every subset of a small population: the miss probability, exactly."""
    certified = 0
    for num in range(2, 9):
        for quantile, delta in (("0.5", 0.2), ("0.3", 0.05), ("0.7", 0.25)):
            bounds = [
                quantile_bound(drawn, quantile=float(quantile), delta=delta, population=len(values))
                for drawn in combinations(values, num)
            ]
            if bounds[0] is None:
                continue
            certified += 1
            target = quantile_of(values, quantile)
            missed = sum(bound is None or bound < target for bound in bounds)
            assert missed <= delta * len(bounds)
    assert certified > 10


def test_a_bound_is_a_drawn_value_and_none_where_the_largest_does_not_serve() -> None:
    values = [float((7 * i) % 59) for i in range(59)]
    assert quantile_bound(values, quantile=0.95, delta=0.05) == 58.0
    assert quantile_bound(values[:58], quantile=0.95, delta=0.05) is None
    assert quantile_bound([], quantile=0.95, delta=0.05) is None
    assert quantile_bound(values, quantile=0.5, delta=0.05, population=1000) in values


def test_more_draws_and_more_risk_lower_the_order_s_share() -> None:
    shares = [(quantile_order(num, 0.9, 0.05) or num) / num for num in (50, 200, 800, 3200)]
    assert all(a > b for a, b in pairwise(shares)) and shares[-1] < 0.92
    orders = [quantile_order(200, 0.9, delta) or 201 for delta in (1e-9, 1e-4, 0.05, 0.3)]
    assert all(a > b for a, b in pairwise(orders))


def test_a_census_gives_the_quantile_and_the_mean_themselves() -> None:
    values = [math.sin(i) ** 2 for i in range(20)]
    assert quantile_bound(values, quantile=0.9, delta=0.05, population=20) == quantile_of(
        values, "0.9"
    )
    found = mean_bound(values, lower=0, upper=1, delta=0.05, population=20)
    assert found == pytest.approx(sum(values) / 20, abs=1e-15)


# ---------------------------------------------------------------- means


def reference_capital(
    values: Sequence[float], mean: float, delta: float, population: int | None
) -> float:
    """Returns the capital by its definition in whole arrays, for values in [0, 1]."""
    y = torch.tensor(values, dtype=torch.float64)
    num = len(y)
    i = torch.arange(1, num + 1, dtype=torch.float64)
    before = y.cumsum(0) - y
    left = (population * mean - before) / (population - i + 1) if population else mean + 0 * y
    averages = (0.5 + y.cumsum(0)) / (i + 1)
    squares = (y - averages) ** 2
    variances = (0.25 + squares.cumsum(0) - squares) / i
    bets = (2 * math.log(1 / delta) / (num * variances)).sqrt().minimum(0.5 / (1 - left))
    return max(1.0, (1 + bets * (left - y)).cumprod(0).max().item())


@pytest.mark.parametrize("population", [None, 40, 400])
def test_the_capital_is_what_its_formula_says(population: int | None) -> None:
    chance = random.Random(0)
    values = [chance.random() for _ in range(30)]
    for mean in (0.4, 0.5, 0.61, 0.7):
        expected = reference_capital(values, mean, 0.05, population)
        found = capital(values, mean, lower=0, upper=1, delta=0.05, population=population)
        assert found == pytest.approx(expected, rel=1e-12)
    scaled = [3 * value - 1 for value in values]
    found = capital(scaled, 3 * 0.7 - 1, lower=-1, upper=2, delta=0.05, population=population)
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("population", [None, 25, 1000])
def test_the_capital_does_not_decrease_in_the_mean(population: int | None) -> None:
    chance = random.Random(1)
    for power in (0.2, 1, 6):
        values = [chance.random() ** power for _ in range(24)]
        capitals = [
            capital(values, i / 200, lower=0, upper=1, delta=0.05, population=population)
            for i in range(201)
        ]
        assert all(a <= b for a, b in pairwise(capitals)) and capitals[-1] > 20


@pytest.mark.parametrize("population", [None, 100, 5000])
def test_the_bound_is_where_the_capital_reaches_its_level(population: int | None) -> None:
    chance = random.Random(2)
    values = [2 + chance.random() for _ in range(80)]
    limits = {"lower": 2.0, "upper": 4.0, "delta": 0.01}
    bound = mean_bound(values, **limits, population=population)
    assert capital(values, bound, **limits, population=population) >= 100
    assert capital(values, bound - 1e-6, **limits, population=population) < 100


@pytest.mark.parametrize("delta", [0.1, 0.3])
@pytest.mark.parametrize(
    "values", [[0, 0, 0, 0, 0, 1], [0, 0, 0, 1, 1, 1], [0, 0.1, 0.2, 0.4, 0.9, 1], [1] * 6]
)
def test_over_all_ordered_draws_the_mean_is_missed_rarely_enough(
    values: list[float], delta: float
) -> None:
    """Every order of a small population: the miss probability, exactly."""
    target = sum(values) / len(values)
    for bound in MEAN_BOUNDS.values():
        for num in (1, 3, 5):
            draws = list(permutations(values, num))
            missed = sum(
                bound(drawn, lower=0, upper=1, delta=delta, population=6) < target - 1e-9
                for drawn in draws
            )
            assert missed <= delta * len(draws)


def population_of(name: str, size: int) -> list[float]:
    """Returns values in [0, 1] of very different shapes."""
    chance = random.Random(7)
    make: dict[str, Callable[[], float]] = {
        "uniform": chance.random,
        "two-point": lambda: float(chance.random() < 0.04),
        "mostly-one": lambda: float(chance.random() < 0.9),
        "heavy": lambda: min(1.0, 0.02 * chance.paretovariate(1.1)),
        "narrow": lambda: 0.3 + 0.01 * chance.random(),
    }
    return [make[name]() for _ in range(size)]


@pytest.mark.parametrize("name", ["uniform", "two-point", "mostly-one", "heavy", "narrow"])
def test_drawn_again_and_again_the_bounds_hold(name: str) -> None:
    delta, num_draws, chance = 0.1, 200, random.Random(11)
    for size, num, replace in ((60, 40, False), (500, 40, False), (500, 40, True)):
        population = population_of(name, size)
        known = None if replace else size
        targets = {
            "betting": sum(population) / size,
            "bernstein": sum(population) / size,
            "quantile": quantile_of(population, "0.9"),
        }
        missed = dict.fromkeys(targets, 0)
        for _ in range(num_draws):
            drawn = chance.choices(population, k=num) if replace else chance.sample(population, num)
            bounds = {
                kind: bound(drawn, lower=0, upper=1, delta=delta, population=known)
                for kind, bound in MEAN_BOUNDS.items()
            }
            high = quantile_bound(drawn, quantile=0.9, delta=delta, population=known)
            assert high is not None
            bounds["quantile"] = high
            for kind, bound in bounds.items():
                missed[kind] += bound < targets[kind] - 1e-12
        for kind, count in missed.items():
            assert not misses_too_often(count, num_draws, delta), (kind, size, count)


def test_that_check_finds_a_bound_that_does_not_hold() -> None:
    population, chance = population_of("uniform", 500), random.Random(11)
    target = sum(population) / 500
    missed = sum(sum(chance.sample(population, 40)) / 40 < target for _ in range(400))
    assert misses_too_often(missed, 400, 0.1)


@pytest.mark.parametrize("bound", MEAN_BOUNDS.values(), ids=MEAN_BOUNDS)
def test_less_risk_widens_and_more_values_narrow(bound: Callable[..., float]) -> None:
    values = population_of("uniform", 4000)
    risks = [
        bound(values[:400], lower=0, upper=1, delta=delta, population=4000)
        for delta in (0.3, 0.05, 0.05 / 7, 1e-6)
    ]
    assert all(a < b for a, b in pairwise(risks))
    widths = [
        bound(values[:num], lower=0, upper=1, delta=0.05, population=4000) - sum(values[:num]) / num
        for num in (100, 400, 1600)
    ]
    assert all(a > b for a, b in pairwise(widths))


@pytest.mark.parametrize("bound", MEAN_BOUNDS.values(), ids=MEAN_BOUNDS)
def test_a_bound_lies_between_the_mean_and_the_upper_limit(bound: Callable[..., float]) -> None:
    # With zeros first the gambler wins early, but what comes later must count.
    cases = ([0.0] * 40 + [1.0] * 40, [1.0] * 30, [0.0] * 30, [0.5], [1.0, 0.0])
    for values in cases:
        for population in (None, len(values), 100, 10**6):
            found = bound(values, lower=0, upper=1, delta=0.2, population=population)
            assert sum(values) / len(values) <= found <= 1.0


def test_betting_is_narrower_than_bernstein_and_knows_the_variance() -> None:
    widths = {}
    for name in ("uniform", "narrow", "two-point"):
        values = population_of(name, 1000)[:128]
        options = {"lower": 0, "upper": 1, "delta": 0.05, "population": 1000}
        average = sum(values) / len(values)
        widths[name] = mean_bound(values, **options) - average
        assert widths[name] < 0.6 * (bernstein_mean_bound(values, **options) - average)
    assert widths["narrow"] < 0.7 * widths["uniform"]


def test_bernstein_s_terms() -> None:
    values = population_of("uniform", 100)
    spread = torch.tensor(values, dtype=torch.float64)
    average, log = spread.mean().item(), math.log(2 / 0.05)
    found = bernstein_mean_bound(values, lower=0, upper=2, delta=0.05)
    expected = math.sqrt(2 * spread.var().item() * log / 100) + 14 * log / (3 * 99)
    assert found == pytest.approx(average + expected, rel=1e-12)
    log, kappa = math.log(5 / 0.05), 7 / 3 + 3 / math.sqrt(2)
    for population, rho in ((1000, 1 - 99 / 1000), (125, (1 - 100 / 125) * 1.01)):
        found = bernstein_mean_bound(values, lower=0, upper=2, delta=0.05, population=population)
        deviation = spread.var(correction=0).sqrt().item()
        expected = deviation * math.sqrt(2 * rho * log / 100) + kappa * 2 * log / 100
        assert found == pytest.approx(average + expected, rel=1e-12)


@pytest.mark.parametrize("bound", MEAN_BOUNDS.values(), ids=MEAN_BOUNDS)
def test_means_shift_and_scale_with_their_values(bound: Callable[..., float]) -> None:
    values = population_of("heavy", 60)
    plain = bound(values, lower=0, upper=1, delta=0.05, population=300)
    moved = [5 * value - 2 for value in values]
    found = bound(moved, lower=-2, upper=3, delta=0.05, population=300)
    assert found == pytest.approx(5 * plain - 2, rel=1e-8)


@pytest.mark.parametrize("bound", MEAN_BOUNDS.values(), ids=MEAN_BOUNDS)
def test_without_values_only_the_limit_is_known(bound: Callable[..., float]) -> None:
    assert bound([], lower=0, upper=3, delta=0.05) == 3
    assert bound([0.0, 0.0], lower=0, upper=0, delta=0.05) == 0
    for values, options, text in (
        ([0.5, 1.5], {"delta": 0.1}, "not in"),
        ([math.nan], {"delta": 0.1}, "not in"),
        ([0.5], {"delta": 0.0}, "between 0 and 1"),
        ([0.5, 0.5], {"delta": 0.1, "population": 1}, "population of 1"),
    ):
        with pytest.raises(ValueError, match=text):
            bound(values, lower=0, upper=1, **options)


def test_shares_and_draws_that_make_no_sense() -> None:
    for call in (
        lambda: sequences_needed(1.0, 0.05),
        lambda: quantile_order(10, 0.95, 1.5),
        lambda: quantile_order(10, 0.95, 0.05, population=9),
        lambda: quantile_bound([math.nan], quantile=0.5, delta=0.5),
        lambda: capital([0.5], 0.5, lower=1, upper=1, delta=0.05),
    ):
        with pytest.raises(ValueError):
            call()


def test_quantiles_near_one_take_no_time() -> None:
    """Powers of fractions would take hours; the smallest N is where b^N reaches the risk."""
    needed = sequences_needed(0.9999999, 0.05 / 7)
    assert needed * math.log1p(-1e-7) <= math.log(0.05 / 7) < (needed - 1) * math.log1p(-1e-7)
    assert sequences_needed(0.5, 0.25) == 2
