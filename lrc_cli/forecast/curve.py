"""What sizes cost, from spectra alone: predicted errors and ranks, before any factor is made."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lrc_cli.config import Config
from lrc_cli.engine import DENSE, tails
from lrc_cli.errors import InputError
from lrc_cli.job.factors.decide_sequential import granted_share
from lrc_cli.job.plan import Plan, with_target
from lrc_cli.job.spectra.ranks import allocate_ranks
from lrc_cli.job.work import Tensors

SIZES = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)


def point_of(plan: Plan, ranks: Mapping[str, int], spectra: Tensors) -> dict[str, Any]:
    """A size and its predicted errors, for the exact factors of these ranks, before rounding.

    Returns:
        `kept`, the share of the compressible weights' bytes; `relative_error`, the root mean square
        over the layers of each one's error relative to its total, in the unit of its method's
        spectrum; and where every method predicts the loss, `loss_increase`, the sum of the layers'
        errors in the unit of the loss.
    """
    lost, relative = 0.0, list[float]()
    for layer in plan.layers:
        spectrum, rank = spectra.get(layer.name), ranks[layer.name]
        total = 0.0 if spectrum is None else spectrum.sum().item()
        if spectrum is None or rank == DENSE or total <= 0:
            relative.append(0.0)
            continue
        error = tails(spectrum)[min(rank, len(spectrum))].item()
        lost, relative = lost + error, [*relative, error / total]
    point = {
        "kept": granted_share(plan, ranks),
        "relative_error": (sum(relative) / len(relative)) ** 0.5,
    }
    bounds_output = plan.config.compression.max_layer_error is not None
    if all(solver.predicts_loss for solver in plan.solvers) and not bounds_output:
        point["loss_increase"] = lost
    return point


def curve_of(plan: Plan, spectra: Tensors) -> list[dict[str, Any]]:
    """`point_of` several sizes with their `size`; those that cannot be reached are left out."""
    points = []
    for size in SIZES:
        sized = with_target(plan, _of_size(plan.config, size))
        try:
            ranks = allocate_ranks(sized, spectra)
        except InputError:  # the config's own target is checked elsewhere, and may well be reached
            continue
        points.append({"size": size, **point_of(sized, ranks, spectra)})
    return points


def _of_size(config: Config, size: float) -> Config:
    other: dict[str, Any] = {"max_layer_error": None, "max_loss_increase": None, "threshold": None}
    return replace(config, compression=replace(config.compression, size=size, **other))
