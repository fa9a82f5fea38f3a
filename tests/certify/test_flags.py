"""Tensors of copies are flagged for what was done to them, and for nothing else."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lrc_cli.certify.flags import KINDS, find_flags
from lrc_cli.certify.grid import grid_facts
from lrc_cli.certify.weights import compare_all

Tensors = dict[str, Tensor]
LAYERS = 8
SHAPES = {"attn.weight": (32, 48), "up.weight": (64, 32), "norm.weight": (32,)}


def network() -> Tensors:
    """Returns the tensors of a network of eight layers."""
    chance = torch.Generator().manual_seed(0)
    found = {
        f"layers.{i}.{name}": torch.randn(shape, generator=chance)
        for i in range(LAYERS)
        for name, shape in SHAPES.items()
    }
    return {**found, "embed.weight": torch.randn(100, 32, generator=chance)}


def rounded(tensors: Tensors) -> Tensors:
    """Returns matrices rounded to a grid of 8 bits a row, as a quantised copy has them."""

    def to_grid(tensor: Tensor) -> Tensor:
        step = tensor.abs().amax(-1, keepdim=True) / 127
        return (tensor / step).round() * step

    return {name: to_grid(x) if x.ndim == 2 else x.clone() for name, x in tensors.items()}


def fine_tuned(tensors: Tensors) -> Tensors:
    """Returns matrices that moved by one percent, all of one kind about as far."""
    chance = torch.Generator().manual_seed(1)
    return {k: x + 0.01 * torch.randn(x.shape, generator=chance) for k, x in tensors.items()}


def pruned(tensors: Tensors) -> Tensors:
    """Returns matrices without the smaller half of their entries."""
    return {k: x * (x.abs() > x.abs().median()) if x.ndim == 2 else x for k, x in tensors.items()}


GOOD: dict[str, Callable[[Tensors], Tensors]] = {
    "the same": dict,
    "rounded": rounded,
    "fine-tuned": fine_tuned,
    "pruned": pruned,
    "in bfloat16": lambda tensors: {k: x.bfloat16() for k, x in tensors.items()},
}


@pytest.mark.parametrize("name", GOOD)
def test_a_good_copy_has_no_flag(name: str) -> None:
    original = network()
    copy = GOOD[name](original)
    assert find_flags(original, copy, compare_all(original, copy)) == ()


ATTN, UP, NORM = "layers.3.attn.weight", "layers.3.up.weight", "layers.3.norm.weight"


def swap(x: Tensors, one: str, other: str) -> None:
    x[one], x[other] = x[other], x[one]


def one_entry(x: Tensors, name: str, value: float) -> None:
    x[name] = x[name].clone()
    x[name].view(-1)[5] = value


BAD: dict[str, tuple[Callable[[Tensors], object], set[tuple[str, str]]]] = {
    "a constant": (lambda x: x.update({UP: x[UP] * 0 + 0.3}), {(UP, "constant")}),
    "zeros": (lambda x: x.update({UP: x[UP] * 0}), {(UP, "constant")}),
    "a constant row": (lambda x: x[UP].__setitem__(4, 0.1), {(UP, "constant")}),
    "a constant vector": (lambda x: x.update({NORM: x[NORM] * 0 + 1}), {(NORM, "constant")}),
    "two layers swapped": (
        lambda x: swap(x, ATTN, "layers.5.attn.weight"),
        {(ATTN, "another layer"), ("layers.5.attn.weight", "another layer")},
    ),
    "a layer twice": (
        lambda x: x.update({ATTN: x["layers.5.attn.weight"]}),
        {(ATTN, "another layer"), ("layers.5.attn.weight", "repeated")},
    ),
    "a NaN": (lambda x: one_entry(x, UP, float("nan")), {(UP, "not finite")}),
    "an infinity": (lambda x: one_entry(x, NORM, float("inf")), {(NORM, "not finite")}),
    "rows in another order": (lambda x: x.update({UP: x[UP].flip(0)}), {(UP, "permuted")}),
    "columns in another order": (lambda x: x.update({UP: x[UP].roll(3, 1)}), {(UP, "permuted")}),
    "pairs of rows in another order": (
        lambda x: x.update({UP: x[UP].view(2, 32, 32).transpose(0, 1).reshape(64, 32)}),
        {(UP, "permuted")},
    ),
    "a vector in another order": (
        lambda x: x.update({NORM: x[NORM].flip(0)}),
        {(NORM, "permuted")},
    ),
    "transposed halves": (lambda x: x.update({ATTN: x[ATTN].T}), {(ATTN, "shape")}),
    "missing": (lambda x: x.pop(UP), {(UP, "missing")}),
    "extra": (lambda x: x.update({"lora": torch.ones(3, 3)}), {("lora", "extra")}),
    "renamed": (lambda x: x.update({"up3": x.pop(UP)}), {(UP, "renamed")}),
    "scales off by two percent": (lambda x: x.update({UP: x[UP] * 1.02}), {(UP, "far")}),
    "noise": (lambda x: x.update({UP: x[UP] + 0.1 * torch.ones(32).sin()}), {(UP, "far")}),
    "other signs": (lambda x: x.update({ATTN: -x[ATTN]}), {(ATTN, "far")}),
}


@pytest.mark.parametrize("base", ["the same", "rounded", "fine-tuned"])
@pytest.mark.parametrize("name", BAD)
def test_a_bad_tensor_is_flagged_and_no_other_is(name: str, base: str) -> None:
    original = network()
    copy = {key: tensor.clone() for key, tensor in GOOD[base](original).items()}
    spoil, wanted = BAD[name]
    spoil(copy)
    found = find_flags(original, copy, compare_all(original, copy))
    assert {(flag.tensor, flag.kind) for flag in found} == wanted
    assert {kind for _, kind in wanted} <= set(KINDS) and all(flag.text for flag in found)


def test_scales_that_rounding_hides_are_flagged() -> None:
    """In four bits a scale that is two percent off hardly changes the error."""
    original = network()

    def coarse(tensor: Tensor) -> Tensor:
        step = tensor.abs().amax(-1, keepdim=True) / 7
        return (tensor / step).round() * step

    copy = {name: coarse(x) if x.ndim == 2 else x for name, x in original.items()}
    assert find_flags(original, copy, compare_all(original, copy)) == ()
    copy[UP] = copy[UP] * 1.03
    found = find_flags(original, copy, compare_all(original, copy))
    assert {(flag.tensor, flag.kind) for flag in found} == {(UP, "scale")}


def test_whole_numbers_are_compared() -> None:
    original = {"ids": torch.arange(4), "mask": torch.tensor([True, False])}
    copy = {"ids": torch.tensor([0, 1, 3, 2]), "mask": torch.tensor([True, False])}
    found = find_flags(original, copy, compare_all(original, copy))
    assert [(flag.tensor, flag.kind) for flag in found] == [("ids", "changed")]


@pytest.mark.parametrize(
    ("bits", "group", "levels"), [(8, 48, 255), (4, 48, 15), (4, 16, 15), (2, 48, 3)]
)
def test_a_grid_is_found_and_rounding_stays_within_half_a_step(
    bits: int, group: int, levels: int
) -> None:
    chance = torch.Generator().manual_seed(4)
    original = torch.randn(40, 48 * 8, generator=chance)
    parts = original.reshape(-1, group * 8)
    step = parts.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    copy = ((parts / step).round() * step).reshape(original.shape)
    found = grid_facts(original, copy)
    assert found is not None and found.group == group * 8
    assert levels - 1 <= found.levels <= levels
    assert found.beyond_half == 0 and found.largest <= 0.5 + 1e-3
    moved = copy.clone()
    moved.view(-1)[::10] += step.repeat_interleave(group * 8, 1).view(-1)[::10] * 2
    found = grid_facts(original, moved)
    assert found is not None and found.beyond_one > 0.05 and 1.4 < found.largest < 2.6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dense_numbers_lie_on_no_grid(dtype: torch.dtype) -> None:
    original = torch.randn(64, 256, generator=torch.Generator().manual_seed(5))
    assert grid_facts(original, original.to(dtype)) is None
    assert grid_facts(original, torch.zeros(64, 256)) is None
