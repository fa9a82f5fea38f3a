"""One layer's solve, from plan and work directory: its weight, problem, request and cost."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import groupby
from operator import attrgetter
from typing import TypeVar

import torch

from lrc_cli.engine import (
    DENSE,
    NUCLEAR,
    RELU,
    Approximation,
    Rectified,
    References,
    SameInput,
    Shrunk,
    SolveError,
)
from lrc_cli.fit import Fitted, Request, fit_layer, left_dense
from lrc_cli.gather import read_statistics
from lrc_cli.models import Layer
from lrc_cli.parallel import in_parallel
from lrc_cli.plan import Plan
from lrc_cli.purposes import CALIBRATION
from lrc_cli.ranks import rank_multiple
from lrc_cli.rectified import fit_rectified, read_inputs
from lrc_cli.work import OUTPUT_SPECTRA, REFERENCES, SPECTRA, STATISTICS, WorkDirectory

Result = TypeVar("Result")

PARALLEL_WIDTH = 2048
"""Layers up to this width are solved side by side on a CPU, wider ones in turn."""


def weight_of(plan: Plan, layer: Layer) -> torch.Tensor:
    """The dense weight (m, n), stored dtype, on the run's device."""
    return layer.weight(plan.source).to(plan.device)


def dense_reason(plan: Plan, work: WorkDirectory, layer: Layer) -> str | None:
    """Why phase one found that the layer must stay dense; None where it need not."""
    reasons = dict(work.get(SPECTRA, layer.unit)[1]["dense"])
    if plan.config.compression.max_layer_error is not None:
        reasons |= work.get(OUTPUT_SPECTRA, layer.unit)[1]["dense"]
    return reasons.get(layer.name)


def problem_of(plan: Plan, work: WorkDirectory, layer: Layer) -> Approximation:
    """The layer's approximation problem on the inputs that it has in the dense network."""
    statistics, _ = read_statistics(plan, work, layer)
    assert statistics is not None
    if plan.solvers[layer.name] is NUCLEAR:
        override = plan.config.compression.override(layer.name)
        forced = override.rank is not None or override.size is not None
        share = None if forced else plan.config.compression.threshold
        return Shrunk(weight_of(plan, layer), statistics, share=share)
    spectrum = work.get(SPECTRA, layer.unit)[0][layer.name].to(plan.device)
    references = read_references(work, layer)
    weight, solver = weight_of(plan, layer), plan.solvers[layer.name]
    return SameInput(weight, statistics, solver, spectrum, references)


def read_references(work: WorkDirectory, layer: Layer) -> References | None:
    """What an earlier size was compared with."""
    if not work.has(REFERENCES, layer.unit):
        return None
    stored, _ = work.get(REFERENCES, layer.unit)
    found = {kind: stored.get(f"{kind}.{layer.name}") for kind in References._fields}
    known = {kind: tensor for kind, tensor in found.items() if tensor is not None}
    return References(**known) if known else None


def keep_references(work: WorkDirectory, unit: str, found: Mapping[str, Fitted]) -> None:
    """Store, for other sizes, what the layers of a unit were compared with.

    Args:
        found: outcomes by layer name.
    """
    stored = work.get(REFERENCES, unit)[0] if work.has(REFERENCES, unit) else {}
    new = {
        f"{kind}.{name}": tensor
        for name, fitted in found.items()
        if fitted.references is not None
        for kind, tensor in fitted.references._asdict().items()
    }
    if not new.keys() <= stored.keys():
        work.put(REFERENCES, unit, stored | new, {})


def _rectified(plan: Plan, work: WorkDirectory, layer: Layer) -> Rectified:
    """The problem behind the ReLU that follows the layer."""
    statistics, _ = read_statistics(plan, work, layer)
    assert statistics is not None
    bias = layer.bias(plan.source)
    return Rectified(
        weight_of(plan, layer),
        None if bias is None else bias.to(plan.device),
        statistics,
        read_inputs(plan.network, plan.sequences[CALIBRATION], layer, work.root),
        work.get(SPECTRA, layer.unit)[0][layer.name].to(plan.device),
        dtype=plan.stored_dtype(layer),
        ridge=plan.config.compression.ridge,
    )


