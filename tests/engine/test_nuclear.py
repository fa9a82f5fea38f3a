"""The soft threshold is tested: KKT, challengers, ranks, curves, degenerate layers, rounding."""

from collections.abc import Callable

import pytest
import torch
from engine_helpers import CASES, SHAPES, case, gaussian, pack, square_root
from torch import Tensor

from lrc_cli.engine import (
    NUCLEAR,
    SOLVERS,
    Factors,
    SameInput,
    Shrunk,
    SolveError,
    Statistics,
    rank_of,
    tail_sums,
)
from lrc_cli.engine.solvers.nuclear import energies_of
from lrc_cli.forms import dense

Solve = Callable[[Tensor, Statistics, int], Factors]


def outputs(matrix: Tensor, statistics: Statistics) -> Tensor:
    """Returns Z G^(1/2), which has the norms of Z X / sqrt(T)."""
    assert statistics.gram is not None
    return matrix @ square_root(statistics.gram)


def objective(weight: Tensor, fitted: Tensor, statistics: Statistics, threshold: float) -> float:
    """Returns 1/2 ||W X - Z X||_F^2 + l ||Z X||_*, per token, from explicit singular values."""
    nuclear = torch.linalg.svdvals(outputs(fitted, statistics)).sum()
    squares = outputs(weight - fitted, statistics).square().sum()
    return (squares / 2 + threshold * nuclear).item()


def singular_values(weight: Tensor, statistics: Statistics) -> Tensor:
    return torch.linalg.svdvals(outputs(weight, statistics))


def subgradient_residual(weight: Tensor, solve: Solve, name: str, rank: int) -> float:
    """Returns how far N = (W X - V) / l is from the subdifferential of ||V||_*.

    N is a member exactly where both ||N||_2 <= 1 and <N, V> = ||V||_* hold.
    """
    _, statistics = case(name)
    level = singular_values(weight, statistics)[rank].item()
    fitted = outputs(solve(weight, statistics, rank).dense(), statistics)
    dual = (outputs(weight, statistics) - fitted) / level
    nuclear = torch.linalg.svdvals(fitted).sum()
    excess = torch.linalg.matrix_norm(dual, ord=2) - 1
    slack = (nuclear - torch.sum(dual * fitted)).abs() / nuclear
    return max(excess.item(), slack.item())


WELL_POSED = [*SHAPES, "wide-outlier", "square-zero-columns"]


@pytest.mark.parametrize("name", WELL_POSED)
@pytest.mark.parametrize("rank", [1, 5, 12])
def test_the_residual_lies_in_the_subdifferential(name: str, rank: int) -> None:
    weight, _ = case(name)
    assert subgradient_residual(weight, NUCLEAR.factorize, name, rank) < 1e-6


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("method", ["svd", "frobenius"])
def test_another_solver_in_its_place_leaves_the_subdifferential(method: str, name: str) -> None:
    weight, _ = case(name)
    assert subgradient_residual(weight, SOLVERS[method].factorize, name, 5) > 0.01


def alternated(
    weight: Tensor, statistics: Statistics, threshold: float, width: int, seed: int
) -> Tensor:
    """Returns V from a random start, by ridge least squares on A and B in turn.

    ||A B||_* is the least 1/2 (||A||^2 + ||B||^2) over all such factors. So the descent is never
    below the objective of V = A B.
    """
    target = outputs(weight, statistics)
    left = gaussian(len(target), width, seed=seed)
    ridge = threshold * torch.eye(width, dtype=torch.float64)
    for _ in range(400):
        right = torch.linalg.solve(left.T @ left + ridge, left.T @ target)
        left = torch.linalg.solve(right @ right.T + ridge, right @ target.T).T
    return left @ right


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("width", [3, 6, 20])
def test_no_optimised_challenger_is_better(name: str, width: int) -> None:
    """Challengers have widths below, at and above the rank that the threshold gives."""
    weight, statistics = case(name)
    problem = Shrunk(weight, statistics).at(6)
    solution = problem.solve(width).factors.dense()
    error = objective(weight, solution, statistics, problem.threshold)
    assert error == pytest.approx(problem.optimum(width), rel=1e-9)
    target = outputs(weight, statistics)
    found = []
    for seed in range(3):
        challenger = alternated(weight, statistics, problem.threshold, width, seed)
        nuclear = torch.linalg.svdvals(challenger).sum()
        squares = (target - challenger).square().sum()
        found.append((squares / 2 + problem.threshold * nuclear).item())
    assert min(found) >= error * (1 - 1e-9)
    assert min(found) == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("name", CASES)
def test_no_random_challenger_is_better(name: str) -> None:
    weight, statistics = case(name)
    for rank in range(min(weight.shape)):
        problem = Shrunk(weight, statistics).at(rank)
        exact = problem.solve(min(weight.shape)).factors
        error = objective(weight, exact.dense(), statistics, problem.threshold)
        scale = 1e-9 * problem.total
        for seed, size in enumerate((1e-1, 1e-2, 1e-3)):
            outer = exact.outer * (1 + size * gaussian(*exact.outer.shape, seed=seed))
            other = objective(weight, outer @ exact.inner, statistics, problem.threshold)
            assert error <= other + scale
        for method in ("svd", "frobenius"):
            other = SOLVERS[method].factorize(weight, statistics, max(rank, 1)).dense()
            assert error <= objective(weight, other, statistics, problem.threshold) + scale


