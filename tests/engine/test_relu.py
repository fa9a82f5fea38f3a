"""Layers followed by a ReLU are solved: the convex programme, and what is made of its solution."""

import pytest
import torch
from engine_helpers import DEVICES, gaussian, granted, pack
from torch import Tensor

from lrc_cli.engine import (
    FROBENIUS,
    RELU,
    SOLVERS,
    SVD,
    Rectified,
    SameInput,
    Solution,
    Statistics,
    Unpolished,
)
from lrc_cli.engine.solvers.relu_errors import best_offset
from lrc_cli.engine.solvers.relu_programme import Programme, programme
from lrc_cli.forms import dense
from lrc_cli.job.factors.fit import Request, fit_best

Layer = tuple[Tensor, Tensor | None, Tensor]
"""W (m, n), b (m,) and X^T (T, n)."""

KINDS = ("tall", "wide", "alive", "dead", "deficient", "few-tokens", "no-bias", "planted", "zero")


def layer(kind: str) -> Layer:
    """Returns a small layer with correlated inputs that are not centred, by name."""
    m, n = (16, 24) if kind == "wide" else (24, 16)
    tokens = 10 if kind == "few-tokens" else 300
    mixing = gaussian(n, n, seed=1) * torch.logspace(0, -1.5, n, dtype=torch.float64)
    x = gaussian(tokens, n, seed=2) @ mixing.T + 0.5 * gaussian(n, seed=3)
    weight, bias = gaussian(m, n, seed=4) / n**0.5, 0.3 * gaussian(m, seed=5)
    if kind == "deficient":
        x = x[:, :5] @ gaussian(5, n, seed=6)
    if kind == "planted":  # rank 4 where anything is alive, and much energy where nothing is
        weight[:12] = gaussian(12, 4, seed=7) @ gaussian(4, n, seed=8) / n**0.5
        weight[12:] *= 10
    reach = (x @ weight.T).abs().amax(dim=0) + 1
    if kind == "planted":
        bias[12:] = -2 * reach[12:]
    if kind in ("alive", "dead"):
        bias = 2 * reach if kind == "alive" else -2 * reach
    if kind == "zero":
        x = torch.zeros_like(x)
    return weight, None if kind == "no-bias" else bias, x


def problem(
    data: Layer,
    dtype: torch.dtype = torch.float64,
    ridge: float = 1e-2,
    solver: type[Rectified] = Rectified,
) -> Rectified:
    weight, bias, x = data
    return solver(weight, bias, statistics(x), x, dtype=dtype, ridge=ridge)


def statistics(x: Tensor) -> Statistics:
    return Statistics(gram=x.T @ x / len(x))


def behind_relu(data: Layer, fitted: Tensor, bias: Tensor | None) -> float:
    """Returns ||relu(W X + b) - relu(Z X + b^)||^2 / T, straight from the definition."""
    weight, old, x = data
    wanted = (x @ weight.T + (0 if old is None else old)).relu()
    given = (x @ fitted.T + (0 if bias is None else bias)).relu()
    return (wanted - given).square().sum().item() / len(x)


def frobenius(data: Layer, rank: int) -> Tensor:
    return FROBENIUS.factorize(data[0], statistics(data[2]), rank).dense()


