"""The probe's instruments measure the time of each step and the time and size of files."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from lrc_cli.job.stage import Advance, Solved, Stage, Task
from lrc_cli.job.work import Tensors, WorkDirectory

Outcome = TypeVar("Outcome")

NUM_BATCHES = 3
"""The number of micro-batches that a probe runs. The first micro-batch warms up."""


class Clock:
    """A clock for the steps of a loop, which calls `tick` after each step."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.steps = device, list[float]()
        self.last = self.now()

    def now(self) -> float:
        """Returns the time in seconds, once the device has done everything that was asked."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def restart(self) -> None:
        """Begins the next step now: the time since the last step belongs to no step."""
        self.last = self.now()

    def tick(self, cost: float = 0.0) -> None:
        """Ends a step and keeps its seconds."""
        now = self.now()
        self.steps.append(now - self.last)
        self.last = now


class Timed(Stage[Outcome]):
    """A stage of the job whose units are timed.

    Args:
        stage: the stage of the job.
        units: the units to do; a unit that is named twice is done twice.
    """

    def __init__(self, stage: Stage[Outcome], units: Sequence[str], device: torch.device) -> None:
        super().__init__(stage.work, stage.folder, units)
        self.name, self.stage = stage.name, stage
        self.steps, self.storing = Clock(device), Clock(device)
        """The clocks of the pieces of work, and of the units that are stored."""

    def missing(self) -> list[str]:
        """See Stage."""
        return self.units

    def task(self, units: Sequence[str]) -> Task[Outcome]:
        """See Stage."""
        task = self.stage.task(units)

        def solve(advance: Advance) -> Solved[Outcome]:
            def step(cost: float) -> None:
                self.steps.tick()
                advance(cost)

            self.steps.restart()
            return task.solve(step)

        return replace(task, solve=solve)

    def store(self, unit: str, outcome: Outcome) -> None:
        """See Stage."""
        self.storing.restart()
        self.stage.store(unit, outcome)
        self.storing.tick()
        self.steps.restart()

    def close(self) -> None:
        """See Stage."""
        self.stage.close()


def typical(steps: Sequence[float]) -> float:
    """Returns the mean of equal steps. The first of several steps warms up and does not count."""
    later = steps[1:] or steps
    return sum(later) / len(later)


class TimedWork(WorkDirectory):
    """A work directory that counts the seconds and the bytes of writing, by kind of stage."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, {})
        self.seconds: dict[str, float] = {}
        self.num_bytes: dict[str, int] = {}
        self.places: dict[str, set[str]] = {}
        """{kind of stage: the rest of the names of its stages}, such as the names of segments."""

    def put(self, stage: str, unit: str, tensors: Tensors, facts: Mapping[str, Any]) -> None:
        began = time.perf_counter()
        super().put(stage, unit, tensors, facts)
        stage, _, place = stage.partition("/")
        self.places.setdefault(stage, set()).add(place)
        written = sum(tensor.nbytes for tensor in tensors.values())
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - began
        self.num_bytes[stage] = self.num_bytes.get(stage, 0) + written
