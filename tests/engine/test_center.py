"""The free bias in the engine is never worse on calibration; it is corrected and rounded well."""

from collections.abc import Callable

import pytest
import torch
from engine_helpers import gaussian, granted, pack
from torch import Tensor

from lrc_cli.engine import NUCLEAR, SOLVERS, SVD, Approximation, SameInput, Shrunk, Statistics
from lrc_cli.forms import dense
from lrc_cli.job.factors.fit import Request, fit_layer
from lrc_cli.job.statistics.moments import GramSum

CPU = torch.device("cpu")


def offset_inputs(n: int, num_tokens: int, seed: int = 3) -> Tensor:
    """Returns columns (n, T) whose mean is several times what varies."""
    scales = torch.logspace(0, -1.5, n, dtype=torch.float64)[:, None]
    return scales * gaussian(n, num_tokens, seed=seed) + 3 * gaussian(n, 1, seed=seed + 1)


def moments(x: Tensor, fisher: Tensor, *, center: bool) -> Statistics:
    mean = x.mean(dim=1) if center else None
    around = x if mean is None else x - mean[:, None]
    return Statistics(gram=around @ around.T / x.shape[1], fisher=fisher, mean=mean)


def problem(method: str, weight: Tensor, statistics: Statistics, rank: int) -> Approximation:
    if method == NUCLEAR.name:
        return Shrunk(weight, statistics).at(rank)
    return SameInput(weight, statistics, SOLVERS[method])


def output_difference(weight: Tensor, fitted: Tensor, shift: Tensor | None, x: Tensor) -> Tensor:
    """Returns W x + b - (Z x + b^) for every token."""
    difference = (weight - fitted) @ x
    return difference if shift is None else difference - shift[:, None]


@pytest.mark.parametrize("rank", [1, 4, 11])
@pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
@pytest.mark.parametrize("method", ["frobenius", "curvature", "nuclear"])
def test_a_free_bias_is_never_worse_at_equal_rank(
    method: str, shape: tuple[int, int], rank: int
) -> None:
    m, n = shape
    weight, x, g = gaussian(m, n, seed=0), offset_inputs(n, 400), gaussian(m, 3 * m, seed=5)
    fisher = g @ g.T / (3 * m)
    errors = {}
    for center in (False, True):
        task = problem(method, weight, moments(x, fisher, center=center), rank)
        fitted = task.solve(rank).factors.dense()
        difference = output_difference(weight, fitted, task.shift(fitted), x)
        found = task.errors(fitted)
        plain = difference.square().sum().item() / x.shape[1]
        assert found.output == pytest.approx(plain, rel=1e-9)
        assert task.energy == pytest.approx((weight @ x).square().sum().item() / x.shape[1])
        if method == "curvature":
            damped = fisher + 1e-3 * fisher.diagonal().mean() * torch.eye(m, dtype=torch.float64)
            half = 0.5 * torch.sum(difference * (damped @ difference)).item() / x.shape[1]
            assert found.metric == pytest.approx(half, rel=1e-9)
        errors[center] = found.metric if method == "curvature" else plain
    assert errors[True] < 0.9 * errors[False]


def own(task: Approximation, rank: int) -> Tensor:
    return task.solve(rank).factors.dense()


def plain_svd(task: Approximation, rank: int) -> Tensor:
    return SVD.factorize(task.weight, Statistics(), rank).dense()


def assert_optimal_with_a_bias(
    method: str, shape: tuple[int, int], fit: Callable[[Approximation, int], Tensor]
) -> None:
    """No challenger of the same rank does better, each with the best bias for it.

    Challengers are random, perturbed, or optimised locally by alternating least squares with an
    intercept.
    """
    m, n = shape
    weight, x, g = gaussian(m, n, seed=0), offset_inputs(n, 400), gaussian(m, 3 * m, seed=5)
    fisher, mean = g @ g.T / (3 * m), x.mean(dim=1, keepdim=True)
    task, rank = problem(method, weight, moments(x, fisher, center=True), 4), 4
    left = torch.eye(m, dtype=torch.float64)
    if method == "curvature":
        damped = fisher + 1e-3 * fisher.diagonal().mean() * left
        left = torch.linalg.cholesky(damped).T
    whole = left @ (weight @ (x - mean))

    def error(matrix: Tensor) -> float:
        difference = left @ (weight - matrix) @ x
        return (difference - difference.mean(dim=1, keepdim=True)).norm().item()

    fitted = fit(task, rank)
    u, s, vt = torch.linalg.svd(fitted, full_matrices=False)
    challengers = [plain_svd(task, rank)]
    for seed in range(3):
        near = u[:, :rank] * (1 + 10.0 ** -(1 + seed) * gaussian(m, rank, seed=seed))
        challengers.append((near * s[:rank]) @ vt[:rank])
        inner = gaussian(rank, n, seed=seed + 40)
        for _ in range(20):
            outer = whole @ torch.linalg.pinv(inner @ (x - mean))
            inner = torch.linalg.pinv(outer) @ whole @ torch.linalg.pinv(x - mean)
            challengers.append(torch.linalg.solve(left, outer) @ inner)
    assert error(fitted) <= min(map(error, challengers)) * (1 + 1e-9)


@pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
@pytest.mark.parametrize("method", ["frobenius", "curvature"])
def test_no_challenger_with_a_bias_does_better(method: str, shape: tuple[int, int]) -> None:
    assert_optimal_with_a_bias(method, shape, own)


@pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
@pytest.mark.parametrize("method", ["frobenius", "curvature"])
def test_plain_svd_with_a_free_bias_in_its_place_fails_the_optimality_test(
    method: str, shape: tuple[int, int]
) -> None:
    with pytest.raises(AssertionError):
        assert_optimal_with_a_bias(method, shape, plain_svd)


def test_the_new_bias_is_the_best_one() -> None:
    weight, x = gaussian(16, 24, seed=0), offset_inputs(24, 300)
    task = problem("frobenius", weight, moments(x, torch.eye(16), center=True), 5)
    fitted = task.solve(5).factors.dense()
    shift = task.shift(fitted)
    assert shift is not None
    best = output_difference(weight, fitted, shift, x).square().sum()
    for seed in range(5):
        other = shift + 1e-3 * gaussian(16, seed=seed)
        assert best < output_difference(weight, fitted, other, x).square().sum()


def test_without_the_correction_of_the_bias_the_error_is_many_times_larger() -> None:
    """A known public bug puts centred factors beside the old bias."""
    weight, x = gaussian(16, 24, seed=0), offset_inputs(24, 300)
    task = problem("frobenius", weight, moments(x, torch.eye(16), center=True), 8)
    fitted = task.solve(8).factors.dense()
    energy = (weight @ x).square().sum()
    corrected, forgotten = (
        (output_difference(weight, fitted, shift, x).square().sum() / energy).sqrt()
        for shift in (task.shift(fitted), None)
    )
    assert corrected < 0.1 and forgotten > 5 * corrected


def test_the_rounding_of_the_bias_is_a_part_of_the_reported_error() -> None:
    weight, x = gaussian(16, 24, seed=0), 100 * offset_inputs(24, 300)
    task = problem("frobenius", weight, moments(x, torch.eye(16), center=True), 12)
    bias = 50 * gaussian(16, seed=8).to(torch.bfloat16)
    request = Request(choice=granted("factors", 8), dtype=torch.bfloat16, bias=bias)
    fitted = fit_layer(task, request)
    assert fitted.packed is not None and fitted.bias is not None and fitted.facts.errors
    change = fitted.bias.double() - bias.double()
    difference = output_difference(weight, dense(fitted.packed), change, x)
    stored = fitted.facts.errors.output.stored
    energy = (weight @ x).square().sum()
    assert stored == pytest.approx((difference.square().sum() / energy).sqrt().item(), rel=1e-9)


@pytest.mark.parametrize("method", ["frobenius", "curvature"])
def test_inputs_that_never_vary_leave_only_the_bias(method: str) -> None:
    weight, x = gaussian(16, 24, seed=0), gaussian(24, 1, seed=1).expand(24, 50)
    task = problem(method, weight, moments(x, torch.eye(16).double(), center=True), 4)
    stored = pack(task, 4, torch.float32)
    fitted = dense(stored.packed)
    difference = output_difference(weight, fitted, task.shift(fitted), x)
    assert difference.abs().max() < 1e-9 * (weight @ x).abs().max()


@pytest.mark.parametrize("distance", [1.0, 1e2, 1e4])
def test_moments_around_a_far_mean_keep_their_digits(distance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(5000, 12, generator=generator) + distance
    centred, plain = GramSum(12, CPU, center=True), GramSum(12, CPU)
    for chunk in rows.split(700):
        centred.add(chunk)
        plain.add(chunk)
    exact = rows.double() - rows.double().mean(dim=0)
    expected = exact.T @ exact / len(rows)
    torch.testing.assert_close(centred.mean_row(), rows.double().mean(dim=0), rtol=1e-7, atol=1e-6)
    torch.testing.assert_close(centred.mean(), expected, rtol=1e-5, atol=1e-6)
    mean = rows.double().mean(dim=0)
    naive = plain.mean() - torch.outer(mean, mean)
    if distance == 1e4:  # float32 products of uncentred rows have no digits left there
        assert (naive - expected).abs().max() > 1e3 * (centred.mean() - expected).abs().max()


def test_a_mean_that_was_not_collected_is_not_made_up() -> None:
    with pytest.raises(ValueError, match="not collected"):
        GramSum(3, CPU).mean_row()
