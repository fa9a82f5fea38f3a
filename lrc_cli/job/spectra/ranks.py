"""From spectra to ranks: the layers' choices, the overrides, the target. No data, no solving."""

from collections.abc import Mapping, Sequence

import torch

from lrc_cli.checkpoint.headers import FLOAT_DTYPES
from lrc_cli.engine import (
    DENSE,
    Infeasible,
    RankChoices,
    rank_choices,
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
from lrc_cli.network.layer import Layer

BISECTIONS = 30


def allocate_ranks(plan: Plan, spectra: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """The rank of every layer (DENSE: stays as it is).

    Args:
        spectra: by layer name; what the target bounds (the plain output error's for
            `max_layer_error`, the method's own otherwise). A layer without one stays dense.

    Raises:
        InputError: the target or an override cannot be reached.
    """
    compression = plan.config.compression

    def choices_of(*, relative: bool) -> list[RankChoices]:
        return [
            _choices(plan.of(layer), spectra.get(layer.name), relative=relative)
            for layer in plan.layers
        ]

    unreachable = "ask for less compression"
    try:
        if compression.max_loss_increase is None:
            bounds_output = compression.max_layer_error is not None
            relative = compression.allocation != "global" or bounds_output
            choices = choices_of(relative=relative)
            picks = _pick(plan, choices)
        else:
            choices = choices_of(relative=False)
            picks = _pick_within_loss(plan, choices, choices_of(relative=True))
    except Infeasible as error:
        name, value = plan.config.compression.target
        raise InputError(
            f"compression.{name}: {value} cannot be reached: {error}", unreachable
        ) from error
    if not _meets_target(plan, choices, picks):
        name, value = compression.target
        raise InputError(
            f"compression.{name}: {value} cannot be reached: the layers that compression.layers"
            " fixes, or that cannot be compressed, already miss it",
            unreachable,
        )
    return {
        layer.name: int(choice.ranks[pick])
        for layer, choice, pick in zip(plan.layers, choices, picks, strict=True)
    }


def check_reachable(plan: Plan) -> None:
    """Raise InputError for an override or a size that shapes alone rule out, before any pass."""
    flat = {layer.name: torch.zeros(min(layer.shape), dtype=torch.float64) for layer in plan.layers}
    allocate_ranks(plan, flat)


def _meets_target(plan: Plan, choices: Sequence[RankChoices], picks: Sequence[int]) -> bool:
    compression = plan.config.compression
    chosen = list(zip(choices, picks, strict=True))
    if compression.size is not None:
        return sum(int(choice.num_bytes[i]) for choice, i in chosen) <= _budget(plan)
    if compression.threshold is not None:
        return True
    if compression.max_loss_increase is not None:
        total = sum(choice.errors[i].item() for choice, i in chosen)
        return total <= compression.max_loss_increase
    assert compression.max_layer_error is not None
    return all(choice.errors[i].item() <= compression.max_layer_error**2 for choice, i in chosen)


def _choices(
    planned: PlannedLayer, spectrum: torch.Tensor | None, *, relative: bool
) -> RankChoices:
    """What the layer may cost and how wrong it then is, overrides applied."""
    layer, itemsize = planned.layer, planned.dtype.itemsize
    if spectrum is None or planned.fixed_size == 1:
        return _only_dense(layer, itemsize)
    total = spectrum.sum().item()
    choices = rank_choices(
        spectrum / total if relative and total > 0 else spectrum,
        m=layer.shape[0],
        n=layer.shape[1],
        itemsize=itemsize,
        storage=planned.storage,
        rank_multiple=planned.rank_multiple,
        extra=planned.gained_bytes,
    )
    rank, size = planned.fixed_rank, planned.fixed_size
    if rank is not None:
        return _only(choices, choices.ranks == rank, layer, f"rank {rank}")
    if size is not None:
        keep = choices.num_bytes <= size * layer.num_bytes
        keep &= choices.num_bytes == choices.num_bytes[keep].max() if keep.any() else keep
        return _only(choices, keep, layer, f"size {size}")
    rank_above = planned.solver.rank_above
    if planned.threshold is not None and rank_above is not None:
        kept = choices.ranks == rank_above(spectrum, planned.threshold)
        return _narrowed(choices, kept if kept.any() else choices.ranks == DENSE)
    return choices


def _only(choices: RankChoices, keep: torch.Tensor, layer: Layer, asked: str) -> RankChoices:
    if not keep.any():
        raise InputError(
            f"compression.layers: {layer.name} {layer.shape} has no factors of {asked}",
            "give another size or rank, or size: 1 to leave the layer dense",
        )
    return _narrowed(choices, keep)


def _narrowed(choices: RankChoices, keep: torch.Tensor) -> RankChoices:
    """Those choices for which `keep` (k,) is True."""
    return RankChoices(
        ranks=choices.ranks[keep], num_bytes=choices.num_bytes[keep], errors=choices.errors[keep]
    )


def _only_dense(layer: Layer, itemsize: int) -> RankChoices:
    size = layer.shape[0] * layer.shape[1] * itemsize
    return RankChoices(
        ranks=torch.tensor([DENSE]),
        num_bytes=torch.tensor([size]),
        errors=torch.zeros(1, dtype=torch.float64),
    )


def _pick(plan: Plan, choices: Sequence[RankChoices]) -> list[int]:
    compression = plan.config.compression
    if compression.threshold is not None:
        return [0] * len(choices)
    if compression.max_layer_error is not None:
        return within_layer_error(choices, compression.max_layer_error**2)
    if compression.allocation == "uniform":
        return _pick_uniform(plan, choices)
    return within_bytes(choices, _budget(plan))


def _pick_within_loss(
    plan: Plan, choices: Sequence[RankChoices], relative: Sequence[RankChoices]
) -> list[int]:
    """The fewest bytes whose errors, in nats, add up to at most max_loss_increase.

    Args:
        relative: the same choices, the errors divided by each layer's energy. Where `allocation` is
            relative, their sum is what every saved byte is traded for.
    """
    bound = plan.config.compression.max_loss_increase
    assert bound is not None
    if plan.config.compression.allocation == "uniform":
        return _pick_uniform(plan, choices)
    if plan.config.compression.allocation == "global":
        return within_error(choices, bound)
    # A hair above the least sum, which the allocator adds up in another order.
    low = sum(choice.errors.min().item() for choice in relative) * (1 + 1e-12)
    picks, high = within_error(relative, low), float(len(relative))
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        tried = within_error(relative, middle)
        if sum(c.errors[i].item() for c, i in zip(choices, tried, strict=True)) <= bound:
            picks, low = tried, middle
        else:
            high = middle
    return picks


def _pick_uniform(plan: Plan, choices: Sequence[RankChoices]) -> list[int]:
    """One share for every layer that has a choice; overrides and unreached layers have none."""
    free = [i for i, choice in enumerate(choices) if len(choice.ranks) > 1]
    bound = plan.config.compression.max_loss_increase
    dense_bytes = [plan.layers[i].num_bytes for i in free]
    among = [choices[i] for i in free]
    if not free:
        picks = []
    elif bound is not None:
        spent = sum(c.errors[0].item() for c in choices if len(c.ranks) == 1)
        picks = uniform_within_error(among, dense_bytes, bound - spent)
    else:
        fixed = sum(int(c.num_bytes[0]) for c in choices if len(c.ranks) == 1)
        picks = uniform(among, dense_bytes, (_budget(plan) - fixed) / sum(dense_bytes))
    chosen = [0] * len(choices)
    for i, pick in zip(free, picks, strict=True):
        chosen[i] = pick
    return chosen


def _budget(plan: Plan) -> float:
    """Bytes that all compressible weights may take together."""
    compression = plan.config.compression
    assert compression.size is not None
    if compression.size_of == "compressible":
        return compression.size * plan.compressible_bytes
    return compression.size * plan.source.num_bytes - rest_bytes(plan)


def rest_bytes(plan: Plan) -> int:
    """Bytes of all that is written beside the compressible weights."""
    compressible = {layer.keys.weight for layer in plan.layers}
    cast = DTYPES.get(plan.config.output.dtype)
    return plan.source.mark_bytes + sum(
        info.num_elements * (cast if cast and info.dtype in FLOAT_DTYPES else info.dtype).itemsize
        for key, info in plan.source.tensors.items()
        if key not in compressible
    )
