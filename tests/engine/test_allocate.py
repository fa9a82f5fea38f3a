"""The allocator is held against brute force, and its choices against a spectrum."""

from itertools import pairwise, product

import pytest
import torch
from engine_helpers import storage_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lrc_cli.engine import (
    DENSE_STORAGE,
    STORAGES,
    Choice,
    Choices,
    Infeasible,
    Predicted,
    default_rank_multiple,
    tail_sums,
    uniform,
    uniform_within_error,
    within_bytes,
    within_error,
    within_layer_error,
)

Pairs = list[tuple[int, int]]

layers_of_pairs = st.lists(
    st.lists(st.tuples(st.integers(1, 60), st.integers(0, 100)), min_size=1, max_size=5),
    min_size=1,
    max_size=4,
)


def made(pairs: Pairs, unit: float = 1.0) -> Choices:
    return Choices([Choice("any", None, size, unit * error) for size, error in pairs])


def totals(layers: list[Pairs], picks: list[int]) -> tuple[int, int]:
    chosen = [layer[pick] for layer, pick in zip(layers, picks, strict=True)]
    return sum(size for size, _ in chosen), sum(error for _, error in chosen)


def everything(layers: list[Pairs]) -> list[tuple[int, int]]:
    return [
        (sum(size for size, _ in combination), sum(error for _, error in combination))
        for combination in product(*layers)
    ]


def largest_step(layers: list[Pairs], axis: int) -> int:
    """Returns the largest drop of coordinate `axis` between neighbours on a layer's lower hull."""
    return max(
        (a[axis] - b[axis] for layer in layers for a, b in neighbours(layer, axis)), default=0
    )


