"""Solves of many layers, unit by unit: what they begin with, how many run side by side."""

from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from operator import attrgetter
from typing import TypeVar

import torch

from lrc_cli.job.plan import Plan
from lrc_cli.network.layer import Layer
from lrc_cli.runtime.threads import in_parallel

Result = TypeVar("Result")

PARALLEL_WIDTH = 2048
"""Layers up to this width are solved side by side on a CPU, wider ones in turn."""


def weight_of(plan: Plan, layer: Layer) -> torch.Tensor:
    """The dense weight (m, n), stored dtype, on the run's device."""
    return layer.weight(plan.source).to(plan.device)


def num_workers(plan: Plan, layers: list[Layer]) -> int:
    """How many layers to solve at once: wide ones use all cores, and much memory, on their own."""
    widest = max((max(layer.shape) for layer in layers), default=0)
    # Such a fit runs the network, and holds the layer's inputs.
    reads_inputs = any(plan.of(layer).solver.reads_inputs for layer in layers)
    if plan.device.type != "cpu" or widest > PARALLEL_WIDTH or reads_inputs:
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
    """The cost of the layers' solves together: multiplications."""
    return sum(layer.solve_cost for layer in layers)
