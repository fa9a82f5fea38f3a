"""Every solver is held against float64 references: optimality, spectra, degenerate layers."""

import pytest
import torch
from engine_helpers import CASES, SHAPES, case, eckart_young, gaussian, reference_error
from torch import Tensor

from lrc_cli.engine import SOLVERS, Factors, SolveError, Solver, Statistics

BEST = ["svd", "frobenius", "curvature"]
"""The methods whose solution of a rank is the best of that rank in a quadratic form."""
DATA_DRIVEN = ["frobenius", "curvature"]


def ranks(weight: Tensor) -> range:
    return range(1, min(weight.shape) + 1)


def assert_optimal(solver: Solver, factorize_with: Solver, name: str) -> None:
    """No challenger is better: neither Eckart-Young's bound nor nearby or refitted pairs."""
    weight, statistics = case(name)
    scale = reference_error(solver.name, weight, statistics)
    spectrum = solver.spectrum(weight, statistics)
    for rank in ranks(weight):
        factors = factorize_with.factorize(weight, statistics, rank)
        error = reference_error(solver.name, weight - factors.dense(), statistics)
        assert error <= spectrum[rank:].sum().item() + 1e-9 * scale
        for challenger in challengers(factors, weight, rank):
            other = reference_error(solver.name, weight - challenger, statistics)
            assert error <= other + 1e-9 * scale


def challengers(factors: Factors, weight: Tensor, rank: int) -> list[Tensor]:
    """Returns rank-r matrices: perturbed solutions, random projections of the weight, plain SVD."""
    m, n = weight.shape
    found = []
    for seed, size in enumerate((1e-1, 1e-2, 1e-3)):
        outer = factors.outer * (1 + size * gaussian(m, factors.rank, seed=seed))
        inner = factors.inner * (1 + size * gaussian(factors.rank, n, seed=seed + 50))
        found.append(outer @ inner)
    for seed in range(3):
        q, _ = torch.linalg.qr(gaussian(m, rank, seed=seed + 90))
        found.append(q @ (q.T @ weight))
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    return [*found, (u[:, :rank] * s[:rank]) @ vt[:rank]]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("method", BEST)
def test_no_challenger_beats_the_solution(method: str, name: str) -> None:
    assert_optimal(SOLVERS[method], SOLVERS[method], name)


@pytest.mark.parametrize("name", [name for name in CASES if name != "one-row"])
@pytest.mark.parametrize("method", DATA_DRIVEN)
def test_plain_svd_in_its_place_fails_the_optimality_test(method: str, name: str) -> None:
    with pytest.raises(AssertionError):
        assert_optimal(SOLVERS[method], SOLVERS["svd"], name)
    weight, statistics = case(name)
    solver, rank = SOLVERS[method], 6
    own = solver.factorize(weight, statistics, rank).dense()
    plain = SOLVERS["svd"].factorize(weight, statistics, rank).dense()
    assert solver.error(weight - plain, statistics) > 1.05 * solver.error(weight - own, statistics)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", BEST)
def test_solution_is_eckart_young_in_the_whitened_space(method: str, shape: str) -> None:
    weight, statistics = case(shape)
    for rank in (1, 7, min(weight.shape) - 1):
        solution = SOLVERS[method].factorize(weight, statistics, rank).dense()
        torch.testing.assert_close(
            solution, eckart_young(method, weight, statistics, rank), rtol=1e-7, atol=1e-8
        )


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("method", BEST)
def test_spectrum_tail_is_the_error_at_every_rank(method: str, name: str) -> None:
    weight, statistics = case(name)
    solver = SOLVERS[method]
    spectrum = solver.spectrum(weight, statistics)
    assert spectrum.dtype == torch.float64 and (spectrum >= 0).all()
    assert (spectrum[1:] <= spectrum[:-1]).all()
    scale = reference_error(method, weight, statistics)
    assert spectrum.sum().item() == pytest.approx(scale, rel=1e-9)
    for rank in ranks(weight):
        difference = weight - solver.factorize(weight, statistics, rank).dense()
        tail = spectrum[rank:].sum().item()
        assert solver.error(difference, statistics) == pytest.approx(
            tail, rel=1e-6, abs=1e-9 * scale
        )
        assert solver.error(difference, statistics) == pytest.approx(
            reference_error(method, difference, statistics), rel=1e-6, abs=1e-9 * scale
        )


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("method", BEST)
def test_output_spectrum_tail_is_the_plain_output_error(method: str, name: str) -> None:
    weight, statistics = case(name)
    terms = SOLVERS[method].survey(weight, statistics).output_curve
    scale = reference_error("frobenius", weight, statistics)
    for rank in ranks(weight):
        difference = weight - SOLVERS[method].factorize(weight, statistics, rank).dense()
        expected = reference_error("frobenius", difference, statistics)
        assert terms[rank:].sum().item() == pytest.approx(expected, rel=1e-5, abs=1e-9 * scale)