def neighbours(layer: Pairs, axis: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    other = 1 - axis
    hull: Pairs = []
    for point in sorted(layer, key=lambda p: (p[other], p[axis])):
        if hull and point[axis] >= hull[-1][axis]:
            continue
        while len(hull) > 1 and not convex(hull[-2], hull[-1], point, axis):
            hull.pop()
        hull.append(point)
    return list(pairwise(hull))


def convex(a: tuple[int, int], b: tuple[int, int], c: tuple[int, int], axis: int) -> bool:
    other = 1 - axis
    return (a[axis] - b[axis]) * (c[other] - b[other]) >= (b[axis] - c[axis]) * (
        b[other] - a[other]
    )


@settings(max_examples=150, deadline=None)
@given(layers=layers_of_pairs, share=st.floats(0, 1), unit=st.sampled_from([1e-15, 1.0, 1e9]))
def test_bytes_budget_is_within_one_step_of_brute_force(
    layers: list[Pairs], share: float, unit: float
) -> None:
    smallest = sum(min(size for size, _ in layer) for layer in layers)
    largest = sum(max(size for size, _ in layer) for layer in layers)
    budget = smallest + share * (largest - smallest)
    picks = within_bytes([made(layer, unit) for layer in layers], budget)
    num_bytes, error = totals(layers, picks)
    best = min(error for size, error in everything(layers) if size <= budget)
    assert num_bytes <= budget
    assert best <= error <= best + largest_step(layers, axis=1)


@settings(max_examples=150, deadline=None)
@given(layers=layers_of_pairs, share=st.floats(0, 1))
def test_error_bound_is_within_one_step_of_brute_force(layers: list[Pairs], share: float) -> None:
    smallest = sum(min(error for _, error in layer) for layer in layers)
    largest = sum(max(error for _, error in layer) for layer in layers)
    bound = smallest + share * (largest - smallest)
    num_bytes, error = totals(layers, within_error([made(layer) for layer in layers], bound))
    best = min(size for size, error in everything(layers) if error <= bound)
    assert error <= bound
    assert best <= num_bytes <= best + largest_step(layers, axis=0)


@settings(max_examples=50, deadline=None)
@given(layers=layers_of_pairs, bound=st.integers(0, 100))
def test_layer_bound_takes_the_smallest_choice_of_each_layer(
    layers: list[Pairs], bound: int
) -> None:
    choices = [made(layer) for layer in layers]
    worst = max(min(error for _, error in layer) for layer in layers)
    if worst > bound:
        with pytest.raises(Infeasible) as caught:
            within_layer_error(choices, bound)
        assert caught.value.smallest == worst
        return
    for layer, pick in zip(layers, within_layer_error(choices, bound), strict=True):
        assert layer[pick][1] <= bound
        assert layer[pick][0] == min(size for size, error in layer if error <= bound)


@settings(max_examples=50, deadline=None)
@given(layers=layers_of_pairs, share=st.floats(0.1, 1))
def test_uniform_gives_every_layer_the_same_share(layers: list[Pairs], share: float) -> None:
    dense = [max(size for size, _ in layer) for layer in layers]
    choices = [made(layer) for layer in layers]
    fits = [[p for p in layer if p[0] / d <= share] for layer, d in zip(layers, dense, strict=True)]
    if not all(fits):
        with pytest.raises(Infeasible):
            uniform(choices, dense, share)
        return
    for layer, pick, allowed in zip(layers, uniform(choices, dense, share), fits, strict=True):
        assert layer[pick] in allowed
        assert layer[pick][1] == min(error for _, error in allowed)


@settings(max_examples=50, deadline=None)
@given(layers=layers_of_pairs, share=st.floats(0, 1))
def test_uniform_for_an_error_takes_the_smallest_share(layers: list[Pairs], share: float) -> None:
    dense = [max(size for size, _ in layer) for layer in layers]
    choices = [made(layer) for layer in layers]
    best = sum(min(error for _, error in layer) for layer in layers)
    bound = best + share * 50
    picks = uniform_within_error(choices, dense, bound)
    assert totals(layers, picks)[1] <= bound
    used = max(layer[p][0] / d for layer, p, d in zip(layers, picks, dense, strict=True))
    smaller = [s for s in shares(layers, dense) if s < used]
    if smaller and max(smaller) >= max(
        min(shares([x], [d])) for x, d in zip(layers, dense, strict=True)
    ):
        assert totals(layers, uniform(choices, dense, max(smaller)))[1] > bound


def shares(layers: list[Pairs], dense: list[int]) -> list[float]:
    return [size / d for layer, d in zip(layers, dense, strict=True) for size, _ in layer]


def choices_of(
    spectrum: Tensor, m: int, n: int, storage: str = "auto", multiple: int | None = None
) -> Choices:
    """Returns every rank that pays, and dense."""
    ranks = STORAGES[storage].choices(
        (m, n),
        2,
        Predicted(spectrum=spectrum),
        rank_multiple=multiple or default_rank_multiple(m, n),
    )
    return Choices([*ranks, *DENSE_STORAGE.choices((m, n), 2)])


def decaying(m: int, n: int, strength: float) -> Choices:
    spectrum = strength * torch.logspace(0, -3, min(m, n), dtype=torch.float64)
    return choices_of(spectrum, m, n, multiple=1)


def test_more_bytes_never_cost_error_and_full_bytes_are_dense() -> None:
    sizes = [(48, 32), (32, 48), (32, 32), (16, 32)]
    layers = [decaying(m, n, 10.0**i) for i, (m, n) in enumerate(sizes)]
    dense = sum(2 * m * n for m, n in sizes)
    errors = []
    for step in range(20, 101, 2):
        picks = within_bytes(layers, dense * step / 100)
        errors.append(sum(c.errors[p].item() for c, p in zip(layers, picks, strict=True)))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0 and errors[0] > 0


def test_global_budget_favours_the_layer_that_matters() -> None:
    layers = [decaying(32, 32, 1.0), decaying(32, 32, 1e4)]
    picks = within_bytes(layers, 0.6 * 2 * 2 * 32 * 32)
    assert layers[0].num_bytes[picks[0]] < layers[1].num_bytes[picks[1]]


def test_twins_do_not_leave_the_budget_unspent() -> None:
    """Layers whose multipliers tie jump together; the greedy end must still use what is left."""
    layers: list[Pairs] = [[(1, 10), (11, 0)]] * 10
    picks = within_bytes([made(layer) for layer in layers], 60)
    assert totals(layers, picks) == (60, 50)


def test_infeasible_targets_name_the_smallest() -> None:
    layers = [made([(5, 3), (9, 1)]), made([(7, 2)])]
    with pytest.raises(Infeasible, match="12") as caught:
        within_bytes(layers, 11)
    assert caught.value.smallest == 12 and caught.value.unit == "bytes"
    with pytest.raises(Infeasible) as caught:
        within_error(layers, 2.5)
    assert caught.value.smallest == 3 and caught.value.unit == "error"
    with pytest.raises(Infeasible) as caught:
        uniform_within_error(layers, [9, 7], 2.5)
    assert caught.value.smallest == 3
    with pytest.raises(Infeasible) as caught:
        uniform(layers, [10, 10], 0.6)
    assert caught.value.smallest == pytest.approx(0.7)
    assert within_bytes(layers, 12) == [0, 0]
    assert within_error(layers, 3) == [1, 0]


@pytest.mark.parametrize("errors", [[-1.0], [float("nan")], [float("inf")], []])
def test_choices_without_a_meaning_are_refused(errors: list[float]) -> None:
    with pytest.raises(ValueError):
        Choices([Choice("any", None, 1, error) for error in errors])


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((2048, 1024), 32),  # whole tiles of a matrix unit
        ((1024, 1040), 8),  # tiles do not divide this side
        ((2048, 1016), 8),  # too few ranks would be left
        ((64, 24), 8),
        ((2048, 2047), 1),
    ],
)
def test_ranks_suit_the_matrix_unit_where_enough_are_left(
    shape: tuple[int, int], expected: int
) -> None:
    assert default_rank_multiple(*shape) == default_rank_multiple(*shape[::-1]) == expected


