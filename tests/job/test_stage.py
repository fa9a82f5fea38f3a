"""These tests try the loop of the job's stages on a stage that squares numbers."""

import json
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from process_helpers import PATIENCE, environments, fork

from lrc_cli.engine import SVD
from lrc_cli.errors import RunError
from lrc_cli.job.stage import Advance, LayerStage, Solved, Stage, Task, run_stage
from lrc_cli.job.work import Tensors, WorkDirectory
from lrc_cli.network.layer import Layer
from lrc_cli.runtime.join import joined
from lrc_cli.runtime.progress import Progress
from lrc_cli.runtime.signals import Interrupted, Stop

UNITS = ["1", "2", "3", "4"]
QUIET = Progress(quiet=True)


class Squares(Stage[float]):
    """A stage that squares the numbers that its units are named after.

    Args:
        before: called with each unit before it is solved.
        cost: the cost of each unit.
    """

    name = "squares"

    def __init__(
        self, work: WorkDirectory, before: Callable[[str], object] = str, cost: float = 1.0
    ) -> None:
        super().__init__(work, "squares", UNITS)
        self.before, self.cost = before, cost
        self.solved, self.is_closed = list[str](), False

    def task(self, units: Sequence[str]) -> Task[float]:
        processes = self.work.processes
        owners = processes.owners({unit: float(unit) for unit in self.units})
        own = [unit for unit in units if owners[unit] == processes.rank]

        def solve(advance: Advance) -> Solved[float]:
            for unit in own:
                self.before(unit)
                self.solved.append(unit)
                yield unit, float(unit) ** 2
                advance(self.cost)

        return Task(cost=self.cost * len(own), solve=solve)

    def store(self, unit: str, outcome: float) -> None:
        self.work.put(self.folder, unit, {"square": torch.tensor(outcome)}, {})

    def close(self) -> None:
        self.is_closed = True


def stored(work: WorkDirectory) -> dict[str, float]:
    found = {unit: work.get("squares", unit)[0] for unit in UNITS if work.has("squares", unit)}
    return {unit: tensors["square"].item() for unit, tensors in found.items()}


def test_every_unit_is_solved_and_stored_and_the_seconds_come_back(tmp_path: Path) -> None:
    with WorkDirectory(tmp_path, {}) as work:
        stage = Squares(work)
        seconds = run_stage(stage, QUIET)
        assert stored(work) == {"1": 1.0, "2": 4.0, "3": 9.0, "4": 16.0}
    assert list(seconds) == ["squares"] and seconds["squares"] > 0
    assert stage.is_closed


def test_what_is_finished_is_not_done_again(tmp_path: Path) -> None:
    with WorkDirectory(tmp_path, {}) as work:
        Squares(work).store("2", 5.0)
        stage = Squares(work)
        assert "squares" in run_stage(stage, QUIET)
        assert stage.solved == ["1", "3", "4"] and stored(work)["2"] == 5.0
        again = Squares(work)
        assert run_stage(again, QUIET) == {} and not again.solved and again.is_closed


def test_a_unit_is_stored_before_the_next_one_is_solved(tmp_path: Path) -> None:
    seen: list[list[str]] = []
    with WorkDirectory(tmp_path, {}) as work:
        run_stage(Squares(work, before=lambda _: seen.append(list(stored(work)))), QUIET)
    assert seen == [[], ["1"], ["1", "2"], ["1", "2", "3"]]


