"""Verification's own tails, orders and betting bounds."""

import math
from fractions import Fraction
from typing import Any

import pytest
import torch

from lrc_cli.verify.files.confidence_bounds import (
    binomial_tail,
    hypergeometric_tail,
    is_needed,
    log_capital,
    mean_problem,
    smallest_order,
)


def test_tails_are_sums_over_all_draws() -> None:
    share = Fraction(3, 10)
    ways = [math.comb(6, k) * share**k * (1 - share) ** (6 - k) for k in range(7)]
    assert [binomial_tail(6, share, k) for k in range(7)] == [sum(ways[k:]) for k in range(7)]
    assert hypergeometric_tail(2, 3, 5, 2) == Fraction(3, 10)
    assert hypergeometric_tail(3, 2, 9, 3) == 0


@pytest.mark.parametrize(
    ("drawn", "delta", "order"),
    [(58, 0.05, None), (59, 0.05, 59), (92, 0.05, 92), (93, 0.05, 92), (128, 0.05, 126)],
)
def test_the_smallest_order_that_serves(drawn: int, delta: float, order: int | None) -> None:
    assert smallest_order(drawn, 0.95, delta, 10**9) == order


def test_how_many_are_needed() -> None:
    wanted = {0.05: 59, 0.05 / 7: 97, 0.05 / 217: 164}
    for delta, number in wanted.items():
        assert is_needed(number, 0.95, delta)
        assert not is_needed(number - 1, 0.95, delta) and not is_needed(number + 1, 0.95, delta)


def test_betting_bounds_cover_and_wrong_bounds_are_found() -> None:
    generator = torch.Generator().manual_seed(3)
    population = torch.rand(200, generator=generator).square()
    mean = population.mean().item()
    misses = 0
    for _ in range(100):
        drawn = population[torch.randperm(200, generator=generator)[:60]].tolist()
        limits: dict[str, Any] = {"lower": 0.0, "upper": 1.0, "delta": 0.1, "population": 200}
        misses += log_capital(drawn, mean, **limits) >= -math.log(0.1)
        low, high = sum(drawn) / 60, 1.0
        while high - low > 1e-9:
            middle = (low + high) / 2
            rejected = log_capital(drawn, middle, **limits) >= -math.log(0.1)
            low, high = (low, middle) if rejected else (middle, high)
        assert mean_problem(drawn, high, **limits) is None
        assert mean_problem(drawn, high * 0.999, **limits) is not None
        assert mean_problem(drawn, min(high * 1.01, 0.999), **limits) is not None
    assert misses <= 18  # of 100 at a risk of 0.1: more has a probability below 0.01
