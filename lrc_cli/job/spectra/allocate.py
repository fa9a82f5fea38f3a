"""Predicted errors, overrides and the target decide what every layer is granted.

Nothing here reads data or solves a problem.
"""

import math
from collections.abc import Mapping, Sequence

import torch

from lrc_cli.checkpoint.headers import FLOAT_DTYPES
from lrc_cli.config import Compression
from lrc_cli.engine import (
    DENSE_STORAGE,
    STORAGES,
    Choice,
    Choices,
    Infeasible,
    Predicted,
    uniform,
    uniform_within_error,
    within_bytes,
    within_error,
    within_layer_error,
)
from lrc_cli.errors import InputError
from lrc_cli.execution.precision import DTYPES
from lrc_cli.job.plan import Plan
from lrc_cli.job.planned_layer import PlannedLayer
from lrc_cli.job.statistics.collect import UNSEEN
from lrc_cli.network.layer import Layer
from lrc_cli.text import some_of

BISECTIONS = 30
"""Steps of the search for the largest sum of relative errors that keeps the bound on the loss."""

UNREACHED = "no calibration sequence reaches"

Granted = dict[str, Choice]
"""The choice of every layer, by name."""


def allocate(plan: Plan, predicted: Mapping[str, Predicted], reasons: Mapping[str, str]) -> Granted:
    """Returns the choice that every layer is granted.

    Args:
        predicted: the errors that the target bounds, by layer name: plain output errors for
            `max_layer_error`, else errors in the method's unit. A layer without errors stays dense.
        reasons: why such layers stay dense, by name, which a refusal says.

    Raises:
        InputError: the target or an override cannot be reached.
    """
    compression, idle = plan.config.compression, _idle(plan, predicted, reasons)

    def choices_of(*, relative: bool) -> list[Choices]:
        return [
            Choices(_choices(plan.of(layer), predicted.get(layer.name), relative=relative))
            for layer in plan.layers
        ]

    try:
        if compression.max_loss_increase is None:
            choices = choices_of(relative=shares_relative_errors(compression))
            picks = _pick(plan, choices)
        else:
            choices = choices_of(relative=False)
            picks = _pick_within_loss(plan, choices, choices_of(relative=True))
    except Infeasible as error:
        raise _unreachable(plan, error, idle) from error
    if not _meets_target(plan, choices, picks):
        name, value = compression.target
        raise InputError(
            f"compression.{name}: {value} cannot be reached: the layers that compression.layers"
            f" fixes, or that cannot be compressed, already miss it{idle}",
            _remedy(name, _reached(plan, choices, picks)),
        )
    return {
        layer.name: choice.each[pick]
        for layer, choice, pick in zip(plan.layers, choices, picks, strict=True)
    }


def _unreachable(plan: Plan, error: Infeasible, idle: str) -> InputError:
    """Returns the refusal of a target, with the least that can be reached.

    Args:
        idle: which layers stay dense.
    """
    compression = plan.config.compression
    name, value = compression.target
    if error.unit == "bytes":
        least = _share(plan, error.smallest)
    else:
        least = _up(error.smallest**0.5 if name == "max_layer_error" else error.smallest)
    remedy = _remedy(name, least)
    if UNREACHED in idle:
        remedy += ", or give calibration data for these layers"
    return InputError(
        f"compression.{name}: {value} cannot be reached, and {least} can{idle}", remedy
    )


def _share(plan: Plan, num_bytes: float) -> float:
    """Returns the least `size` that allows all compressible weights so many bytes together."""
    if plan.config.compression.size_of == "compressible":
        return _up(num_bytes / plan.compressible_bytes)
    return _up((num_bytes + rest_bytes(plan)) / plan.source.num_bytes)


def _reached(plan: Plan, choices: Sequence[Choices], picks: Sequence[int]) -> float:
    """Returns what the layers' choices come to, in the target's terms."""
    chosen = [choice.each[i] for choice, i in zip(choices, picks, strict=True)]
    compression = plan.config.compression
    if compression.size is not None:
        return _share(plan, sum(choice.num_bytes for choice in chosen))
    if compression.max_layer_error is not None:
        return _up(max(choice.error for choice in chosen) ** 0.5)
    return _up(sum(choice.error for choice in chosen))


