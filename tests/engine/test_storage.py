"""Stored forms are exact where they should be, bounded, refitted, and counted to the byte."""

import pytest
import torch
from engine_helpers import (
    DEVICES,
    LOW_RANK,
    SHAPES,
    case,
    gaussian,
    pack,
    second_moments,
    storage_bytes,
)
from torch import Tensor

from lrc_cli.engine import (
    DENSE_STORAGE,
    SOLVERS,
    Factors,
    Metric,
    SameInput,
    SolveError,
    Statistics,
    Stored,
    pivot_block,
)
from lrc_cli.forms import Packed, dense
from lrc_cli.job.work import compress_gram, expand_gram

LOW = [torch.bfloat16, torch.float16, torch.float32]


def applied(packed: Packed, x: Tensor) -> Tensor:
    """Returns y = Z x row by row, as docs/format.md describes the tensors."""
    z = packed.tensors["weight"].double() @ x
    extra = packed.tensors["up.weight"].double() @ z
    if "perm" not in packed.tensors:
        return extra
    c = [*z.tolist(), *extra.tolist()]
    y: list[float] = []
    for source in packed.tensors["perm"].tolist():
        y += c[source * packed.parameters["block"] : (source + 1) * packed.parameters["block"]]
    return torch.tensor(y, dtype=torch.float64)


def exactly(weight: Tensor, rank: int) -> Factors:
    return SOLVERS["svd"].factorize(weight, Statistics(), rank)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("block", "rank"), [(1, 1), (1, 13), (8, 8), (8, 16)])
