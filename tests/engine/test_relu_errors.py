"""Errors behind a ReLU are tested entry by entry: the majorant, the slopes, the best biases."""

from collections.abc import Callable

import pytest
import torch
from engine_helpers import gaussian
from torch import Tensor

from lrc_cli.engine.solvers.relu_errors import (
    best_offset,
    majorant,
    majorant_slope,
    refined_offset,
    true_error,
    true_slope,
)

Entrywise = Callable[[Tensor, Tensor], Tensor]


def pairs(seed: int) -> tuple[Tensor, Tensor]:
    """Returns pre-activations (60, 7) and targets: some columns mixed, one dead, one alive."""
    pre, target = gaussian(60, 7, seed=seed), gaussian(60, 7, seed=seed + 1).relu()
    target[:, 0] = 0
    pre[:, 1] += 10
    return pre, target


def test_the_majorant_is_nowhere_below_and_touches_where_pre_activations_are_not_negative() -> None:
    pre, target = pairs(1)
    upper, true = majorant(pre, target), true_error(pre, target)
    assert (upper >= true - 1e-12).all() and (upper > true + 1e-6).any()
    touching = (pre >= 0) | (target == 0)
    torch.testing.assert_close(upper[touching], true[touching])


def test_no_convex_function_that_touches_lies_lower() -> None:
    # Left of 0 a convex function is at least its tangent at 0, which has f's slope there.
    pre, target = pairs(2)
    origin = torch.zeros_like(target)
    slope = (true_error(origin + 1e-7, target) - true_error(origin, target)) / 1e-7
    tangent = true_error(origin, target) + slope * pre
    negative = pre < 0
    torch.testing.assert_close(
        majorant(pre, target)[negative], tangent[negative], atol=1e-6, rtol=0
    )


def test_the_majorant_is_convex_along_segments_and_the_true_error_is_not() -> None:
    (first, target), (second, _) = pairs(3), pairs(5)
    for function, convex in ((majorant, True), (true_error, False)):
        middle = function((first + second) / 2, target)
        mean = (function(first, target) + function(second, target)) / 2
        assert bool((middle <= mean + 1e-12).all()) == convex


@pytest.mark.parametrize(
    ("function", "slope"), [(majorant, majorant_slope), (true_error, true_slope)]
)
def test_slopes_are_those_of_autograd(function: Entrywise, slope: Entrywise) -> None:
    pre, target = pairs(7)
    (expected,) = torch.autograd.grad(function(pre.requires_grad_(), target).sum(), pre)
    torch.testing.assert_close(slope(pre.detach(), target), expected)


def test_a_quadratic_of_curvature_one_majorises_the_true_error_at_any_point() -> None:
    (pre, target), (other, _) = pairs(9), pairs(11)
    step = other - pre
    upper = true_error(pre, target) + true_slope(pre, target) * step + step.square() / 2
    assert (true_error(other, target) <= upper + 1e-12).all()


def test_the_best_offset_is_a_stationary_point_and_keeps_dead_columns_dead() -> None:
    pre, target = pairs(13)
    offset = best_offset(pre, target)
    torch.testing.assert_close((pre + offset).relu().sum(0), target.sum(0))
    least = majorant(pre + offset, target).sum(0)
    for change in (-1.0, -1e-3, 1e-3, 1.0):
        assert (majorant(pre + offset + change, target).sum(0) >= least - 1e-12).all()
    assert not (pre + offset)[:, 0].relu().any()


def test_a_refined_offset_is_rounded_and_no_worse_than_any_start() -> None:
    pre, target = pairs(15)
    starts = [gaussian(7, seed=17), torch.zeros(7, dtype=torch.float64)]
    offset = refined_offset(pre, target, starts, torch.bfloat16)
    assert torch.equal(offset, offset.bfloat16().double())
    error = true_error(pre + offset, target).sum(0)
    for start in starts:
        rounded = start.bfloat16().double()
        assert (error <= true_error(pre + rounded, target).sum(0) + 1e-12).all()
    assert (error < 0.99 * true_error(pre + starts[1], target).sum(0)).any()