def _remedy(name: str, least: float) -> str:
    """Returns the next step where a target cannot be reached, and `least` is what can."""
    if name == "size" and least > 1:
        return (
            f"no size is reached, because the output would have {least} times the bytes: compress"
            " more layers, or lower output.dtype"
        )
    return f"ask for {name}: {least} or more"


def _up(least: float) -> float:
    """Returns a number rounded up to three digits."""
    if not 0 < least < math.inf:
        return least
    digits = 2 - math.floor(math.log10(least))
    return round(math.ceil(least * 10**digits) / 10**digits, digits)


def _idle(plan: Plan, predicted: Mapping[str, Predicted], reasons: Mapping[str, str]) -> str:
    """Returns which layers stay dense because the data told nothing of them, or why they do."""
    names = [layer.name for layer in plan.layers if layer.name not in predicted]
    if not names:
        return ""
    stay = "1 layer stays dense" if len(names) == 1 else f"{len(names)} layers stay dense"
    others = [name for name in names if reasons.get(name, UNSEEN) != UNSEEN]
    if others:
        return f" ({stay}, among them {others[0]}: {reasons[others[0]]})"
    return f" ({stay}, which {UNREACHED}: {some_of(names)})"


def check_reachable(plan: Plan) -> None:
    """Raises InputError for an override or a size that shapes alone rule out, before any pass."""
    allocate(plan, nothing_known(plan), {})


def nothing_known(plan: Plan) -> dict[str, Predicted]:
    """Returns predictions that rule nothing out: every error is 0."""
    shapes = {layer.name: min(layer.shape) for layer in plan.layers}
    return {
        name: Predicted(spectrum=torch.zeros(size, dtype=torch.float64))
        for name, size in shapes.items()
    }


def shares_relative_errors(compression: Compression) -> bool:
    """Returns whether the allocation compares errors relative to each layer's total."""
    if compression.max_loss_increase is not None:
        return False
    return compression.allocation != "global" or compression.max_layer_error is not None


def _meets_target(plan: Plan, choices: Sequence[Choices], picks: Sequence[int]) -> bool:
    compression = plan.config.compression
    chosen = [choice.each[i] for choice, i in zip(choices, picks, strict=True)]
    if compression.size is not None:
        return sum(choice.num_bytes for choice in chosen) <= _budget(plan)
    if compression.threshold is not None:
        return True
    if compression.max_loss_increase is not None:
        return sum(choice.error for choice in chosen) <= compression.max_loss_increase
    assert compression.max_layer_error is not None
    return all(choice.error <= compression.max_layer_error**2 for choice in chosen)


def _choices(
    planned: PlannedLayer, predicted: Predicted | None, *, relative: bool
) -> Sequence[Choice]:
    """Returns the layer's choices with their errors, as overrides and the threshold leave them."""
    layer, itemsize = planned.layer, planned.dtype.itemsize
    dense = DENSE_STORAGE.choices(layer.shape, itemsize)
    if predicted is None or planned.fixed_size == 1:
        return dense
    own = STORAGES[planned.storage].choices(
        layer.shape,
        itemsize,
        predicted.relative() if relative else predicted,
        rank_multiple=planned.rank_multiple,
        extra=planned.gained_bytes,
    )
    choices = [*own, *dense]  # dense comes last: among equals the allocation takes the first
    rank, size = planned.fixed_rank, planned.fixed_size
    if rank is not None:
        return _only([x for x in choices if x.rank == rank], layer, f"rank {rank}")
    if size is not None:
        affordable = [x for x in choices if x.num_bytes <= size * layer.num_bytes]
        largest = max((x.num_bytes for x in affordable), default=0)
        return _only([x for x in affordable if x.num_bytes == largest], layer, f"size {size}")
    rank_above = planned.solver.rank_above
    if planned.threshold is not None and rank_above is not None:
        cut = rank_above(predicted.spectrum, planned.threshold)
        return [x for x in choices if x.rank == cut] or dense
    return choices


