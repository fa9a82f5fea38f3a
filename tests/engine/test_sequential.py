"""Fits to two networks' inputs are tested: J's parts, optimality, the ridge, degenerate inputs.

References are sums of squares over explicit inputs; nothing of the engine's moments is in them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from engine_helpers import DEVICES, SHAPES, damped, gaussian, pack, second_moments, square_root
from torch import Tensor

from lrc_cli.engine import SOLVERS, Drift, SameInput, Sequential, SolveError, Statistics
from lrc_cli.forms import dense

METHODS = ["frobenius", "curvature"]
RIDGE = 1e-2
Fit = Callable[["Case", int], Tensor]


@dataclass(frozen=True, kw_only=True)
class Case:
    """Holds a layer with what it reads in the dense and in the compressed network."""

    method: str
    weight: Tensor
    x: Tensor
    """(n, T)"""
    compressed: Tensor
    """(n, T)"""
    fisher: Tensor
    ridge: float = RIDGE
    correction: float = 1.0

    def drift(self, *, center: bool = False) -> Drift:
        means = [t.mean(dim=1) if center else torch.zeros(len(t)) for t in self.pair]
        x, compressed = (t - mean[:, None] for t, mean in zip(self.pair, means, strict=True))
        error, tokens = x - compressed, x.shape[1]
        return Drift(
            compressed=compressed @ compressed.T / tokens,
            cross=error @ compressed.T / tokens,
            drift=error @ error.T / tokens,
            mean=means[0].double() if center else None,
            mean_compressed=means[1].double() if center else None,
            num_tokens=tokens,
        )

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        return self.x, self.compressed

    @property
    def problem(self) -> Sequential:
        return Sequential(
            self.weight,
            self.drift(),
            SOLVERS[self.method],
            ridge=self.ridge,
            correction=self.correction,
            fisher=self.fisher if self.method == "curvature" else None,
        )

    @property
    def left(self) -> Tensor:
        """L of the metric: the error is ||L (...)||^2."""
        if self.method == "frobenius":
            return torch.eye(len(self.weight), dtype=torch.float64)
        return square_root(0.5 * damped(self.fisher))

    def stacked(self) -> tuple[Tensor, Tensor]:
        """Returns Y and D with J(Z) = ||L Y - L Z D||^2.

        The dense network's outputs and the ridge's count a parts; the dense weights on the same
        inputs count 1 - a parts.
        """
        tokens, n = self.x.shape[1], len(self.x)
        mean = self.compressed.square().sum(dim=1).mean().item() / tokens
        root = (self.ridge * mean) ** 0.5
        ridge = root * torch.eye(n, dtype=torch.float64)
        inputs = torch.cat([self.compressed / tokens**0.5, ridge], dim=1)
        outputs = self.weight @ torch.cat([self.x / tokens**0.5, ridge], dim=1)
        parts = self.correction**0.5, (1 - self.correction) ** 0.5
        targets = [parts[0] * outputs, parts[1] * self.weight @ inputs]
        return torch.cat(targets, dim=1), torch.cat([part * inputs for part in parts], dim=1)

    def objective(self, fitted: Tensor) -> float:
        """Returns J, as a sum of squares."""
        outputs, inputs = self.stacked()
        return (self.left @ (outputs - fitted @ inputs)).square().sum().item()

    def output_error(self, fitted: Tensor) -> float:
        difference = self.weight @ self.x - fitted @ self.compressed
        return difference.square().sum().item() / self.x.shape[1]


def case(
    method: str,
    shape: str = "wide",
    *,
    tokens: int = 300,
    drift: float = 0.4,
    seed: int = 0,
    correction: float = 1.0,
) -> Case:
    """Returns coloured inputs, and the same where a network dropped directions and added noise."""
    m, n = SHAPES[shape]
    colour = square_root(second_moments(n, seed + 10))
    x = colour @ gaussian(n, tokens, seed=seed + 1)
    axes, _ = torch.linalg.qr(gaussian(n, n, seed=seed + 2))
    kept = axes[:, : n // 2]
    compressed = (1 - drift) * x + drift * (kept @ (kept.T @ x))
    compressed = compressed + 0.1 * drift * colour @ gaussian(n, tokens, seed=seed + 3)
    fisher = 1e-12 * second_moments(m, seed + 20)
    weight = gaussian(m, n, seed=seed)
    return Case(
        method=method,
        weight=weight,
        x=x,
        compressed=compressed,
        fisher=fisher,
        correction=correction,
    )


def own(given: Case, rank: int) -> Tensor:
    return given.problem.solve(rank).factors.dense()


def plain_svd(given: Case, rank: int) -> Tensor:
    return SOLVERS["svd"].factorize(given.weight, Statistics(), rank).dense()


def on_dense_inputs(given: Case, rank: int) -> Tensor:
    """Returns the same solver's solution on the dense network's inputs."""
    statistics = Statistics(gram=given.drift().gram, fisher=given.fisher)
    return SOLVERS[given.method].factorize(given.weight, statistics, rank).dense()


def alternating(given: Case, start: Tensor, rank: int, rounds: int = 15) -> Iterator[Tensor]:
    """Yields exact least squares for the factors in turn, from the best factors of `start`."""
    outputs, inputs = given.stacked()
    left = given.left
    outputs = left @ outputs
    _, s, vt = torch.linalg.svd(start, full_matrices=False)
    inner = s[:rank, None] * vt[:rank]
    inverse = torch.linalg.pinv(inputs)
    for _ in range(rounds):
        outer = outputs @ torch.linalg.pinv(inner @ inputs)
        inner = torch.linalg.pinv(outer) @ outputs @ inverse
        yield torch.linalg.solve(left, outer) @ inner


def assert_optimal(given: Case, fit: Fit) -> None:
    """No challenger of the same rank has a lower J: perturbed, random or locally optimised."""
    m, n = given.weight.shape
    scale = given.objective(torch.zeros(m, n, dtype=torch.float64))
    for rank in (1, 5, min(m, n) - 1):
        solution = fit(given, rank)
        assert torch.linalg.matrix_rank(solution, rtol=1e-9) <= rank
        challengers = [plain_svd(given, rank), on_dense_inputs(given, rank)]
        u, s, vt = torch.linalg.svd(solution, full_matrices=False)
        for seed, size in enumerate((1e-1, 1e-2, 1e-3)):
            near = u[:, :rank] * (1 + size * gaussian(m, rank, seed=seed))
            challengers.append((near * s[:rank]) @ vt[:rank])
        for seed in range(3):
            challengers += alternating(given, gaussian(m, n, seed=seed + 70), rank)
        challengers += alternating(given, solution, rank, rounds=5)
        best = min(map(given.objective, challengers))
        assert given.objective(solution) <= best + 1e-9 * scale


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", METHODS)
def test_no_challenger_beats_the_solution(method: str, shape: str) -> None:
    assert_optimal(case(method, shape), own)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fit", [plain_svd, on_dense_inputs])
def test_another_solver_in_its_place_fails_the_optimality_test(
    fit: Fit, method: str, shape: str
) -> None:
    with pytest.raises(AssertionError):
        assert_optimal(case(method, shape), fit)


@pytest.mark.parametrize("correction", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", METHODS)
def test_j_is_an_inherited_part_and_the_rest(
    method: str, shape: str, device: str, correction: float
) -> None:
    given = case(method, shape, correction=correction)
    moved = Case(
        method=method,
        weight=given.weight.to(device),
        x=given.x.to(device),
        compressed=given.compressed.to(device),
        fisher=given.fisher.to(device),
        correction=correction,
    )
    problem = moved.problem
    assert (problem.inherited > 0) is (correction > 0)
    for seed, size in enumerate((0.0, 0.1, 1.0, 10.0)):
        fitted = given.weight + size * gaussian(*given.weight.shape, seed=seed)
        errors = problem.errors(fitted.to(device))
        assert errors.metric == pytest.approx(given.objective(fitted), rel=1e-10)
        assert errors.output == pytest.approx(given.output_error(fitted), rel=1e-10)
    outputs = given.weight @ given.x
    assert problem.energy == pytest.approx(outputs.square().sum().item() / 300, rel=1e-10)
    nothing = given.objective(torch.zeros_like(given.weight))
    assert problem.total == pytest.approx(nothing, rel=1e-10)


@pytest.mark.parametrize("correction", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", METHODS)
def test_the_optimum_is_what_the_solution_reaches(
    method: str, shape: str, correction: float
) -> None:
    given = case(method, shape, correction=correction)
    problem = given.problem
    for rank in range(1, min(given.weight.shape) + 1):
        reached = given.objective(problem.solve(rank).factors.dense())
        assert problem.optimum(rank) == pytest.approx(reached, rel=1e-8)


@pytest.mark.parametrize("tokens", [300, 25], ids=["many-tokens", "singular"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", METHODS)
def test_the_output_optimum_is_a_lower_bound_that_is_attained(
    method: str, shape: str, tokens: int
) -> None:
    given = case(method, shape, tokens=tokens)
    problem = given.problem
    outputs = given.weight @ given.x
    inverse = torch.linalg.pinv(given.compressed, rtol=1e-9)
    u, _, _ = torch.linalg.svd(outputs @ inverse @ given.compressed, full_matrices=False)
    energy = given.output_error(torch.zeros_like(given.weight))
    for rank in (1, 5, min(given.weight.shape) - 1):
        attained = given.output_error(u[:, :rank] @ u[:, :rank].T @ outputs @ inverse)
        assert problem.output_optimum(rank) == pytest.approx(attained, abs=1e-7 * energy)
        for fit in (own, plain_svd, on_dense_inputs):
            fitted = fit(given, rank)
            assert given.output_error(fitted) >= problem.output_optimum(rank) - 1e-7 * energy


@pytest.mark.parametrize("method", METHODS)
def test_it_makes_up_for_what_the_layers_before_lost(method: str) -> None:
    """The outputs show it, which are the purpose of the fit."""
    given = case(method, drift=0.8, tokens=2000)
    for rank in (8, 16):
        assert given.output_error(own(given, rank)) < 0.9 * given.output_error(
            on_dense_inputs(given, rank)
        )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", METHODS)
def test_without_drift_it_is_the_solution_on_the_same_inputs(method: str, shape: str) -> None:
    given = case(method, shape, drift=0.0)
    torch.testing.assert_close(given.x, given.compressed)
    faint = Case(**{**vars(given), "ridge": 1e-9})
    assert faint.problem.inherited == 0
    statistics = Statistics(gram=given.drift().gram, fisher=given.fisher)
    same = SameInput(given.weight, statistics, SOLVERS[method])
    for rank in (1, 5, 20):
        assert faint.problem.optimum(rank) == pytest.approx(same.optimum(rank), rel=1e-4)
        difference = own(faint, rank) - on_dense_inputs(given, rank)
        assert torch.linalg.norm(difference) < 1e-4 * torch.linalg.norm(given.weight)
        with_ridge = given.output_error(own(given, rank))
        assert with_ridge <= given.output_error(own(faint, rank)) + 0.02 * same.energy


def test_the_ridge_keeps_few_tokens_from_being_learnt_by_heart() -> None:
    """T = 40 tokens for n = 48 inputs are judged on tokens that were never seen."""
    rank, seen, new = 24, overfitting(40, seed=0), overfitting(4000, seed=1)
    errors = {}
    for ridge in (RIDGE, 1e-9):
        fitted = own(Case(**{**vars(seen), "ridge": ridge}), rank)
        errors[ridge] = relative(seen, fitted), relative(new, fitted)
    assert errors[1e-9][0] < errors[RIDGE][0] < errors[RIDGE][1] < 0.65 * errors[1e-9][1]
    # The dense network's inputs are still the better guide: fewer than 15 n tokens fall back.
    assert relative(new, on_dense_inputs(seen, rank)) < errors[RIDGE][1]
    enough = overfitting(20 * 48, seed=2)
    assert relative(new, own(enough, rank)) < relative(new, on_dense_inputs(enough, rank))


@pytest.mark.parametrize("method", METHODS)
def test_held_back_tokens_say_how_much_of_the_correction_pays(method: str) -> None:
    """The share measured on held-back tokens is the best of all shares there.

    It fits new tokens better than the whole correction, most of which few tokens taught by heart.
    """
    rank, few, held, new = 40, *(overfitting(t, seed=s) for s, t in enumerate((240, 400, 4000)))
    fisher = 1e-12 * second_moments(len(few.weight), 20) if method == "curvature" else None

    def fitted(correction: float | Drift) -> Sequential:
        return Sequential(
            few.weight,
            few.drift(),
            SOLVERS[method],
            ridge=1e-4,
            correction=correction,
            fisher=fisher,
        )

    problem = fitted(held.drift())
    assert 0.1 < problem.correction < 0.9
    assert problem.facts == {"correction": problem.correction}
    left = torch.eye(len(few.weight)) if fisher is None else square_root(damped(fisher))

    def left_over(given: Case, share: float) -> float:
        aim = fitted(share).solve(len(few.weight)).aim
        return (left.double() @ (given.weight @ given.x - aim @ given.compressed)).norm().item()

    shares = [0.0, problem.correction - 0.05, problem.correction + 0.05, 1.0]
    assert left_over(held, problem.correction) < min(left_over(held, share) for share in shares)
    errors = {
        share: relative(new, fitted(share).solve(rank).factors.dense())
        for share in (0.0, problem.correction, 1.0)
    }
    assert errors[problem.correction] < min(errors[0.0], errors[1.0])


def test_without_drift_nothing_is_left_out_of_the_correction() -> None:
    given = case("frobenius", drift=0.0)
    problem = Sequential(
        given.weight, given.drift(), SOLVERS["frobenius"], ridge=RIDGE, correction=given.drift()
    )
    assert problem.correction == 1


def overfitting(tokens: int, seed: int) -> Case:
    """Returns one layer and one way to drift; another seed gives other tokens."""
    n = 48
    colour = square_root(second_moments(n, 5))
    x, noise = (colour @ gaussian(n, tokens, seed=100 + 2 * seed + i) for i in range(2))
    return Case(
        method="frobenius",
        weight=gaussian(n, n, seed=7),
        x=x,
        compressed=x + 0.3 * noise,
        fisher=torch.eye(n, dtype=torch.float64),
    )


def relative(given: Case, fitted: Tensor) -> float:
    energy = given.output_error(torch.zeros_like(fitted))
    return (given.output_error(fitted) / energy) ** 0.5


def degenerate(name: str, method: str) -> Case:
    """Returns inputs of which some or all are always zero, in one network or in both."""
    given = case(method, "square", tokens=12 if name == "few" else 100)
    x, compressed = given.x.clone(), given.compressed.clone()
    if name == "dead-channels":
        x[::3], compressed[::3] = 0, 0
    if name in ("all-zero", "dead-network"):
        compressed.zero_()
    if name == "all-zero":
        x.zero_()
    if name == "outlier":
        x[5], compressed[5] = 1e4 * x[5], 1e4 * compressed[5]
    if name == "no-gradient":
        return Case(**{**vars(given), "fisher": 0 * given.fisher})
    return Case(**{**vars(given), "x": x, "compressed": compressed})


NAMES = ["few", "dead-channels", "all-zero", "dead-network", "outlier", "no-gradient"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", METHODS)
def test_degenerate_inputs_are_fitted_to_finite_factors(method: str, name: str) -> None:
    given = degenerate(name, method)
    problem = given.problem
    for rank in (1, 8, 31):
        fitted = problem.solve(rank).factors.dense()
        assert torch.isfinite(fitted).all()
        assert problem.errors(fitted).metric == pytest.approx(
            problem.optimum(rank), rel=1e-6, abs=1e-9 * problem.total
        )
        assert given.output_error(fitted) >= problem.output_optimum(rank) - 1e-6 * problem.energy
        assert problem.errors(fitted).output == pytest.approx(
            given.output_error(fitted), rel=1e-6, abs=1e-9 * problem.energy
        )


def test_moments_that_are_not_finite_are_a_solve_error() -> None:
    given = case("frobenius")
    given.compressed[0, 0] = float("inf")
    with pytest.raises(SolveError, match="not positive definite"):
        _ = given.problem


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_stored_weights_of_any_dtype_are_solved_in_float64(method: str, dtype: torch.dtype) -> None:
    given = case(method)
    stored = given.weight.to(dtype)
    first, second = (Case(**{**vars(given), "weight": w}) for w in (stored, stored.double()))
    torch.testing.assert_close(own(first, 7), own(second, 7), rtol=0, atol=0)
    packed = pack(first.problem, 8, dtype)
    error = second.objective(dense(packed.packed))
    assert packed.error == pytest.approx(error, rel=1e-9)
    assert first.problem.optimum(8) <= error <= 1.05 * first.problem.optimum(8)


@pytest.mark.parametrize("method", METHODS)
def test_a_free_bias_makes_up_for_the_means_of_both_networks(method: str) -> None:
    given = case(method)
    x, compressed = given.x + 3, given.compressed + 2
    shifted = Case(**{**vars(given), "x": x, "compressed": compressed})
    problem = Sequential(
        given.weight,
        shifted.drift(center=True),
        SOLVERS[method],
        ridge=RIDGE,
        fisher=given.fisher if method == "curvature" else None,
    )
    fitted = problem.solve(8).factors.dense()
    shift = problem.shift(fitted)
    assert shift is not None
    difference = given.weight @ x - fitted @ compressed - shift[:, None]
    error = difference.square().sum().item() / x.shape[1]
    assert difference.mean(dim=1).abs().max() < 1e-9
    assert problem.errors(fitted).output == pytest.approx(error, rel=1e-9)
    assert problem.energy == pytest.approx((given.weight @ x).square().sum().item() / 300)
    assert error < 0.9 * shifted.output_error(own(shifted, 8))
    assert problem.shift(given.weight) is not None and given.problem.shift(fitted) is None
