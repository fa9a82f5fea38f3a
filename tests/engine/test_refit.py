"""The refit after rounding finds the least error, and its changes are differences of errors."""

from dataclasses import replace

import pytest
import torch
from engine_helpers import SHAPES, case, damped, gaussian
from torch import Tensor

from lrc_cli.engine import Errors, Metric
from lrc_cli.engine.storage.refit import Refit

RANK = 6


def metric_of(name: str, *, weighted: bool) -> tuple[Tensor, Metric]:
    weight, statistics = case(name)
    assert statistics.fisher is not None
    fisher = damped(1e12 * statistics.fisher) if weighted else None
    return weight, Metric(gram=statistics.gram, fisher=fisher)


def placed(chosen: Tensor, others: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Returns the matrix whose chosen rows are `first` and whose other rows are `second`."""
    whole = first.new_empty(len(first) + len(second), first.shape[1])
    whole[chosen], whole[others] = first, second
    return whole


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", [*SHAPES, "tall-deficient", "wide-outlier"])
def test_a_change_is_the_difference_of_the_errors_of_the_whole_matrix(
    name: str, weighted: bool
) -> None:
    weight, metric = metric_of(name, weighted=weighted)
    order = torch.randperm(len(weight), generator=torch.Generator().manual_seed(1))
    chosen, others = order[:RANK], order[RANK:]
    rows = (weight[chosen] + 0.1 * gaussian(RANK, weight.shape[1], seed=2)).bfloat16().double()
    start = gaussian(len(others), RANK, seed=3)
    ordered = metric
    if metric.fisher is not None:
        ordered = replace(metric, fisher=metric.fisher[order][:, order])
    refit = Refit(start, weight[order], rows, ordered)

    def error(coefficients: Tensor) -> float:
        return metric.error(weight - placed(chosen, others, rows, coefficients @ rows))

    solution = refit.solution(unit=0.0)
    pairs = [(start, solution), (solution, start), (solution.bfloat16().double(), solution)]
    pairs.append((gaussian(*start.shape, seed=4), gaussian(*start.shape, seed=5)))
    for old, new in pairs:
        found, scale = refit.change(old, new), error(old) + error(new)
        assert found == pytest.approx(error(new) - error(old), abs=1e-9 * scale)
    least = error(solution)
    for seed in range(5):
        other = solution + 10.0 ** -(1 + seed) * gaussian(*start.shape, seed=10 + seed)
        assert least <= error(other) * (1 + 1e-9)
    assert refit.change(solution, solution) == 0
    zero = Errors(*metric.errors(weight))
    for coefficients in (start, solution, solution.bfloat16().double()):
        wanted = metric.errors(weight - placed(chosen, others, rows, coefficients @ rows))
        for known in (zero, None):
            assert refit.errors(coefficients, known) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("off", [1e-1, 1e-3, 1e-5, 1e-7, 0.0])
def test_small_errors_keep_their_digits(weighted: bool, off: float) -> None:
    """What is left of the error of Z = 0 is never the difference of two roundings."""
    weight, metric = metric_of("tall", weighted=weighted)
    rows = gaussian(RANK, weight.shape[1], seed=2)
    coefficients = gaussian(len(weight), RANK, seed=3)
    target = coefficients @ rows + off * gaussian(*weight.shape, seed=4)
    refit = Refit(coefficients, target, rows, metric)
    wanted = metric.errors(target - coefficients @ rows)
    found = refit.errors(coefficients, Errors(*metric.errors(target)))
    assert found == pytest.approx(wanted, rel=1e-8)


def test_where_the_rows_are_singular_the_start_stays() -> None:
    weight, metric = metric_of("tall", weighted=False)
    start = gaussian(len(weight), RANK, seed=3)
    refit = Refit(start, weight, torch.zeros(RANK, weight.shape[1]).double(), metric)
    assert torch.equal(refit.solution(unit=0.0), start)


def test_a_metric_that_float32_cannot_factorise_is_factorised_in_float64() -> None:
    """The error of the fixed rows is made up for all the same."""
    weight, metric = metric_of("tall", weighted=False)
    m = len(weight)
    q, _ = torch.linalg.qr(gaussian(m, m, seed=6))
    fisher = (q * torch.logspace(0, -11, m, dtype=torch.float64)) @ q.T
    metric = Metric(gram=metric.gram, fisher=(fisher + fisher.T) / 2)
    assert torch.linalg.cholesky_ex(fisher[RANK:, RANK:].float())[1].item() != 0
    rows = weight[:RANK] + gaussian(RANK, weight.shape[1], seed=2)
    start = gaussian(m - RANK, RANK, seed=3)
    found = [
        metric.error(weight - torch.cat([rows, solution.double() @ rows]))
        for dtype in (torch.float32, torch.float64)
        for solution in [Refit(start, weight, rows, metric, dtype).solution(unit=0.0)]
    ]
    assert found[0] <= (1 + 1e-6) * found[1]