def _only(choices: list[Choice], layer: Layer, asked: str) -> list[Choice]:
    if not choices:
        raise InputError(
            f"compression.layers: {layer.name} {layer.shape} has no factors of {asked}",
            "give another size or rank, or size: 1 to leave the layer dense",
        )
    return choices


def _pick(plan: Plan, choices: Sequence[Choices]) -> list[int]:
    compression = plan.config.compression
    if compression.threshold is not None:
        return [0] * len(choices)
    if compression.max_layer_error is not None:
        return within_layer_error(choices, compression.max_layer_error**2)
    if compression.allocation == "uniform":
        return _pick_uniform(plan, choices)
    return within_bytes(choices, _budget(plan))


def _pick_within_loss(
    plan: Plan, choices: Sequence[Choices], relative: Sequence[Choices]
) -> list[int]:
    """Returns the fewest bytes whose errors, in nats, add up to at most max_loss_increase.

    Args:
        relative: the same choices with errors divided by each layer's total. Where `allocation` is
            relative, every saved byte is traded for the sum of these errors.
    """
    bound = plan.config.compression.max_loss_increase
    assert bound is not None
    if plan.config.compression.allocation == "uniform":
        return _pick_uniform(plan, choices)
    if plan.config.compression.allocation == "global":
        return within_error(choices, bound)
    # The bound is a hair above the least sum, because the allocator adds in another order.
    low = sum(choice.errors.min().item() for choice in relative) * (1 + 1e-12)
    picks, high = within_error(relative, low), float(len(relative))
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        tried = within_error(relative, middle)
        if sum(c.each[i].error for c, i in zip(choices, tried, strict=True)) <= bound:
            picks, low = tried, middle
        else:
            high = middle
    return picks


def _pick_uniform(plan: Plan, choices: Sequence[Choices]) -> list[int]:
    """Returns choices that keep the same fraction of every layer's bytes.

    Layers that an override or a lack of data leaves a single choice are not counted.
    """
    free = [i for i, choice in enumerate(choices) if len(choice.each) > 1]
    bound = plan.config.compression.max_loss_increase
    dense_bytes = [plan.layers[i].num_bytes for i in free]
    among = [choices[i] for i in free]
    if not free:
        picks = []
    elif bound is not None:
        spent = sum(c.each[0].error for c in choices if len(c.each) == 1)
        try:
            picks = uniform_within_error(among, dense_bytes, bound - spent)
        except Infeasible as error:
            raise Infeasible(bound, spent + error.smallest, "error") from error
    else:
        fixed = sum(c.each[0].num_bytes for c in choices if len(c.each) == 1)
        budget, whole = _budget(plan), sum(dense_bytes)
        try:
            picks = uniform(among, dense_bytes, (budget - fixed) / whole)
        except Infeasible as error:
            raise Infeasible(budget, fixed + error.smallest * whole, "bytes") from error
    chosen = [0] * len(choices)
    for i, pick in zip(free, picks, strict=True):
        chosen[i] = pick
    return chosen


def _budget(plan: Plan) -> float:
    """Returns the bytes that all compressible weights may take together."""
    compression = plan.config.compression
    assert compression.size is not None
    if compression.size_of == "compressible":
        return compression.size * plan.compressible_bytes
    return compression.size * plan.source.num_bytes - rest_bytes(plan)


def rest_bytes(plan: Plan) -> int:
    """Returns the bytes of everything that is written beside the compressible weights."""
    compressible = {layer.keys.weight for layer in plan.layers}
    cast = DTYPES.get(plan.config.output.dtype)
    return plan.source.mark_bytes + sum(
        info.num_elements * (cast if cast and info.dtype in FLOAT_DTYPES else info.dtype).itemsize
        for key, info in plan.source.tensors.items()
        if key not in compressible
    )