class Reference:
    """Solves the convex programme in autograd, without the engine: over A = Z R and b^."""

    def __init__(self, data: Layer, ridge: float) -> None:
        self.weight, bias, self.x = data
        self.free = bias is not None
        self.target = (self.x @ self.weight.T + (0 if bias is None else bias)).relu()
        centred = self.x - self.x.mean(0) if self.free else self.x
        gram = centred.T @ centred / len(self.x)
        self.ridge = ridge * gram.diagonal().mean().item()
        self.alive = (self.target > 0).double().mean(0)[:, None]
        self.root = torch.linalg.cholesky(gram + self.ridge * torch.eye(len(gram)).double())

    def smooth(self, point: Tensor, bias: Tensor) -> Tensor:
        matrix = torch.linalg.solve(self.root.T, point.T).T
        pre = self.x @ matrix.T + bias
        fit = 0.5 * pre.relu() ** 2 - self.target * pre + 0.5 * self.target**2
        return fit.sum() / len(self.x) + self.ridge / 2 * self.off(matrix)

    def off(self, matrix: Tensor) -> Tensor:
        return (self.alive * (self.weight - matrix).square()).sum()

    def gradients(self, point: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        leaves = point.detach().requires_grad_(), bias.detach().requires_grad_()
        by_point, by_bias = torch.autograd.grad(self.smooth(*leaves), leaves)
        return by_point, by_bias * self.free

    def minimum(self, penalty: float, start: Tensor, steps: int = 1500) -> float:
        """Returns the least value by plain proximal gradient steps, from far away."""
        point, bias = start, torch.zeros(len(self.weight)).double()
        curvature = 1 + self.x.mean(0).square().sum() / self.ridge + 1
        rate = 1.0 / min(curvature.item(), 30.0)
        for _ in range(steps):
            by_point, by_bias = self.gradients(point, bias)
            u, s, vt = torch.linalg.svd(point - rate * by_point, full_matrices=False)
            point, bias = u * (s - rate * penalty).clamp(min=0) @ vt, bias - rate * by_bias
        nuclear = torch.linalg.svdvals(point).sum()
        return (self.smooth(point, bias) + penalty * nuclear).item()


def own_programme(data: Layer, ridge: float = 1e-2) -> Programme:
    weight, bias, x = data
    mean = x.mean(0)
    gram = x.T @ x / len(x)
    centred = gram if bias is None else gram - torch.outer(mean, mean)
    return programme(weight, bias, x, centred, mean, ridge)


def best_bias(reference: Reference, own: Programme, point: Tensor) -> Tensor:
    if not reference.free:
        return torch.zeros(len(point)).double()
    return best_offset(reference.x @ own.unwhitened(point).T, reference.target)


@pytest.mark.parametrize("kind", ["tall", "wide", "deficient", "few-tokens", "no-bias", "planted"])
def test_the_convex_solution_satisfies_its_optimality_conditions(kind: str) -> None:
    data = layer(kind)
    reference, own = Reference(data, 1e-2), own_programme(data)
    found = own.convex(4, tolerance=1e-9, max_steps=4000)
    bias = best_bias(reference, own, found.point)
    by_point, by_bias = reference.gradients(found.point, bias)
    nuclear = torch.linalg.svdvals(found.point).sum().item()
    assert nuclear > 0 and found.penalty > 0
    value = reference.smooth(found.point, bias).item() + found.penalty * nuclear
    assert found.objective == pytest.approx(value, rel=1e-9)
    assert by_bias.abs().max() < 1e-9
    assert torch.linalg.matrix_norm(by_point, 2).item() <= found.penalty * (1 + 1e-6)
    aligned = torch.sum(by_point * found.point).item()
    assert aligned == pytest.approx(-found.penalty * nuclear, abs=1e-7 * value)


@pytest.mark.parametrize("kind", ["tall", "no-bias"])
def test_the_gap_bounds_the_distance_from_a_brute_force_minimum(kind: str) -> None:
    data = layer(kind)
    reference, own = Reference(data, 1e-2), own_programme(data)
    tight = own.convex(4, tolerance=1e-9, max_steps=4000)
    least = reference.minimum(tight.penalty, torch.zeros_like(tight.point))
    assert tight.gap <= 1e-9 * tight.objective
    assert tight.objective == pytest.approx(least, rel=1e-3)
    assert tight.objective <= least * (1 + 1e-9)
    for steps in (0, 1, 2, 5):
        early = own.convex(4, tolerance=0.0, max_steps=steps)
        assert early.steps == steps
        # Objective and gap belong to the point that is returned, not to an earlier point.
        bias = best_bias(reference, own, early.point)
        nuclear = torch.linalg.svdvals(early.point).sum()
        value = reference.smooth(early.point, bias) + early.penalty * nuclear
        assert early.objective == pytest.approx(value.item(), rel=1e-9)
        assert early.objective - tight.objective <= early.gap + 1e-9 * tight.objective


def test_where_nothing_dies_the_convex_solution_is_the_soft_threshold() -> None:
    weight, _, x = data = layer("alive")
    own = own_programme(data, ridge=1e-9)
    found = own.convex(4, tolerance=1e-9)
    outputs = (x - x.mean(0)) @ weight.T / len(x) ** 0.5
    u, s, vt = torch.linalg.svd(outputs, full_matrices=False)
    expected = u * (s - s[4]).clamp(min=0) @ vt
    given = (x - x.mean(0)) @ own.unwhitened(found.point).T / len(x) ** 0.5
    torch.testing.assert_close(given, expected, atol=1e-5, rtol=0)
    assert found.penalty == pytest.approx(s[4].item(), rel=1e-6)


class SimpleInstead(Rectified):
    """Puts plain SVD in the solver's place, with the best bias found for it."""

    def solve(self, rank: int) -> Solution:
        factors = SVD.factorize(self.weight, Statistics(), rank)
        return Solution(factors, factors.dense())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [1, 4, 9])
