"""A random draw of sequences gives upper confidence bounds of a quantile and of a mean.

The draw counts sequences, never tokens. Every bound holds with probability 1 - delta over the
draw, for any population. `population` is the size of the population where sequences are drawn
uniformly without replacement, and None where draws are independent. Orders are found in exact
arithmetic.
"""

import math
from collections.abc import Iterator, Sequence
from decimal import Decimal, localcontext
from fractions import Fraction
from itertools import accumulate

BISECTION_WIDTH = 1e-10
"""The width at which the bisection of a mean bound ends, as a share of the values' interval."""
_KAPPA = 7 / 3 + 3 / math.sqrt(2)


def sequences_needed(quantile: float, delta: float) -> int:
    """The smallest N with quantile^N <= delta. From fewer values even the largest bounds nothing.

    Raises:
        ValueError: `quantile` or `delta` is not between 0 and 1.
    """
    _check_shares(quantile, delta)
    with localcontext(prec=60):
        # Powers of fractions would take minutes for quantiles near 1. The last digits are rounding.
        exact = Decimal(delta).ln() / Decimal(repr(float(quantile))).ln()
        return max(1, math.ceil(exact - Decimal("1e-40")))


def quantile_order(
    num_drawn: int, quantile: float, delta: float, population: int | None = None
) -> int | None:
    """The order of the drawn value that bounds the population's quantile; None: too few draws.

    The population's quantile is the smallest value that at least the share `quantile` of the
    population does not exceed. The k-th smallest of N drawn values misses the quantile only if k
    drawn values lie below it. For independent draws this has at most the probability
    P(Bin(N, quantile) >= k). Without replacement it has at most P(H >= k), H hypergeometric,
    because ceil(quantile P) - 1 of the P values can lie below. With a population both tails must be
    at most delta: the larger k is taken, so the statement also holds for independent draws. A
    population that was drawn whole needs no probability: k = ceil(quantile P).

    Returns:
        The smallest such k, counted from 1, or None.

    Raises:
        ValueError: `quantile` or `delta` is not between 0 and 1, or more were drawn than there are.
    """
    _check_shares(quantile, delta)
    _check_population(num_drawn, population)
    if num_drawn == 0:
        return None
    share, risk = _exact(quantile), Fraction(delta)
    if population is None:
        return _binomial_order(num_drawn, share, risk)
    if population == num_drawn:
        return math.ceil(share * population)
    independent = _binomial_order(num_drawn, share, risk)
    finite = _hypergeometric_order(num_drawn, share, population, risk)
    return None if independent is None or finite is None else max(independent, finite)


def quantile_bound(
    values: Sequence[float], *, quantile: float, delta: float, population: int | None = None
) -> float | None:
    """An upper confidence bound of the population's quantile: the `quantile_order`-th smallest.

    Nothing is assumed about the values but the draw. None: too few values were drawn.

    Raises:
        ValueError: as `quantile_order`, or a value is not a number.
    """
    if any(math.isnan(value) for value in values):
        raise ValueError("a value is not a number")
    order = quantile_order(len(values), quantile, delta, population)
    return None if order is None else sorted(values)[order - 1]


def mean_bound(
    values: Sequence[float],
    *,
    lower: float,
    upper: float,
    delta: float,
    population: int | None = None,
) -> float:
    """An upper confidence bound of the population's mean, by betting (see `capital`).

    "The mean is m" is rejected where its capital reaches 1 / delta. If the mean is m, this has at
    most the probability delta, by Ville's inequality. The capital does not decrease in m, so
    bisection finds the smallest rejected mean, to `BISECTION_WIDTH` of upper - lower and rounded
    up. The bound is never below the mean of the drawn values. It is `upper` where nothing smaller
    is rejected, and the exact mean where the whole population was drawn.

    Args:
        values: the drawn values, in [lower, upper], in the order of the draw.
        lower: a limit that was known before the draw, as is `upper`.
        population: number of sequences drawn from, without replacement; None: independent draws.

    Raises:
        ValueError: a value is outside its limits, `delta` is not between 0 and 1, or more were
            drawn than there are.
    """
    units = _to_unit(values, lower, upper, population)
    _check_shares(delta)
    if not units or upper == lower:
        return upper
    average = math.fsum(values) / len(values)
    if population == len(values):
        return average
    # A mean is rejected where a gambler against it has won enough.
    bets = _bets(units, delta)

    def rejected(mean: float) -> bool:
        return _capital(units, bets, mean, population) >= 1 / delta

    # Bisection finds the smallest rejected mean between the drawn values' mean and the limit.
    low, high = math.fsum(units) / len(units), 1.0
    if not rejected(high):
        return upper
    while high - low > BISECTION_WIDTH:
        middle = (low + high) / 2
        low, high = (low, middle) if rejected(middle) else (middle, high)
    return min(upper, max(average, lower + (upper - lower) * high))