def test_what_takes_no_time_has_no_phase(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with WorkDirectory(tmp_path, {}) as work:
        assert run_stage(Squares(work, cost=0.0), Progress()) == {}
        assert len(stored(work)) == len(UNITS)
    assert capsys.readouterr().err == ""


def test_an_error_leaves_whole_units_and_the_next_run_goes_on(tmp_path: Path) -> None:
    def fail(unit: str) -> None:
        if unit == "3":
            raise RunError("the disk is gone", "get it back")

    with WorkDirectory(tmp_path, {}) as work:
        with pytest.raises(RunError, match="the disk is gone"):
            run_stage(Squares(work, before=fail), QUIET)
        assert stored(work) == {"1": 1.0, "2": 4.0}
        stage = Squares(work)
        run_stage(stage, QUIET)
        assert stage.solved == ["3", "4"]


def test_where_storing_fails_what_is_being_solved_ends_at_once(tmp_path: Path) -> None:
    ended: list[str] = []

    class Failing(Squares):
        def task(self, units: Sequence[str]) -> Task[float]:
            def solve(_: Advance) -> Solved[float]:
                try:
                    yield "1", 1.0
                finally:
                    ended.append("1")

            return Task(cost=1.0, solve=solve)

        def store(self, unit: str, outcome: float) -> None:
            raise RunError("the disk is full", "make room")

    with WorkDirectory(tmp_path, {}) as work:
        with pytest.raises(RunError, match="full"):
            run_stage(Failing(work), QUIET)
        assert ended == ["1"]


def test_a_stop_comes_between_two_units(tmp_path: Path) -> None:
    stop = Stop(quiet=True)
    with WorkDirectory(tmp_path, {}) as work:
        stage = Squares(work, before=lambda unit: unit == "2" and stop.request(2, None))
        with pytest.raises(Interrupted):
            run_stage(stage, Progress(stop=stop, quiet=True))
        assert list(stored(work)) == ["1", "2"]


class Found:
    """The result of a layer."""


class Watched(LayerStage[Found]):
    """A stage of layers that notes which results of stored units are still in memory."""

    name = "watched"

    def __init__(self, plan: Any, work: WorkDirectory) -> None:
        super().__init__(plan, work, "watched")
        self.results, self.stored = dict[str, weakref.ref[Found]](), list[str]()
        self.kept: list[list[str]] = []

    def solve(self, layer: Layer) -> Found:
        self.kept.append([unit for unit in self.stored if self.results[unit]() is not None])
        found = Found()
        self.results[layer.name] = weakref.ref(found)
        return found

    def contents(self, unit: str, results: Mapping[str, Found]) -> tuple[Tensors, dict[str, Any]]:
        self.stored.append(unit)
        return {"one": torch.ones(1)}, {}


def test_the_results_of_a_stored_unit_are_freed_before_the_next_unit_is_solved(
    tmp_path: Path,
) -> None:
    planned = SimpleNamespace(solver=SVD)
    plan: Any = SimpleNamespace(
        units={x: [SimpleNamespace(name=x, shape=(8, 8), solve_cost=1.0)] for x in UNITS},
        device=torch.device("cpu"),
        of=lambda _: planned,
        owns=lambda _: True,
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # with more threads, units are solved ahead
    try:
        with WorkDirectory(tmp_path, {}) as work:
            stage = Watched(plan, work)
            run_stage(stage, QUIET)
    finally:
        torch.set_num_threads(threads)
    assert stage.stored == UNITS
    assert stage.kept == [[], [], [], []]


def square_as_one_of_several(environment: dict[str, str], root: str) -> None:
    os.environ.update(environment)
    with joined() as processes, WorkDirectory(Path(root), {}, processes) as work:
        stage = Squares(work)
        run_stage(stage, QUIET)
        all_there = len(stored(work)) == len(UNITS)
        file = Path(root) / f"{processes.rank}.json"
        file.write_text(json.dumps([stage.solved, all_there]))


def test_two_processes_share_the_units_and_both_wait_for_all(tmp_path: Path) -> None:
    started = [fork(square_as_one_of_several, e, str(tmp_path)) for e in environments(2)]
    for process in started:
        process.join(PATIENCE)
    assert [process.exitcode for process in started] == [0, 0]
    solved, all_there = zip(
        *(json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)), strict=True
    )
    assert sorted(solved[0] + solved[1]) == UNITS and all(solved)
    assert all(all_there)
