"""Many layers are solved unit by unit, as many side by side as the machine takes."""

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
"""The largest width of layers that are solved side by side on a CPU; wider layers take turns."""


def weight_of(plan: Plan, layer: Layer) -> torch.Tensor:
    """Returns the dense weight (m, n), stored dtype, on the run's device."""
    return layer.weight(plan.source).to(plan.device)


def num_workers(plan: Plan, layers: list[Layer]) -> int:
    """Returns how many layers to solve at once.

    A wide layer uses all cores, and much memory, by itself.
    """
    widest = max((max(layer.shape) for layer in layers), default=0)
    # A solver that reads inputs runs the network and holds all inputs of its layer.
    reads_inputs = any(plan.of(layer).solver.reads_inputs for layer in layers)
    if plan.device.type != "cpu" or widest > PARALLEL_WIDTH or reads_inputs:
        return 1
    return torch.get_num_threads()


def solve_each(plan: Plan, layers: list[Layer], solve: Callable[[Layer], Result]) -> list[Result]:
    """Returns the result of `solve` for every layer, in order. Some layers run side by side."""
    workers = max(min(num_workers(plan, layers), len(layers)), 1)
    (solved,) = in_parallel(solve, [layers], workers, cost=attrgetter("solve_cost"))
    return solved


def solve_units(
    plan: Plan, units: Iterable[str], solve: Callable[[Layer], Result]
) -> Iterator[tuple[str, dict[str, Result]]]:
    """Yields every unit with the results of `solve`, by layer name.

    Where layers are solved side by side, the next unit begins before this unit is stored. The way a
    unit is solved does not depend on other units: a resumed run must give the same bytes.
    """
    for workers, alike in groupby(units, key=lambda unit: num_workers(plan, plan.units[unit])):
        names = list(alike)
        groups = [plan.units[unit] for unit in names]
        waiting = zip(names, groups, strict=True)
        # With the results in the same `zip`, a unit's results would stay until the next ones come.
        for solved in in_parallel(solve, groups, workers, cost=attrgetter("solve_cost")):
            unit, layers = next(waiting)
            yield unit, {x.name: found for x, found in zip(layers, solved, strict=True)}
            del solved


def solve_cost(layers: Iterable[Layer]) -> float:
    """Returns the cost of solving the layers: multiplications."""
    return sum(layer.solve_cost for layer in layers)