def capital(
    values: Sequence[float],
    mean: float,
    *,
    lower: float,
    upper: float,
    delta: float,
    population: int | None = None,
) -> float:
    """The largest capital that bets against means as large as `mean` make from a stake of 1.

    Waudby-Smith & Ramdas 2020, "Estimating means of bounded random variables by betting" (and
    "Confidence sequences for sampling without replacement"). With y = (x - lower) /
    (upper - lower), m the mean in that unit, N the number of values and P the population:

        mu_i     = (P m - sum_{j<i} y_j) / (P - i + 1), the mean of what is left; m where P is None
        ybar_j   = (0.5 + sum_{k<=j} y_k) / (j + 1)
        s2_{i-1} = (0.25 + sum_{j<i} (y_j - ybar_j)^2) / i
        lambda_i = sqrt(2 ln(1/delta) / (N s2_{i-1}))
        b_i      = min(lambda_i, 0.5 / (1 - mu_i)), lambda_i where mu_i = 1
        K_t      = prod_{i<=t} (1 + b_i (mu_i - y_i))

    The function returns max over t of K_t. If m is the mean, y_i has the expectation mu_i given the
    values before, and b_i depends on these values alone. So K is a martingale, and
    b_i (1 - mu_i) <= 0.5 keeps K positive. Where mu_i > 1 the values that are left cannot have this
    mean, and the capital is infinite. Where mu_i < 0 m is impossibly small, every later factor is
    below 1, and the capital keeps its maximum.

    K_t does not decrease in m, because mu_i increases in m and no factor decreases in mu_i. Where
    b = lambda a factor has the slope lambda; where b = 0.5 / (1 - mu) it has the slope
    0.5 (1 - y) / (1 - mu)^2.

    Raises:
        ValueError: as `mean_bound`, or `upper` is not above `lower`.
    """
    if not lower < upper:
        raise ValueError(f"upper {upper} is not above lower {lower}")
    _check_shares(delta)
    units = _to_unit(values, lower, upper, population)
    unit_mean = (mean - lower) / (upper - lower)
    return _capital(units, _bets(units, delta), unit_mean, population)


def bernstein_mean_bound(
    values: Sequence[float],
    *,
    lower: float,
    upper: float,
    delta: float,
    population: int | None = None,
) -> float:
    """An upper confidence bound of the mean by an empirical Bernstein inequality, for comparison.

    Without replacement the bound is from Bardenet & Maillard 2015 (arXiv 1309.4029, theorem 4.3):
    with s^2 the variance with 1/N, B = upper - lower and kappa = 7/3 + 3/sqrt(2),

        mean + s sqrt(2 rho ln(5/delta) / N) + kappa B ln(5/delta) / N,
        rho = 1 - (N - 1)/P where 2 N <= P, else (1 - N/P) (1 + 1/N).

    For independent draws it is from Maurer & Pontil 2009 (theorem 4), V the variance with
    1/(N - 1):

        mean + sqrt(2 V ln(2/delta) / N) + 7 B ln(2/delta) / (3 (N - 1)).

    Raises:
        ValueError: as `mean_bound`.
    """
    _to_unit(values, lower, upper, population)
    _check_shares(delta)
    num = len(values)
    if num < 2:
        return upper
    average = math.fsum(values) / num
    squares = math.fsum((value - average) ** 2 for value in values)
    width = upper - lower
    # Independent draws: Maurer & Pontil.
    if population is None:
        log = math.log(2 / delta)
        spread = math.sqrt(2 * squares / (num - 1) * log / num)
        return min(upper, average + spread + 7 * width * log / (3 * (num - 1)))
    # Without replacement: Bardenet & Maillard.
    log = math.log(5 / delta)
    half = 2 * num <= population
    rho = 1 - (num - 1) / population if half else (1 - num / population) * (1 + 1 / num)
    spread = math.sqrt(squares / num) * math.sqrt(2 * rho * log / num)
    return min(upper, average + spread + _KAPPA * width * log / num)