@pytest.mark.parametrize("name", SHAPES)
def test_the_rank_falls_out_of_the_threshold_exactly(name: str) -> None:
    weight, statistics = case(name)
    s = singular_values(weight, statistics)
    for share in (0.05, 0.2, 0.6, 0.95):
        problem = Shrunk(weight, statistics, share=share)
        assert problem.threshold == pytest.approx(share * s[0].item(), rel=1e-12)
        factors = problem.solve(min(weight.shape)).factors
        assert factors.rank == int((s > share * s[0]).sum())
        left = torch.linalg.svdvals(outputs(factors.dense(), statistics))
        torch.testing.assert_close(left, (s - problem.threshold).clamp(min=0), atol=1e-9, rtol=1e-7)
        assert rank_of(NUCLEAR.spectrum(weight, statistics), share) == factors.rank


@pytest.mark.parametrize("name", SHAPES)
def test_a_direction_at_its_own_threshold_is_gone(name: str) -> None:
    """(s - l)_+ / s is 0 for s = l, not something tiny."""
    weight, statistics = case(name)
    for rank in range(1, min(weight.shape)):
        assert NUCLEAR.factorize(weight, statistics, rank).rank == rank


@pytest.mark.parametrize("name", CASES)
def test_the_curve_is_the_error_at_every_rank(name: str) -> None:
    weight, statistics = case(name)
    curve = tail_sums(NUCLEAR.spectrum(weight, statistics))
    scale = outputs(weight, statistics).square().sum().item()
    assert curve[0].item() == pytest.approx(scale, rel=1e-9)
    assert (curve[1:] <= curve[:-1]).all()
    s = singular_values(weight, statistics)
    for rank in range(1, min(weight.shape) + 1):
        fitted = NUCLEAR.factorize(weight, statistics, rank).dense()
        error = outputs(weight - fitted, statistics).square().sum().item()
        assert curve[rank].item() == pytest.approx(error, rel=1e-6, abs=1e-9 * scale)
        level = s[rank].item() if rank < len(s) else 0.0
        assert error == pytest.approx(
            s.clamp(max=level).square().sum().item(), rel=1e-5, abs=1e-8 * scale
        )


def test_singular_values_come_back_from_the_curve() -> None:
    weight, statistics = case("wide")
    spectrum = NUCLEAR.spectrum(weight, statistics)
    energies = singular_values(weight, statistics).square()
    torch.testing.assert_close(energies_of(spectrum), energies)


@pytest.mark.parametrize("name", [n for n in CASES if "deficient" in n])
def test_inputs_of_low_rank_end_the_directions(name: str) -> None:
    weight, statistics = case(name)
    factors = NUCLEAR.factorize(weight, statistics, min(weight.shape))
    assert factors.rank == 10
    assert outputs(weight - factors.dense(), statistics).norm() < 1e-6 * weight.norm()


def test_zero_layers_and_zero_inputs_cost_nothing() -> None:
    weight, statistics = case("wide")
    assert statistics.gram is not None
    dead = Statistics(gram=torch.zeros_like(statistics.gram))
    for matrix, data in ((torch.zeros_like(weight), statistics), (weight, dead)):
        for problem in (Shrunk(matrix, data).at(4), Shrunk(matrix, data, share=0.5)):
            solution = problem.solve(4)
            assert not solution.factors.dense().any()
            assert problem.errors(solution.aim).metric == problem.optimum(4) == 0.0
            assert problem.facts["threshold_share"] == 0.0
        assert rank_of(NUCLEAR.spectrum(matrix, data), 0.5) == 1


@pytest.mark.parametrize("shape", SHAPES)
def test_a_solve_that_fails_is_a_solve_error(shape: str) -> None:
    weight, statistics = case(shape)
    weight[2, 3] = torch.nan
    with pytest.raises(SolveError):
        NUCLEAR.spectrum(weight, statistics)
    with pytest.raises(SolveError):
        Shrunk(weight, statistics).at(3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_weights_are_solved_in_float64(dtype: torch.dtype) -> None:
    weight, statistics = case("tall")
    low = weight.to(dtype)
    factors = NUCLEAR.factorize(low, statistics, 5)
    assert factors.outer.dtype == factors.inner.dtype == torch.float64
    assert torch.equal(factors.dense(), NUCLEAR.factorize(low.double(), statistics, 5).dense())
    torch.testing.assert_close(factors.outer.norm(dim=0), factors.inner.norm(dim=1))


@pytest.mark.parametrize("storage", ["factors", "interpolative", "auto"])
@pytest.mark.parametrize("name", SHAPES)
def test_what_is_stored_stays_shrunk(name: str, storage: str) -> None:
    """Rounded tensors are refitted to Z: refitted to W they would undo the threshold."""
    weight, statistics = case(name)
    problem = Shrunk(weight, statistics).at(8)
    stored = pack(problem, 8, torch.bfloat16, storage)
    gap = stored.error - problem.optimum(stored.packed.rank)
    assert stored.error == pytest.approx(
        objective(weight, dense(stored.packed), statistics, problem.threshold), rel=1e-9
    )
    assert 0 <= gap < 2e-3 * stored.error
    refitted = pack(SameInput(weight, statistics, NUCLEAR), 8, torch.bfloat16, storage)
    other = objective(weight, dense(refitted.packed), statistics, problem.threshold)
    assert other - problem.optimum(8) > 5 * gap


def test_the_threshold_follows_the_rank_unless_it_is_given() -> None:
    weight, statistics = case("square")
    free, fixed = Shrunk(weight, statistics), Shrunk(weight, statistics, share=0.3)
    levels = [free.at(rank).threshold for rank in range(33)]
    assert levels == sorted(levels, reverse=True) and levels[32] == 0.0
    assert free.at(4).at(9).threshold == levels[9]
    assert fixed.at(3) is fixed
    assert fixed.facts["threshold_share"] == pytest.approx(0.3)