def test_output_spectrum_of_svd_without_data_is_its_weight_error() -> None:
    weight, _ = case("tall")
    solver, nothing = SOLVERS["svd"], Statistics()
    torch.testing.assert_close(
        solver.survey(weight, nothing).output_curve, solver.spectrum(weight, nothing)
    )


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("method", BEST)
def test_factors_are_balanced_and_nested(method: str, name: str) -> None:
    weight, statistics = case(name)
    rank = min(weight.shape)
    factors = SOLVERS[method].factorize(weight, statistics, rank)
    torch.testing.assert_close(factors.outer.norm(dim=0), factors.inner.norm(dim=1))
    assert 1e-6 < factors.outer.norm(dim=0).max() < 1e3
    smaller = min(5, factors.rank)
    torch.testing.assert_close(
        factors.truncated(smaller).dense(),
        SOLVERS[method].factorize(weight, statistics, smaller).dense(),
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_rank_is_capped_where_the_error_is_already_zero(shape: str) -> None:
    weight, statistics = case(f"{shape}-deficient")
    solver = SOLVERS["curvature"]
    factors = solver.factorize(weight, statistics, min(weight.shape))
    assert factors.rank == 10
    scale = solver.error(weight, statistics)
    assert solver.error(weight - factors.dense(), statistics) < 1e-12 * scale
    assert torch.isfinite(factors.dense()).all()
    assert not solver.spectrum(weight, statistics)[10:].any()


@pytest.mark.parametrize("method", BEST)
def test_zero_weight_is_reproduced(method: str) -> None:
    weight, statistics = case("wide")
    factors = SOLVERS[method].factorize(torch.zeros_like(weight), statistics, 4)
    assert not factors.dense().any()
    assert not SOLVERS[method].spectrum(torch.zeros_like(weight), statistics).any()


@pytest.mark.parametrize("shape", SHAPES)
def test_without_gradients_curvature_costs_nothing_and_solves_frobenius(shape: str) -> None:
    weight, statistics = case(shape)
    assert statistics.fisher is not None
    dead = Statistics(gram=statistics.gram, fisher=torch.zeros_like(statistics.fisher))
    assert not SOLVERS["curvature"].spectrum(weight, dead).any()
    torch.testing.assert_close(
        SOLVERS["curvature"].factorize(weight, dead, 6).dense(),
        SOLVERS["frobenius"].factorize(weight, dead, 6).dense(),
    )


@pytest.mark.parametrize("method", BEST)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_weights_are_solved_in_float64(method: str, dtype: torch.dtype) -> None:
    weight, statistics = case("tall")
    low = weight.to(dtype)
    factors = SOLVERS[method].factorize(low, statistics, 5)
    assert factors.outer.dtype == factors.inner.dtype == torch.float64
    assert torch.equal(
        factors.dense(), SOLVERS[method].factorize(low.double(), statistics, 5).dense()
    )


@pytest.mark.parametrize("method", DATA_DRIVEN)
def test_missing_statistics_are_named(method: str) -> None:
    weight, _ = case("tall")
    with pytest.raises(ValueError, match=r"gram|fisher"):
        SOLVERS[method].spectrum(weight, Statistics())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", BEST)
def test_a_solve_that_fails_is_a_solve_error(method: str, shape: str) -> None:
    weight, statistics = case(shape)
    weight[2, 3] = torch.nan
    with pytest.raises(SolveError):
        SOLVERS[method].spectrum(weight, statistics)
    with pytest.raises(SolveError):
        SOLVERS[method].factorize(weight, statistics, 3)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", DATA_DRIVEN)
@pytest.mark.parametrize("sizes", [(1e25, 1.0), (1e-25, 1.0), (1.0, 1e25), (1.0, 1e-25)])
def test_directions_in_float32_do_for_layers_of_any_size(
    sizes: tuple[float, float], method: str, shape: str
) -> None:
    """The squares of such numbers are beyond float32."""
    solver = SOLVERS[method]
    weight, statistics = case(shape)
    assert statistics.gram is not None and statistics.fisher is not None
    weight = weight * sizes[0]
    statistics = Statistics(gram=statistics.gram * sizes[1], fisher=statistics.fisher * sizes[1])
    found = solver.survey(weight, statistics)
    assert found.vectors is not None and solver.spanned is not None
    for rank in (1, 8, 16):
        directions = found.vectors.float()[:, :rank]
        factors = solver.spanned(weight, solver.metric(statistics), directions)
        error = solver.error(weight - factors.dense(), statistics)
        least, total = found.spectrum[rank:].sum().item(), found.spectrum.sum().item()
        assert least * (1 - 1e-9) <= error <= least * (1 + 1e-6) + 1e-10 * total