def test_interpolative_form_is_exact_and_bounded_in_float64(
    shape: str, block: int, rank: int
) -> None:
    weight, _ = case(shape)
    factors = exactly(weight, rank)
    stored = LOW_RANK["interpolative"].rounded(
        factors, factors.dense(), Metric(), torch.float64, block
    )
    packed = stored.packed
    m, n = weight.shape
    tensors = packed.tensors
    assert tensors["weight"].shape == (rank, n) and tensors["up.weight"].shape == (m - rank, rank)
    assert tensors["perm"].dtype == torch.int32 and len(tensors["perm"]) == m // block
    assert (dense(packed) - factors.dense()).abs().max() < 1e-10
    assert packed.tensors["up.weight"].abs().max() < 20
    x = gaussian(n, seed=3)
    torch.testing.assert_close(applied(packed, x), factors.dense() @ x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_rank_m_minus_one_has_one_coefficient_row(shape: str) -> None:
    weight, _ = case(shape)
    factors = exactly(weight[: weight.shape[1]], min(weight.shape) - 1)
    m = len(factors.outer)
    packed = LOW_RANK["interpolative"].rounded(factors, factors.dense(), Metric(), torch.float64, 1)
    assert m - packed.packed.rank == 1 and packed.packed.tensors["up.weight"].shape == (1, m - 1)
    assert (dense(packed.packed) - factors.dense()).abs().max() < 1e-10


@pytest.mark.parametrize("storage", LOW_RANK)
@pytest.mark.parametrize("name", ["tall", "wide", "square"])
def test_stored_matrix_is_what_the_tensors_give(storage: str, name: str) -> None:
    weight, statistics = case(name)
    solver = SOLVERS["curvature"]
    factors = solver.factorize(weight, statistics, 8)
    metric = solver.metric(statistics)
    stored = LOW_RANK[storage].rounded(factors, weight, metric, torch.bfloat16, 8)
    dtypes = {stored.packed.tensors[name].dtype for name in ("weight", "up.weight")}
    assert dtypes == {torch.bfloat16}
    x = gaussian(weight.shape[1], seed=4)
    torch.testing.assert_close(applied(stored.packed, x), dense(stored.packed) @ x)
    error = solver.error(weight - dense(stored.packed), statistics)
    assert stored.error == pytest.approx(error, rel=1e-9)


def test_swaps_bound_the_growth_that_partial_pivoting_allows() -> None:
    rank = 20
    triangle = torch.eye(rank, dtype=torch.float64) - torch.ones(rank, rank).double().tril(-1)
    outer = torch.cat([triangle, -torch.ones(4, rank, dtype=torch.float64)])
    naive = outer[rank:] @ torch.linalg.inv(triangle)
    assert naive.abs().max() > 1e5
    factors = Factors(outer, gaussian(rank, 30, seed=0))
    stored = LOW_RANK["interpolative"].rounded(factors, factors.dense(), Metric(), torch.float64, 1)
    assert stored.packed.tensors["up.weight"].abs().max() < 10
    assert (dense(stored.packed) - factors.dense()).abs().max() < 1e-10


def test_blocks_are_chosen_for_conditioning() -> None:
    """24 row groups come twice and are larger one by one than the 24 that come three times.

    A choice by size alone takes both copies of the larger groups, more than later swaps can mend.
    """
    block, groups = 2, 24
    rank = 2 * groups * block
    originals = gaussian(rank, rank, seed=1).view(2 * groups, block, rank)
    twice, thrice = originals[:groups], originals[groups:]
    copies = torch.cat([*[twice] * 2, *[thrice] * 3])
    outer = (copies + 1e-6 * gaussian(*copies.shape, seed=2)).reshape(-1, rank)
    factors = Factors(outer, gaussian(rank, 16, seed=3))
    stored = LOW_RANK["interpolative"].rounded(
        factors, factors.dense(), Metric(), torch.float64, block
    )
    assert stored.packed.parameters["block"] == block
    assert stored.packed.tensors["up.weight"].abs().max() < 2


def test_zero_rows_in_every_block_fall_back_to_single_rows_in_the_same_bytes() -> None:
    weight, _ = case("square")
    weight[::8] = 0
    rank = 16
    factors = exactly(weight, rank)
    stored = LOW_RANK["interpolative"].rounded(factors, weight, Metric(), torch.bfloat16, 8)
    assert stored.packed.parameters["block"] == 1
    assert stored.packed.num_bytes <= storage_bytes("interpolative", *weight.shape, rank, 2, 8)
    assert rank - 4 <= stored.packed.rank <= rank
    # The basis from which row groups are chosen is in float32 where bfloat16 is stored.
    assert dense(stored.packed)[::8].abs().max() < 1e-9


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("method", SOLVERS)
def test_refit_beats_the_rounded_coefficients(method: str, dtype: torch.dtype) -> None:
    """The refit is never worse.

    Rounding may undo the gain, which depends on the processor; both are then the same.
    """
    solver, block, gains = SOLVERS[method], 8, []
    for shape in SHAPES:
        weight, statistics = case(shape)
        factors = solver.factorize(weight, statistics, 16)
        stored = LOW_RANK["interpolative"].rounded(
            factors, weight, solver.metric(statistics), dtype, block
        )
        packed = stored.packed
        position = packed.tensors["perm"].long().argsort()
        rows = torch.arange(len(weight)).view(-1, block)[position].flatten()
        z = factors.dense()[rows]
        plain = torch.linalg.lstsq(z[:16].T, z[16:].T).solution.T
        unfitted = Packed(
            form="interpolative",
            shape=packed.shape,
            tensors={
                "weight": z[:16].to(dtype),
                "up.weight": plain.to(dtype),
                "perm": packed.tensors["perm"],
            },
            parameters={"rank": 16, "block": block},
        )
        error = solver.error(weight - dense(unfitted), statistics)
        assert stored.error <= error * (1 + 1e-12)
        gains.append(stored.error < error)
    assert sum(gains) >= 2


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("storage", LOW_RANK)
def test_refit_takes_back_part_of_what_bf16_costs(storage: str, shape: str) -> None:
    weight, statistics = case(shape)
    solver = SOLVERS["curvature"]
    factors = solver.factorize(weight, statistics, 16)
    metric = solver.metric(statistics)
    optimum = solver.error(weight - factors.dense(), statistics)
    fitted = LOW_RANK[storage].rounded(factors, weight, metric, torch.bfloat16, 8)
    blind = LOW_RANK[storage].rounded(factors, factors.dense(), Metric(), torch.bfloat16, 8)
    unfitted = solver.error(weight - dense(blind.packed), statistics)
    assert optimum < fitted.error
    assert fitted.error - optimum < 0.95 * (unfitted - optimum)


@pytest.mark.parametrize("name", ["tall-deficient", "wide-deficient", "square-zero-columns"])
@pytest.mark.parametrize("storage", LOW_RANK)
@pytest.mark.parametrize("method", ["frobenius", "curvature"])
def test_refit_stays_bounded_where_the_gram_matrix_is_singular(
    method: str, storage: str, name: str
) -> None:
    weight, statistics = case(name)
    solver = SOLVERS[method]
    problem = SameInput(weight, statistics, solver)
    stored = pack(problem, 16, torch.bfloat16, storage)
    assert torch.isfinite(dense(stored.packed)).all()
    assert stored.packed.tensors["up.weight"].abs().max() < 30
    assert dense(stored.packed).norm() < 10 * weight.norm()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("storage", LOW_RANK)
def test_tiny_gradients_fit_every_dtype(
    storage: str, shape: str, dtype: torch.dtype, device: str
) -> None:
    weight, statistics = case(shape)
    assert statistics.gram is not None and statistics.fisher is not None
    weight = (0.05 * weight).to(device)
    statistics = Statistics(
        gram=statistics.gram.to(device), fisher=1e-6 * statistics.fisher.to(device)
    )
    solver = SOLVERS["curvature"]
    problem = SameInput(weight, statistics, solver)
    stored = pack(problem, 16, dtype, storage)
    total, tail = (solver.spectrum(weight, statistics)[rank:].sum().item() for rank in (0, 16))
    assert 0 < total < 1e-15
    assert stored.packed.tensors["weight"].device.type == device
    assert tail * (1 - 1e-6) <= stored.error <= tail + 30 * torch.finfo(dtype).eps ** 2 * total


def test_overflow_of_the_stored_dtype_is_a_solve_error() -> None:
    weight, _ = case("wide")
    problem = SameInput(1e12 * weight, Statistics(), SOLVERS["svd"])
    for storage in LOW_RANK:
        with pytest.raises(SolveError, match="float16"):
            pack(problem, 8, torch.float16, storage)


@pytest.mark.parametrize("storage", LOW_RANK)
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(("m", "n", "rank"), [(40, 24, 16), (24, 40, 13), (30, 30, 8), (25, 9, 8)])
def test_bytes_are_those_of_the_tensors(
    storage: str, dtype: torch.dtype, m: int, n: int, rank: int
) -> None:
    weight = gaussian(m, n, seed=1)
    problem = SameInput(weight, Statistics(), SOLVERS["svd"])
    packed = pack(problem, rank, dtype, storage).packed
    tensors = packed.tensors.values()
    assert packed.num_bytes == sum(len(t.numpy(force=True).tobytes()) for t in map(raw, tensors))
    block = pivot_block(m, rank)
    assert packed.num_bytes == storage_bytes(storage, m, n, rank, dtype.itemsize, block)
    assert packed.rank == rank


def raw(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def test_pivot_blocks_need_both_sizes_to_divide() -> None:
    assert pivot_block(576, 320) == 8
    assert pivot_block(576, 321) == pivot_block(577, 320) == 1


@pytest.mark.parametrize("shape", ["tall", "square"])
def test_a_rank_lowered_by_the_cap_keeps_its_blocks(shape: str) -> None:
    weight, statistics = case(f"{shape}-deficient")
    solver = SOLVERS["curvature"]
    factors = solver.factorize(weight, statistics, 16)
    assert factors.rank == 10
    problem = SameInput(weight, statistics, solver)
    stored = pack(problem, 16, torch.float32, "interpolative")
    assert stored.packed.rank == 16 and stored.packed.parameters["block"] == 8
    assert stored.error < 1e-10 * solver.error(weight, statistics)


def trial(decades: float, surveyed: bool) -> tuple[Stored, Stored, Stored]:
    """Returns (auto, interpolative, factors in the same bytes) of one bf16 layer."""
    weight = gaussian(64, 64, seed=5)
    statistics = Statistics(gram=second_moments(64, 6, decades))
    solver = SOLVERS["frobenius"]
    factors, metric = solver.factorize(weight, statistics, 40), solver.metric(statistics)
    survey = solver.survey(weight, statistics) if surveyed else None
    problem = SameInput(weight, statistics, solver, survey)
    auto = pack(problem, 40, torch.bfloat16)
    blocked = LOW_RANK["interpolative"].rounded(factors, weight, metric, torch.bfloat16, 8)
    rank = storage_bytes("interpolative", 64, 64, 40, 2, 8) // storage_bytes(
        "factors", 64, 64, 1, 2, 8
    )
    plain = LOW_RANK["factors"].rounded(factors.truncated(rank), weight, metric, torch.bfloat16, 8)
    return auto, blocked, plain


@pytest.mark.parametrize("surveyed", [False, True])
@pytest.mark.parametrize(("decades", "winner"), [(1.0, "interpolative"), (12.0, "factors")])
def test_auto_takes_the_lower_stored_error_in_the_same_bytes(
    decades: float, winner: str, surveyed: bool
) -> None:
    auto, blocked, plain = trial(decades, surveyed)
    assert auto.packed.form == winner
    assert auto.error == pytest.approx(min(blocked.error, plain.error), rel=1e-9)
    assert auto.packed.num_bytes <= blocked.packed.num_bytes
    assert auto.reason.startswith(winner)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("method", ["frobenius", "curvature"])
@pytest.mark.parametrize(("m", "n", "tokens"), [(160, 96, 40), (96, 160, 40), (96, 96, 400)])
def test_errors_of_what_is_stored_are_those_of_the_matrix(
    m: int, n: int, tokens: int, method: str, dtype: torch.dtype
) -> None:
    """Gram matrices stored in float32 have negative eigenvalues where tokens are few.

    What phase one knows of Z = 0 must not leave them out.
    """
    inputs = gaussian(tokens, n, seed=1) + 5
    packed = compress_gram(inputs.T @ inputs / tokens)
    fisher = second_moments(m, 2, 3.0)
    statistics = Statistics(gram=expand_gram(*packed, torch.device("cpu")), fisher=fisher)
    weight, solver = gaussian(m, n, seed=3), SOLVERS[method]
    problem = SameInput(weight, statistics, solver, solver.survey(weight, statistics))
    for rank in (8, 24, 32, 40, 64):
        for storage in LOW_RANK:
            stored = pack(problem, rank, dtype, storage)
            wanted = problem.errors(dense(stored.packed))
            assert stored.errors == pytest.approx(wanted, rel=1e-6, abs=1e-9 * problem.total)


def test_dense_is_a_form_with_one_choice_at_no_error() -> None:
    weight, statistics = case("tall")
    problem = SameInput(weight, statistics, SOLVERS["frobenius"])
    (choice,) = DENSE_STORAGE.choices(weight.shape, 2)
    assert choice.is_dense and (choice.num_bytes, choice.error) == (2 * weight.numel(), 0.0)
    stored = DENSE_STORAGE.pack(problem, choice, torch.float64)
    assert torch.equal(dense(stored.packed), weight) and stored.error == 0
    assert stored.packed.num_bytes == 8 * weight.numel() and stored.packed.rank is None
    with pytest.raises(SolveError, match="float16"):
        DENSE_STORAGE.pack(
            SameInput(1e12 * weight, statistics, SOLVERS["frobenius"]), choice, LOW[1]
        )