def _capital(
    units: Sequence[float], bets: Sequence[float], mean: float, population: int | None
) -> float:
    best = current = 1.0
    total = 0.0
    for i, (value, bet) in enumerate(zip(units, bets, strict=True)):
        left = mean if population is None else (population * mean - total) / (population - i)
        if left > 1.0:
            return math.inf
        if left < 0.0:
            return best
        if bet * (1.0 - left) > 0.5:
            bet = 0.5 / (1.0 - left)
        current *= 1.0 + bet * (left - value)
        best = max(best, current)
        total += value
    return best


def _bets(units: Sequence[float], delta: float) -> list[float]:
    """lambda_i of `capital`, each from the values before the i-th alone."""
    scale = 2 * math.log(1 / delta) / max(len(units), 1)
    squares, bets = 0.25, []
    for i, (value, total) in enumerate(zip(units, accumulate(units), strict=True), start=1):
        bets.append(math.sqrt(scale * i / squares))
        squares += (value - (0.5 + total) / (i + 1)) ** 2
    return bets


def _binomial_order(num_drawn: int, share: Fraction, risk: Fraction) -> int | None:
    """The smallest k >= 1 with P(Bin(num_drawn, share) >= k) <= risk."""
    hit, miss = share.numerator, share.denominator - share.numerator

    def counts() -> Iterator[int]:
        count = hit**num_drawn
        for j in range(num_drawn, 0, -1):
            yield count
            count = count * j * miss // ((num_drawn - j + 1) * hit)

    return _first_within(counts(), num_drawn, risk * share.denominator**num_drawn)


def _hypergeometric_order(
    num_drawn: int, share: Fraction, population: int, risk: Fraction
) -> int | None:
    """The smallest k >= 1 such that k values below the quantile are drawn with at most `risk`."""
    below = math.ceil(share * population) - 1
    counts = (
        math.comb(below, j) * math.comb(population - below, num_drawn - j)
        for j in range(num_drawn, 0, -1)
    )
    return _first_within(counts, num_drawn, risk * math.comb(population, num_drawn))


def _first_within(counts: Iterator[int], num_drawn: int, limit: Fraction) -> int | None:
    """The smallest k with a tail, the sum of the counts for num_drawn down to k, within `limit`."""
    whole, tail, order = math.floor(limit), 0, None
    for j, count in zip(range(num_drawn, 0, -1), counts, strict=True):
        tail += count
        if tail > whole:
            break
        order = j
    return order


def _exact(share: float) -> Fraction:
    """The fraction of the written decimal: 0.95 is 19/20, not the nearest float."""
    return Fraction(repr(float(share)))


def _check_shares(*shares: float) -> None:
    for share in shares:
        if not 0.0 < share < 1.0:
            raise ValueError(f"{share} is not between 0 and 1")


def _check_population(num_drawn: int, population: int | None) -> None:
    if population is not None and population < num_drawn:
        raise ValueError(f"{num_drawn} were drawn from a population of {population}")


def _to_unit(
    values: Sequence[float], lower: float, upper: float, population: int | None
) -> list[float]:
    """The values rescaled to [0, 1], checked."""
    _check_population(len(values), population)
    if not all(lower <= value <= upper for value in values):
        raise ValueError(f"a value is not in [{lower}, {upper}]")
    width = upper - lower
    return [(value - lower) / width if width > 0 else 0.0 for value in values]
