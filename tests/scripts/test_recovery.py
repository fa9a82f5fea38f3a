"""These tests show that the recovery bounds D1 and D2 hold, and are not trivial."""

import itertools

import pytest
import torch
from engine_helpers import gaussian, generator
from recovery import Point, Setting, Sweep, point, verdicts
from recovery_bounds import (
    gaussian_noise_bound,
    recovery_bound,
    surviving_noise,
    tail_norm,
    visible_noise,
)
from torch import Tensor

from lrc_cli.engine import FROBENIUS, SVD, SolveError, Statistics

GRID = [
    pytest.param(*case, id="T{}-n{}-m{}-r{}-s{}".format(*case))
    for case in itertools.product((20, 200), (8, 32), (12, 24), (1, 4), (0.0, 0.03, 1.0))
]
"""T below and far above n, wide and tall layers, noise from none to more than the signal."""


def coloured(n: int, num_tokens: int, seed: int, decades: float = 2.0) -> Tensor:
    """Returns inputs (n, T) whose principal axes spread over `decades` of amplitude."""
    axes, _ = torch.linalg.qr(gaussian(n, n, seed=seed))
    scales = torch.logspace(0, -decades, n, dtype=torch.float64)
    return (axes * scales) @ gaussian(n, num_tokens, seed=seed + 1)


def planted(m: int, n: int, rank: int, seed: int, *, exact: bool) -> Tensor:
    """Returns M (m, n) of the rank, or with a small remainder beyond the rank."""
    low = gaussian(m, rank, seed=seed) @ gaussian(rank, n, seed=seed + 1)
    return low if exact else low + 0.1 * gaussian(m, n, seed=seed + 2)


def recovered(outputs: Tensor, inputs: Tensor, rank: int) -> Tensor:
    """Returns M^, the engine's solution for the least-squares weight of the noisy outputs."""
    weight = outputs @ torch.linalg.pinv(inputs)
    gram = inputs @ inputs.T / inputs.shape[1]
    return FROBENIUS.factorize(weight, Statistics(gram=gram), min(rank, *weight.shape)).dense()


def error_of(found: Tensor, matrix: Tensor, inputs: Tensor) -> float:
    return torch.linalg.vector_norm((found - matrix) @ inputs).item()


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "with-tail"])
@pytest.mark.parametrize(("num_tokens", "n", "m", "rank", "noise"), GRID)
def test_d1_is_never_violated(
    num_tokens: int, n: int, m: int, rank: int, noise: float, exact: bool
) -> None:
    inputs = coloured(n, num_tokens, seed=1)
    matrix = planted(m, n, rank, seed=5, exact=exact)
    deviation = noise * gaussian(m, num_tokens, seed=9)
    clean = matrix @ inputs
    bound = recovery_bound(visible_noise(deviation, inputs), rank, tail_norm(clean, rank))
    error = error_of(recovered(clean + deviation, inputs, rank), matrix, inputs)
    scale = torch.linalg.vector_norm(clean).item()
    assert error <= bound * (1 + 1e-9) + 1e-6 * scale
    if noise > 0 and exact and rank < min(m, n):
        assert bound < 10 * error


@pytest.mark.parametrize("seed", range(5))
def test_d1_holds_for_noise_that_hides_the_truth(seed: int) -> None:
    """The noise is chosen against the solution: a wrong direction rises above the planted ones."""
    inputs, rank = coloured(16, 120, seed=seed), 2
    matrix = planted(12, 16, rank, seed=seed + 3, exact=True)
    clean = matrix @ inputs
    u, values, _ = torch.linalg.svd(clean, full_matrices=True)
    direction = torch.nn.functional.normalize(gaussian(1, 16, seed=seed + 7) @ inputs)
    deviation = 1.01 * values[rank - 1] * u[:, rank + 1, None] @ direction
    bound = recovery_bound(visible_noise(deviation, inputs), rank, tail_norm(clean, rank))
    error = error_of(recovered(clean + deviation, inputs, rank), matrix, inputs)
    assert values[rank - 1] / 2 < error <= bound


def test_noise_outside_the_row_space_is_not_seen() -> None:
    inputs, matrix = coloured(8, 60, seed=2), planted(12, 8, 2, seed=3, exact=True)
    noise = gaussian(12, 60, seed=4)
    outside = noise - noise @ torch.linalg.pinv(inputs) @ inputs
    assert visible_noise(outside, inputs) < 1e-10
    assert error_of(recovered(matrix @ inputs + outside, inputs, 2), matrix, inputs) < 1e-9


