"""The certificate's mathematics is done once more from its definitions (docs/theory.md), exactly.

Binomial and hypergeometric tails are sums of whole numbers. The betting capital is a sum of
logarithms. Nothing here is shared with `engine/bounds.py`.
"""

import math
from collections.abc import Sequence
from decimal import Decimal, localcontext
from fractions import Fraction
from functools import lru_cache


@lru_cache(maxsize=4096)
def binomial_tail(num_drawn: int, share: Fraction, order: int) -> Fraction:
    """Returns P(Bin(num_drawn, share) >= order)."""
    hit, miss = share.numerator, share.denominator - share.numerator
    ways = (
        math.comb(num_drawn, j) * hit**j * miss ** (num_drawn - j)
        for j in range(order, num_drawn + 1)
    )
    return Fraction(sum(ways), share.denominator**num_drawn)


@lru_cache(maxsize=4096)
def hypergeometric_tail(num_drawn: int, below: int, population: int, order: int) -> Fraction:
    """Returns P(at least `order` of `num_drawn` are among the `below` low of `population`)."""
    ways = (
        math.comb(below, j) * math.comb(population - below, num_drawn - j)
        for j in range(order, min(num_drawn, below) + 1)
    )
    return Fraction(sum(ways), math.comb(population, num_drawn))


def exact(share: float) -> Fraction:
    """Returns the decimal that was written: 0.95 is 19/20."""
    return Fraction(repr(share))


def order_serves(
    order: int, num_drawn: int, quantile: float, delta: float, population: int
) -> bool:
    """Returns whether the order-th smallest of the drawn values bounds the quantile at risk delta.

    The bound fails where `order` drawn values lie below the population's quantile. At most
    ceil(quantile P) - 1 of the P values do. Both the binomial and the hypergeometric probability of
    a failure must be at most delta.
    """
    share = exact(quantile)
    low = math.ceil(share * population) - 1
    if num_drawn == population:
        return order > low
    risk = Fraction(delta)
    return (
        binomial_tail(num_drawn, share, order) <= risk
        and hypergeometric_tail(num_drawn, low, population, order) <= risk
    )


def smallest_order(num_drawn: int, quantile: float, delta: float, population: int) -> int | None:
    """Returns the smallest order that serves, None where none does.

    It is found by bisection, because tails fall with the order.
    """
    if not num_drawn or not order_serves(num_drawn, num_drawn, quantile, delta, population):
        return None
    low, high = 0, num_drawn
    while high - low > 1:
        middle = (low + high) // 2
        serves = order_serves(middle, num_drawn, quantile, delta, population)
        low, high = (low, middle) if serves else (middle, high)
    return high


def is_needed(num: int, quantile: float, delta: float) -> bool:
    """Returns whether `num` is the smallest N with quantile^N <= delta."""
    with localcontext(prec=60):
        step, limit = Decimal(repr(quantile)).ln(), Decimal(delta).ln() + Decimal("1e-40")
        return num >= 1 and num * step <= limit and (num == 1 or (num - 1) * step > limit)


def log_capital(
    values: Sequence[float],
    mean: float,
    *,
    lower: float,
    upper: float,
    delta: float,
    population: int,
) -> float:
    """Returns log of the most that betting against means as large as `mean` makes of a stake of 1.

    Waudby-Smith & Ramdas 2020, without replacement, with y in [0, 1] and m in its unit. Before draw
    i the values left have the mean mu = (P m - what was drawn) / (P - i + 1). The bet is min(sqrt(2
    ln(1/delta) / (N s2)), 1 / (2 (1 - mu))), with s2 = (1/4 + sum of (y_j - ybar_j)^2) / i over the
    draws before, and ybar_j = (1/2 + y_1 + ... + y_j) / (j + 1). The stake is multiplied by 1 + bet
    (mu - y). It becomes infinite where mu is above 1, and stays as it is where mu is below 0.
    """
    width = upper - lower
    y = [(value - lower) / width for value in values]
    m = (mean - lower) / width
    spread, logarithm, best = 0.25, 0.0, 0.0
    for i in range(1, len(y) + 1):
        drawn = math.fsum(y[: i - 1])
        if i > 1:
            spread += (y[i - 2] - (0.5 + drawn) / i) ** 2
        mu = (population * m - drawn) / (population - i + 1)
        if mu > 1:
            return math.inf
        if mu < 0:
            return best
        bet = math.sqrt(2 * math.log(1 / delta) * i / (len(y) * spread))
        bet = bet if mu == 1 else min(bet, 0.5 / (1 - mu))
        logarithm += math.log1p(bet * (mu - y[i - 1]))
        best = max(best, logarithm)
    return best


def mean_problem(
    values: Sequence[float],
    bound: float,
    *,
    lower: float,
    upper: float,
    delta: float,
    population: int,
) -> str | None:
    """Returns what is wrong with an upper confidence bound of a mean; None where it is right.

    A bound is right if the capital against it reaches 1 / delta, and the capital against a mean a
    little below does not. The upper limit is right too, and so is the mean of a population that was
    drawn whole.
    """
    average = math.fsum(values) / len(values)
    width = upper - lower
    slack = 1e-6 * width
    if len(values) == population:
        return None if abs(bound - average) <= 1e-9 * width else f"the whole mean is {average}"
    if bound < average - 1e-9 * width:
        return f"{bound} is below the mean of what was drawn, {average}"

    def rejected(mean: float) -> bool:
        limits = {"lower": lower, "upper": upper, "delta": delta, "population": population}
        return log_capital(values, mean, **limits) >= -math.log(delta)  # type: ignore[arg-type]

    if bound < upper and not rejected(bound + slack):
        return f"larger means than {bound} are not rejected"
    if bound - slack > average and rejected(bound - slack):
        return f"{bound} is too large: smaller means are rejected as well"
    return None
