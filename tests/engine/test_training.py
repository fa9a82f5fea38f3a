"""Tests of training tensors: never worse, stored in their dtype, resumed with the same result."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lrc_cli.engine import training
from lrc_cli.engine.training import RATES, Trainee, Training, learning_rate


class Quadratic:
    """Half the squared distance of a product from a target; the held-out data has another one.

    Args:
        spoil: called with the number of the call of `add_gradients`; changes its value.
    """

    def __init__(self, *, gap: float = 0.0, spoil: Callable[[int], float] = lambda _: 1.0) -> None:
        torch.manual_seed(0)
        self.outer, self.inner = (nn.Parameter(torch.randn(shape)) for shape in ((6, 2), (2, 5)))
        self.target = torch.randn(6, 5)
        self.unseen = self.target + gap * torch.randn(6, 5)
        self.spoil, self.calls = spoil, 0
        self.seen: list[Tensor] = []

    def trainees(self, dtype: torch.dtype = torch.float32) -> list[Trainee]:
        for parameter in (self.outer, self.inner):
            parameter.data = parameter.data.to(dtype).float()
        return [
            Trainee(name="outer", parameter=self.outer, dtype=dtype),
            Trainee(name="inner", parameter=self.inner, dtype=dtype),
        ]

    def add_gradients(self, step: int) -> float:
        noise = torch.randn(6, 5, generator=torch.Generator().manual_seed(step))
        distance = 0.5 * (self.outer @ self.inner - self.target - 0.1 * noise).square().sum()
        distance.backward()
        self.calls += 1
        return distance.item() * self.spoil(self.calls)

    def held_out(self) -> float:
        with torch.no_grad():
            self.seen.append(self.outer.detach().clone())
            return 0.5 * (self.outer @ self.inner - self.unseen).square().sum().item()


def best_value(objective: Quadratic, tensors: dict[str, Tensor]) -> float:
    matrix = tensors["outer"].float() @ tensors["inner"].float()
    return 0.5 * (matrix - objective.unseen).square().sum().item()


def finished(objective: Quadratic, num_steps: int = 60, **given: torch.dtype) -> Training:
    found = Training(objective, objective.trainees(**given), num_steps=num_steps)
    for _ in found.run():
        pass
    return found


def test_training_lowers_the_objective_on_held_out_data() -> None:
    objective = Quadratic()
    found = finished(objective)
    assert found.lowest < 0.5 * found.start
    assert found.lowest == pytest.approx(best_value(objective, found.best), rel=1e-6)
    assert found.gained and found.is_done


def test_the_best_tensors_are_judged_in_their_dtype() -> None:
    objective = Quadratic()
    found = finished(objective, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in found.best.values()} == {torch.bfloat16}
    assert found.lowest == pytest.approx(best_value(objective, found.best), rel=1e-6)
    # Every tensor that was judged can be stored without a change.
    assert all(torch.equal(seen, seen.bfloat16().float()) for seen in objective.seen)


@pytest.mark.parametrize("num_steps", [1, 2, 9, 40])
@pytest.mark.parametrize("gap", [0.0, 0.5, 30.0])
def test_the_outcome_is_never_worse_than_the_start(num_steps: int, gap: float) -> None:
    objective = Quadratic(gap=gap)
    start = best_value(objective, {x.name: x.rounded() for x in objective.trainees()})
    found = finished(objective, num_steps)
    assert found.start == pytest.approx(start, rel=1e-6)
    assert best_value(objective, found.best) <= start * (1 + 1e-6)
    assert found.lowest <= found.start


def test_a_start_at_the_optimum_stays_bit_for_bit() -> None:
    objective = Quadratic()
    objective.unseen = (objective.outer @ objective.inner).detach()
    before = {x.name: x.rounded() for x in objective.trainees()}
    found = finished(objective)
    assert not found.gained and found.step < 60
    assert all(torch.equal(found.best[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("first_bad_call", [1, 4, 25, 40])
def test_a_value_that_is_not_finite_ends_the_training_with_the_best_so_far(
    first_bad_call: int,
) -> None:
    objective = Quadratic(spoil=lambda call: math.nan if call >= first_bad_call else 1.0)
    found = finished(objective)
    assert found.lowest <= found.start
    assert found.step < 60
    assert all(bool(tensor.isfinite().all()) for tensor in found.best.values())


@pytest.mark.parametrize("stop", [1, 2, 3, 7, 20, 33, 62])
def test_a_training_that_was_stored_and_loaded_gives_the_same_bits(stop: int) -> None:
    whole = finished(Quadratic(gap=0.3), dtype=torch.bfloat16)
    first = Quadratic(gap=0.3)
    begun = Training(first, first.trainees(torch.bfloat16), num_steps=60)
    for count, _ in enumerate(begun.run(), 1):
        if count == stop:
            break
    tensors, facts = begun.state()
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    second = Quadratic(gap=0.3)
    again = Training(second, second.trainees(torch.bfloat16), num_steps=60)
    again.load(copies, facts)
    for _ in again.run():
        pass
    assert (again.lowest, again.step, again.trials) == (whole.lowest, whole.step, whole.trials)
    assert all(torch.equal(again.best[name], tensor) for name, tensor in whole.best.items())


def test_a_training_that_gains_nothing_more_ends_early() -> None:
    objective = Quadratic(gap=30.0)
    assert finished(objective, 1000).step < 1000


@pytest.mark.parametrize(
    ("values", "tried", "chosen"),
    [
        ([7, 6, 5, 4, 3, 4, 5], {2, 3, 4, 5}, 4),
        ([9, 8, 7, 6, 5, 4, 3], {2, 3, 4, 5, 6}, 6),
        ([1, 2, 3, 4, 5, 6, 7], {2, 3, 1, 0}, 0),
        ([7, 6, 5, 4, 3, 2, 7], {2, 3, 4, 5, 6}, 5),
        ([5, 4, math.inf, math.inf, math.inf, math.inf, math.inf], {2, 3, 1, 0}, 1),
        ([math.inf] * 7, {2, 3, 1, 0}, 0),
    ],
    ids=["middle", "highest", "lowest", "second", "high rates fail", "all fail"],
)
def test_the_search_walks_towards_lower_values(
    monkeypatch: pytest.MonkeyPatch, values: list[float], tried: set[int], chosen: int
) -> None:
    objective = Quadratic()
    found = Training(objective, objective.trainees(), num_steps=1)
    monkeypatch.setattr(found, "_trial", lambda rate: float(values[RATES.index(rate)]))
    for _ in found.run():
        pass
    assert {*found.trials} == tried
    assert found.rate == RATES[chosen]


@pytest.mark.parametrize("num_steps", [1, 2, 3, 20, 1000])
def test_the_rate_rises_to_one_and_falls_to_nearly_nothing(num_steps: int) -> None:
    rates = [learning_rate(step, num_steps) for step in range(num_steps)]
    assert max(rates) == 1.0 and min(rates) > 0
    top = rates.index(1.0)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert num_steps < 100 or rates[-1] < 1e-4


def test_a_step_is_relative_to_the_size_of_a_tensor() -> None:
    small, large = (Quadratic() for _ in range(2))
    for objective, scale in ((small, 1.0), (large, 1024.0)):
        objective.outer.data *= scale
        objective.inner.data /= scale
    one, other = finished(small, 20), finished(large, 20)
    assert one.lowest == pytest.approx(other.lowest, rel=1e-3)
    assert training.RATES == RATES