@pytest.mark.parametrize("decades", [1.5, 3.0])
def test_plain_svd_in_its_place_violates_d1_on_coloured_inputs(decades: float) -> None:
    inputs = coloured(24, 400, seed=11, decades=decades)
    matrix = planted(20, 24, 3, seed=12, exact=True)
    deviation = 0.003 * gaussian(20, 400, seed=13)
    outputs = matrix @ inputs + deviation
    bound = recovery_bound(visible_noise(deviation, inputs), 3, 0.0)
    weight = outputs @ torch.linalg.pinv(inputs)
    driven = error_of(recovered(outputs, inputs, 3), matrix, inputs)
    agnostic = error_of(SVD.factorize(weight, Statistics(), 3).dense(), matrix, inputs)
    assert driven <= bound
    assert agnostic > 3 * driven
    if decades == 3.0:
        assert agnostic > bound


@pytest.mark.parametrize(("m", "k"), [(12, 6), (30, 30), (4, 40)])
@pytest.mark.parametrize("delta", [0.05, 0.3])
def test_d2_misses_no_more_often_than_it_may(m: int, k: int, delta: float) -> None:
    draws, num_tokens = 400, 50
    inputs = gaussian(k, num_tokens, seed=21)
    noise = 0.5 * torch.randn(draws, m, num_tokens, dtype=torch.float64, generator=generator(22))
    bound = gaussian_noise_bound(0.5, num_outputs=m, input_rank=k, delta=delta)
    visible = torch.tensor([visible_noise(deviation, inputs) for deviation in noise])
    assert (visible > bound).double().mean() <= delta
    assert bound < 2 * visible.median()


def test_the_rank_of_the_inputs_counts_and_not_their_number() -> None:
    inputs = gaussian(40, 5, seed=31) @ gaussian(5, 300, seed=32)
    noise = gaussian(20, 300, seed=33)
    small = gaussian_noise_bound(1.0, num_outputs=20, input_rank=5, delta=1e-6)
    assert visible_noise(noise, inputs) <= small < torch.linalg.matrix_norm(noise, 2)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_the_surviving_share_of_the_noise_is_that_of_the_tangent_space(rank: int) -> None:
    m, n, num_tokens, size = 24, 16, 500, 1e-3
    inputs = coloured(n, num_tokens, seed=41)
    matrix = planted(m, n, rank, seed=42, exact=True)
    shares = []
    for seed in range(60):
        deviation = size * gaussian(m, num_tokens, seed=100 + seed)
        found = recovered(matrix @ inputs + deviation, inputs, rank)
        shares.append(error_of(found, matrix, inputs) ** 2 / deviation.square().sum().item())
    predicted = surviving_noise(rank, num_outputs=m, input_rank=n, num_tokens=num_tokens)
    assert sum(shares) / len(shares) == pytest.approx(predicted, rel=0.1)


def test_inputs_of_zero_hide_all_noise() -> None:
    assert visible_noise(gaussian(4, 10, seed=1), torch.zeros(3, 10)) == 0.0


def test_what_is_not_finite_is_a_solve_error() -> None:
    broken = torch.full((3, 10), torch.nan)
    with pytest.raises(SolveError):
        tail_norm(broken, 1)


@pytest.mark.parametrize("delta", [0.0, 1.0, -0.1])
def test_a_probability_is_between_zero_and_one(delta: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        gaussian_noise_bound(1.0, num_outputs=3, input_rank=3, delta=delta)


def sweep(power: float, agnostic: float, slack: float) -> Sweep:
    """Returns points whose measured errors have a slope of `power` where 1 is predicted."""
    points = [
        Point(
            x=x,
            signal=1.0,
            noise=1.0,
            driven=x**power,
            agnostic=agnostic * x**power,
            predicted=x,
            d1=slack * x**power,
            d2=10 * x,
        )
        for x in (0.1, 1.0, 10.0)
    ]
    return Sweep(name="noise level", unit="signal", points=points)


@pytest.mark.parametrize(
    ("found", "met"),
    [
        pytest.param(sweep(1.1, 2.0, 3.0), True, id="as predicted"),
        pytest.param(sweep(1.2, 2.0, 3.0), False, id="another slope"),
        pytest.param(sweep(1.0, 0.9, 3.0), False, id="plain SVD is better"),
        pytest.param(sweep(1.0, 2.0, 0.9), False, id="D1 is violated"),
    ],
)
def test_the_script_says_what_is_missed(found: Sweep, met: bool) -> None:
    assert verdicts([found]) is met


def test_one_point_of_the_script_is_as_predicted() -> None:
    found = point(Setting(num_tokens=512), x=512)
    assert found.driven == pytest.approx(found.predicted, rel=0.1)
    assert found.driven < found.d1 < found.d2
    assert found.agnostic > 2 * found.driven