@pytest.mark.parametrize("storage", ["factors", "interpolative", "auto"])
@pytest.mark.parametrize(("m", "n"), [(40, 24), (24, 40), (33, 17), (8, 8), (1, 20)])
@pytest.mark.parametrize("multiple", [None, 1, 4])
def test_rank_choices_are_every_rank_that_pays(
    storage: str, m: int, n: int, multiple: int | None
) -> None:
    spectrum = torch.rand(min(m, n), dtype=torch.float64).sort(descending=True).values
    choices = choices_of(spectrum, m, n, storage, multiple)
    step = multiple or (8 if m % 8 == 0 and n % 8 == 0 else 1)
    assert step == (multiple or default_rank_multiple(m, n))
    expected = [
        (rank, size, spectrum[rank:].sum().item())
        for rank in range(step, min(m - 1, n) + 1, step)
        for block in [8 if m % 8 == 0 and rank % 8 == 0 else 1]
        for size in [storage_bytes(storage, m, n, rank, 2, block)]
        if size < 2 * m * n
    ]
    assert [x.rank for x in choices.each] == [*(rank for rank, _, _ in expected), None]
    assert {x.form for x in choices.each[:-1]} <= {storage} and choices.each[-1].is_dense
    expected.append((0, 2 * m * n, 0.0))
    assert choices.num_bytes.tolist() == [size for _, size, _ in expected]
    assert choices.errors.tolist() == pytest.approx([error for _, _, error in expected])


def test_interpolative_storage_reaches_a_higher_rank_in_the_same_bytes() -> None:
    spectrum = torch.ones(576, dtype=torch.float64)
    budget = 0.8 * 2 * 576 * 576
    ranks = {}
    for storage in ("factors", "interpolative"):
        choices = choices_of(spectrum, 576, 576, storage)
        ranks[storage] = choices.each[within_bytes([choices], budget)[0]].rank
    assert ranks == {"factors": 224, "interpolative": 312}


def test_tails_keep_small_values() -> None:
    spectrum = torch.tensor([1.0, 1e-20, 1e-20], dtype=torch.float64)
    assert tail_sums(spectrum).tolist() == [1.0, 2e-20, 1e-20, 0.0]