def request_of(plan: Plan, layer: Layer, rank: int) -> Request:
    """What is asked of the layer at its granted rank."""
    compression = plan.config.compression
    override = compression.override(layer.name)
    return Request(
        rank=rank,
        rank_multiple=rank_multiple(plan, layer),
        storage=override.storage or compression.storage,
        dtype=plan.stored_dtype(layer),
        max_layer_error=None if override.rank is not None else compression.max_layer_error,
        bias=layer.bias(plan.source),
    )


def fit(plan: Plan, work: WorkDirectory, ranks: Mapping[str, int], layer: Layer) -> Fitted:
    """The layer's outcome on the inputs that it has in the dense network."""
    reason = dense_reason(plan, work, layer)
    if reason is not None:
        return left_dense(reason, fallback=True)
    return _noting_few_tokens(work, layer, _fit(plan, work, layer, ranks[layer.name]))


def _fit(plan: Plan, work: WorkDirectory, layer: Layer, rank: int) -> Fitted:
    request = request_of(plan, layer, rank)
    if plan.solvers[layer.name] is RELU and request.rank != DENSE:
        try:
            problem = _rectified(plan, work, layer)
        except SolveError as error:
            return left_dense(f"could not be solved: {error}", fallback=True)
        return fit_rectified(problem, request)
    return fit_layer(problem_of(plan, work, layer), request)


def _noting_few_tokens(work: WorkDirectory, layer: Layer, fitted: Fitted) -> Fitted:
    """Say so where an expert was fitted to fewer tokens than it has inputs.

    No inverse is taken, so the factors are finite; directions that no token excited are not kept.
    """
    tokens = work.get(STATISTICS, layer.unit)[1]["layers"][layer.name]["tokens"]
    # Without any it was fitted to its weight alone.
    if fitted.packed is None or not 0 < tokens < layer.shape[1]:
        return fitted
    few = f"fitted to {tokens} tokens, fewer than its {layer.shape[1]} inputs"
    reason = "; ".join(filter(None, (fitted.facts["reason"], few)))
    return replace(fitted, facts=fitted.facts | {"reason": reason})


def num_workers(plan: Plan, layers: list[Layer]) -> int:
    """How many layers to solve at once: wide ones use all cores, and much memory, on their own."""
    widest = max((max(layer.shape) for layer in layers), default=0)
    # With relu a fit runs the network, and holds the layer's inputs.
    runs_alone = any(plan.solvers[layer.name] is RELU for layer in layers)
    if plan.device.type != "cpu" or widest > PARALLEL_WIDTH or runs_alone:
        return 1
    return torch.get_num_threads()


def solve_each(plan: Plan, layers: list[Layer], solve: Callable[[Layer], Result]) -> list[Result]:
    """What `solve` makes of every layer, in their order, some of them side by side."""
    workers = max(min(num_workers(plan, layers), len(layers)), 1)
    (solved,) = in_parallel(solve, [layers], workers, cost=attrgetter("solve_cost"))
    return solved


def solve_units(
    plan: Plan, units: Iterable[str], solve: Callable[[Layer], Result]
) -> Iterator[tuple[str, dict[str, Result]]]:
    """What `solve` makes of every unit's layers, by layer name, unit by unit.

    Where layers are solved side by side, the next unit's begin before this one's are stored. How a
    unit is solved does not depend on which others are: a resumed run must give the same bytes.
    """
    for workers, alike in groupby(units, key=lambda unit: num_workers(plan, plan.units[unit])):
        names = list(alike)
        groups = [plan.units[unit] for unit in names]
        each = in_parallel(solve, groups, workers, cost=attrgetter("solve_cost"))
        for unit, layers, solved in zip(names, groups, each, strict=True):
            yield unit, {x.name: found for x, found in zip(layers, solved, strict=True)}


def solve_cost(layers: Iterable[Layer]) -> float:
    """Of the layers' solves together: multiplications."""
    return sum(layer.solve_cost for layer in layers)