def test_never_above_frobenius_behind_the_relu(kind: str, rank: int) -> None:
    check_never_above_frobenius(Rectified, kind, rank)


@pytest.mark.parametrize("kind", ["tall", "wide", "no-bias", "planted", "deficient", "few-tokens"])
def test_the_check_fails_with_plain_svd_in_place_of_relu(kind: str) -> None:
    with pytest.raises(AssertionError):
        check_never_above_frobenius(SimpleInstead, kind, 4)


def check_never_above_frobenius(solver: type[Rectified], kind: str, rank: int) -> None:
    data = layer(kind)
    own = problem(data, solver=solver)
    solution = own.solve(rank)
    fitted = solution.factors.dense()
    error = own.errors(fitted).metric
    assert solution.factors.rank <= rank and torch.linalg.matrix_rank(fitted) <= rank
    assert error <= behind_relu(data, frobenius(data, rank), data[1]) * (1 + 1e-12)
    if kind in ("dead", "zero"):
        assert error == 0
    elif kind in ("tall", "wide", "no-bias", "planted"):
        assert error < 0.99 * behind_relu(data, frobenius(data, rank), data[1])


def test_below_frobenius_by_far_where_dead_outputs_have_most_energy() -> None:
    data = layer("planted")
    own = problem(data)
    # Rank 4 is exact where anything is alive.
    assert own.errors(own.solve(4).factors.dense()).metric < 1e-3 * behind_relu(
        data, frobenius(data, 4), data[1]
    )
    assert own.facts["relu"][0]["start"] == "convex"


def test_where_nothing_dies_it_is_the_best_solution_with_a_free_bias() -> None:
    weight, _, x = data = layer("alive")
    own = problem(data, ridge=1e-9)
    outputs = (x - x.mean(0)) @ weight.T
    tail = torch.linalg.svdvals(outputs)[4:].square().sum().item() / len(x)
    found = own.errors(own.solve(4).factors.dense())
    assert found.metric == pytest.approx(tail, rel=1e-6)
    assert found.output == pytest.approx(tail, rel=1e-6)
    assert own.output_optimum(4) == pytest.approx(tail, rel=1e-9)


@pytest.mark.parametrize("kind", ["tall", "wide", "no-bias"])
def test_no_small_change_of_the_solution_does_better(kind: str) -> None:
    weight, old, _ = data = layer(kind)
    own = problem(data, ridge=1e-6)
    outer, inner = own.solve(4).factors
    shift = own.shift(outer @ inner)
    bias = torch.zeros(len(weight)).double() if old is None or shift is None else old + shift
    least = own.errors(outer @ inner).metric
    for seed in range(40):
        size = 10.0 ** -(1 + seed % 4)
        changed = (outer + size * outer.std() * gaussian(*outer.shape, seed=seed)) @ (
            inner + size * inner.std() * gaussian(*inner.shape, seed=100 + seed)
        )
        moved = bias if old is None else bias + size * 0.1 * gaussian(len(bias), seed=200 + seed)
        assert behind_relu(data, changed, moved) > least * (1 - 2e-3)


@pytest.mark.parametrize("kind", ["tall", "wide", "no-bias"])
@pytest.mark.parametrize("start", ["solution", "frobenius", "random"])
def test_gradient_descent_on_the_error_itself_gains_next_to_nothing(kind: str, start: str) -> None:
    """The challenger of the same rank is optimised locally: Adam on both factors and the bias."""
    weight, old, x = data = layer(kind)
    own = problem(data, ridge=1e-6)
    least = own.errors(own.solve(4).factors.dense()).metric
    outer, inner = {
        "solution": own.solve(4).factors,
        "frobenius": FROBENIUS.factorize(weight, statistics(x), 4),
        "random": (gaussian(len(weight), 4, seed=11) / 2, gaussian(4, x.shape[1], seed=12) / 2),
    }[start]
    shift = own.shift(outer @ inner)
    bias = torch.zeros(len(weight)).double() if old is None or shift is None else old + shift
    leaves = [tensor.clone().requires_grad_() for tensor in (outer, inner, bias)]
    optimizer = torch.optim.Adam(leaves if old is not None else leaves[:2], lr=3e-3)
    wanted = (x @ weight.T + (0 if old is None else old)).relu()
    found = []
    for _ in range(800):
        optimizer.zero_grad()
        pre = x @ leaves[1].T @ leaves[0].T + leaves[2]
        error = (wanted - pre.relu()).square().sum() / len(x)
        error.backward()
        optimizer.step()
        found.append(error.item())
    assert min(found) < found[0], "the challenger has not moved"
    assert min(found) > least * (1 - 2e-3)


