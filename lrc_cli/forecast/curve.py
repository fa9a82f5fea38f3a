"""Spectra alone predict the errors and ranks of several sizes, before any factor is made."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lrc_cli.config import Config
from lrc_cli.engine import Choice, Predicted, tail_sums
from lrc_cli.errors import InputError
from lrc_cli.job.factors.decide_sequential import kept_fraction
from lrc_cli.job.plan import Plan, with_target
from lrc_cli.job.spectra.allocate import allocate, shares_relative_errors

SIZES = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)


def point_of(
    plan: Plan, granted: Mapping[str, Choice], predicted: Mapping[str, Predicted]
) -> dict[str, Any]:
    """Returns a size and its predicted errors: for exact factors before rounding, or as measured.

    Returns:
        `kept` is the fraction of the compressible weights' bytes. `relative_error` is the root mean
        square, over the layers, of a layer's error relative to its total, in the unit of the
        method's spectrum. Where every method predicts the loss, `loss_increase` is the sum of the
        layers' errors in the unit of the loss.
    """
    lost, relative = 0.0, list[float]()
    for layer in plan.layers:
        known, choice = predicted.get(layer.name), granted[layer.name]
        total = 0.0 if known is None else known.total
        if known is None or choice.is_dense or total <= 0:
            relative.append(0.0)
            continue
        error = _error(plan, choice, known)
        lost, relative = lost + error, [*relative, error / total]
    point = {
        "kept": kept_fraction(plan, granted),
        "relative_error": (sum(relative) / len(relative)) ** 0.5,
    }
    bounds_output = plan.config.compression.max_layer_error is not None
    if all(solver.predicts_loss for solver in plan.solvers) and not bounds_output:
        point["loss_increase"] = lost
    return point


def _error(plan: Plan, choice: Choice, known: Predicted) -> float:
    """Returns the predicted error of a layer that is factorised, in the unit of its spectrum."""
    if choice.rank is None:
        is_relative = shares_relative_errors(plan.config.compression)
        return choice.error * known.total if is_relative else choice.error
    return tail_sums(known.spectrum)[min(choice.rank, len(known.spectrum))].item()


def curve_of(plan: Plan, predicted: Mapping[str, Predicted]) -> list[dict[str, Any]]:
    """Returns `point_of` several sizes, with `size`. A size that cannot be reached is left out."""
    points = []
    for size in SIZES:
        sized = with_target(plan, _of_size(plan.config, size))
        try:
            granted = allocate(sized, predicted, {})
        except InputError:  # the config's target is checked elsewhere, and may be within reach
            continue
        points.append({"size": size, **point_of(sized, granted, predicted)})
    return points


def _of_size(config: Config, size: float) -> Config:
    other: dict[str, Any] = {"max_layer_error": None, "max_loss_increase": None, "threshold": None}
    return replace(config, compression=replace(config.compression, size=size, **other))
