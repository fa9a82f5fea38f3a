"""A stage of the job is done unit by unit, and each unit is stored as soon as it is solved.

Statistics, spectra and factors are stages, and `run_stage` is the only loop that does them. A stage
says which units are missing, what they cost, how they are solved and how a solved unit is stored. A
killed run leaves whole units, so the same loop goes on where the last run stopped.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from lrc_cli.job.plan import Plan
from lrc_cli.job.spectra.solve import solve_cost, solve_units
from lrc_cli.job.work import Tensors, WorkDirectory
from lrc_cli.network.layer import Layer
from lrc_cli.runtime.progress import Progress, Seconds

Outcome = TypeVar("Outcome")
Result = TypeVar("Result")

Advance = Callable[[float], None]
"""Called with the cost of each piece of work as soon as the piece is done."""
Solved = Generator[tuple[str, Outcome], None, None]
"""Units with their outcomes, each as soon as it is solved."""


@dataclass(frozen=True, kw_only=True)
class Task(Generic[Outcome]):
    """The work of one process on some units of a stage."""

    cost: float
    """The sum that `solve` advances by, proportional to time. 0: no phase is shown."""
    solve: Callable[[Advance], Solved[Outcome]]
    """Begins the work. Units come in any order, each in the process that stores the unit."""


class Stage(ABC, Generic[Outcome]):
    """One stage of the job. All processes run it together, and each has its own object.

    Args:
        work: where finished units lie.
        folder: the stage's folder in the work directory.
        units: the names of all units of the stage, in the network's order.
    """

    name: str
    """The phase, as the display and report.json name it."""

    def __init__(self, work: WorkDirectory, folder: str, units: Iterable[str]) -> None:
        self.work, self.folder, self.units = work, folder, list(units)

    def missing(self) -> list[str]:
        """Returns the units that are not stored yet, on which all processes agree."""
        return self.work.missing(self.folder, self.units)

    def drop_damaged(self) -> list[str]:
        """Deletes units of earlier runs that are damaged. All processes call this.

        Returns:
            A sentence about every deleted unit, without a full stop.
        """
        return self.work.drop_damaged(self.folder, self.units, self.check)

    def check(self, folder: str, unit: str) -> None:
        """Raises DamagedUnit where the stage cannot use a whole unit of an earlier run."""

    @abstractmethod
    def task(self, units: Sequence[str]) -> Task[Outcome]:
        """Prepares the work on units that are missing. All processes call this."""

    @abstractmethod
    def store(self, unit: str, outcome: Outcome) -> None:
        """Stores what is known of a unit. Raises RunError where storing fails."""

    def close(self) -> None:
        """Deletes what only an unfinished stage needs. All processes call this."""


def run_stage(stage: Stage[Outcome], progress: Progress) -> Seconds:
    """Does what is left of a stage and stores every unit as soon as it is solved.

    Damaged units of earlier runs are named, deleted and solved again. The call returns in every
    process once all processes are done.

    Returns:
        The seconds of the stage's phase by its name; empty where nothing took time.

    Raises:
        InputError, RunError: from the stage. All units that were stored until then are whole.
    """
    # Reading a mapped file that was truncated would kill the process.
    stage.work.check_inputs()
    damaged = stage.drop_damaged()
    for sentence in damaged if stage.work.processes.is_first else ():
        progress.say(sentence)
    missing, seconds = stage.missing(), Seconds()
    if missing:
        task = stage.task(missing)
        if task.cost:
            with progress.phase(stage.name, task.cost) as phase:
                _solve(stage, task, phase.advance)
            seconds = phase.timing
        else:
            _solve(stage, task, lambda _: None)
        stage.work.processes.wait()
    stage.close()
    return seconds


def _solve(stage: Stage[Outcome], task: Task[Outcome], advance: Advance) -> None:
    # Where storing fails, work in the background ends at once.
    with closing(task.solve(advance)) as solved:
        for unit, outcome in solved:
            stage.store(unit, outcome)
            # The memory is free before the next unit is waited for; generators below do the same.
            del outcome


class LayerStage(Stage[dict[str, Result]]):
    """A stage that solves each layer by itself. Every process does the units that it owns.

    The outcome of a unit is the results of its layers, by layer name.
    """

    def __init__(self, plan: Plan, work: WorkDirectory, folder: str) -> None:
        super().__init__(work, folder, plan.units)
        self.plan = plan

    @abstractmethod
    def solve(self, layer: Layer) -> Result:
        """Returns the layer's result. Several threads may call this side by side."""

    @abstractmethod
    def contents(self, unit: str, results: Mapping[str, Result]) -> tuple[Tensors, dict[str, Any]]:
        """Returns what is written of a unit's results: tensors and facts."""

    def task(self, units: Sequence[str]) -> Task[dict[str, Result]]:
        """See Stage."""
        own, members = list(filter(self.plan.owns, units)), self.plan.units

        def solve(advance: Advance) -> Solved[dict[str, Result]]:
            for unit, results in solve_units(self.plan, own, self.solve):
                yield unit, results
                del results  # see _solve
                advance(solve_cost(members[unit]))

        return Task(cost=solve_cost(x for unit in own for x in members[unit]), solve=solve)

    def store(self, unit: str, outcome: dict[str, Result]) -> None:
        """See Stage."""
        self.work.put(self.folder, unit, *self.contents(unit, outcome))