@pytest.mark.parametrize("kind", ["tall", "no-bias", "few-tokens"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_errors_are_those_of_the_matrix_with_its_rounded_bias(
    kind: str, dtype: torch.dtype
) -> None:
    weight, old, x = data = layer(kind)
    own = problem(data, dtype)
    for fitted in (SVD.factorize(weight, Statistics(), 3).dense(), weight, 0 * weight):
        errors, shift = own.errors(fitted), own.shift(fitted)
        bias = None if old is None or shift is None else (old + shift).to(dtype).double()
        assert (shift is None) == (old is None)
        assert errors.metric == pytest.approx(behind_relu(data, fitted, bias), abs=1e-12)
        change = 0 if bias is None or old is None else old - bias
        output = (x @ (weight - fitted).T + change).square().sum().item() / len(x)
        assert errors.output == pytest.approx(output, rel=1e-9, abs=1e-12)
    dead = torch.full((len(weight),), -torch.inf, dtype=torch.float64)
    assert own.total == pytest.approx(behind_relu(data, 0 * weight, dead))
    simple = SVD.factorize(weight, Statistics(), 3).dense()
    assert own.svd_errors(3).metric == pytest.approx(behind_relu(data, simple, old), abs=1e-12)


@pytest.mark.parametrize("kind", ["tall", "alive", "planted", "no-bias", "dead"])
@pytest.mark.parametrize("storage", ["factors", "interpolative", "auto"])
def test_rounded_it_is_still_not_above_frobenius(kind: str, storage: str) -> None:
    (weight, bias, x), dtype = layer(kind), torch.bfloat16
    data = weight.to(dtype).double(), None if bias is None else bias.to(dtype).double(), x
    request = Request(choice=granted(storage, 8), dtype=dtype, bias=data[1])
    judge = problem(data, dtype)
    fitted = fit_best([judge, Unpolished(judge)], request)
    plain = SameInput(data[0], statistics(x), FROBENIUS)
    packed = pack(plain, 8, dtype, storage).packed
    assert fitted.packed is not None and fitted.facts.errors is not None
    new = None if fitted.bias is None else fitted.bias.double()
    error = behind_relu(data, dense(fitted.packed), new)
    assert error <= behind_relu(data, dense(packed), data[1]) * (1 + 1e-9)
    stored = fitted.facts.errors.metric.stored
    assert stored == pytest.approx(error, rel=1e-6, abs=1e-12)
    assert fitted.facts.errors.metric.optimum is None


@pytest.mark.parametrize("device", DEVICES)
def test_float32_activations_give_the_same_on_every_device(device: str) -> None:
    weight, bias, x = data = layer("tall")
    assert bias is not None
    gram = statistics(x).gram
    assert gram is not None
    moved = Rectified(
        weight.to(device), bias.to(device), Statistics(gram=gram.to(device)), x.float().to(device)
    )
    exact = problem(data)
    errors = [p.errors(p.solve(4).factors.dense()).metric for p in (moved, exact)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-2)
    again = Rectified(
        weight.to(device), bias.to(device), Statistics(gram=gram.to(device)), x.float().to(device)
    )
    if device == "cpu":
        assert torch.equal(again.solve(4).factors.inner, moved.solve(4).factors.inner)


def test_inputs_far_from_zero_keep_their_digits() -> None:
    """The given Gram matrix has lost its varying part to rounding in float32."""
    weight, bias, x = layer("tall")
    assert bias is not None
    x = (x + 1e3).float()
    bias = bias - weight @ x.double().mean(0)
    gram = (x.T @ x).double() / len(x)
    own = Rectified(weight, bias, Statistics(gram=gram), x)
    fitted = own.solve(4).factors.dense()
    errors, shift = own.errors(fitted), own.shift(fitted)
    assert shift is not None
    output = (x.double() @ (weight - fitted).T - shift).square().sum().item() / len(x)
    assert errors.output == pytest.approx(output, rel=1e-5)
    behind = behind_relu((weight, bias, x.double()), fitted, bias + shift)
    assert errors.metric == pytest.approx(behind, rel=1e-3)


def test_ranks_come_from_the_spectra_of_frobenius() -> None:
    weight, _, x = layer("tall")
    assert SOLVERS["relu"] is RELU and RELU.needs == FROBENIUS.needs
    torch.testing.assert_close(
        RELU.spectrum(weight, statistics(x)), FROBENIUS.spectrum(weight, statistics(x))
    )
