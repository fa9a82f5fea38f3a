"""These tests stop the pass over the data anywhere; it goes on there, to the same bytes."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle, repeat
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from safetensors.torch import save_file

from lrc_cli.config import load_config
from lrc_cli.job.plan import make_plan
from lrc_cli.job.stage import run_stage
from lrc_cli.job.statistics.collect import StatisticsStage, prepare_pass
from lrc_cli.job.statistics.sweep import Sweep
from lrc_cli.job.work import PASSING, STATISTICS, WorkDirectory
from lrc_cli.runtime.progress import Progress

FACTORY = """
import torch
from torch import nn


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.last = nn.Linear(8, 4)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return torch.tanh(self.last(torch.tanh(x)))
"""
CASES: dict[str, dict[str, Any]] = {
    "curvature": {"compression.center": True},
    "frobenius": {"compression.method": "frobenius"},
    "mixed": {
        "compression.allocation": "relative",
        "compression.layers": {
            "first": {"method": "frobenius"},
            "blocks.0": {"method": "frobenius"},
            "blocks.1": {"method": "svd"},
            "last": {"method": "svd"},
        },
    },
}


class Killed(BaseException):
    """The process ends here."""


class Killing:
    """Lets a number of changes of the work directory happen, and no more."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left: int | None = None
        self.written: list[tuple[str, str]] = []
        for name in ("put", "remove"):
            monkeypatch.setattr(WorkDirectory, name, self._counting(getattr(WorkDirectory, name)))

    def _counting(self, method: Any) -> Any:
        def counted(work: WorkDirectory, stage: str, unit: str, *rest: Any) -> None:
            if self.left == 0:
                raise Killed
            method(work, stage, unit, *rest)
            if rest:
                self.written.append((stage, unit))
            if self.left is not None:
                self.left -= 1

        return counted


@pytest.fixture
def killing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Killing]:
    with monkeypatch.context() as patches:
        yield Killing(patches)


def config(folder: Path, name: str, case: str) -> Any:
    (folder / name).mkdir()
    changes = {
        "model.path": str(folder / "chain.safetensors"),
        "model.factory": "sweep_factory:Chain",
        "calibration.path": str(folder / "rows.safetensors"),
        "compression.size": 0.9,
        "evaluation": [],
    }
    return load_config(pico.job(folder / name, changes | CASES[case]))


def collect(job: Any) -> Path:
    plan = make_plan(job)
    with WorkDirectory(plan.work_dir, plan.statistics_fingerprint) as work:
        progress = Progress(quiet=True)
        run_stage(
            StatisticsStage(plan, work, partial(prepare_pass, plan, work, progress)), progress
        )
    return plan.work_dir


def statistics(work: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (work / STATISTICS).iterdir()}


def at_times(due: Iterator[bool]) -> Callable[[Sweep], bool]:
    return lambda _: next(due)


STORED: dict[str, Callable[[], Iterator[bool]]] = {
    "always": lambda: repeat(True),
    "at times": lambda: cycle([False, True]),
    "never": lambda: repeat(False),
}


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("case", CASES)
def test_whatever_is_the_last_file_that_is_written_the_next_run_goes_on_from_it(
    case: str, stored: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killing: Killing
) -> None:
    monkeypatch.setattr(Sweep, "_is_due", at_times(STORED[stored]()))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "sweep_factory.py").write_text(FACTORY)
    namespace: dict[str, Any] = {}
    exec(FACTORY, namespace)
    torch.manual_seed(0)
    save_file(namespace["Chain"]().state_dict(), tmp_path / "chain.safetensors")
    rows = torch.randn(12, 300, 8, generator=torch.Generator().manual_seed(1))
    save_file({"x": rows}, tmp_path / "rows.safetensors")
    expected = statistics(collect(config(tmp_path, "whole", case)))
    assert len(expected) == 4
    for number in range(1, 100):
        job = config(tmp_path, str(number), case)
        killing.left, killing.written = number, []
        try:
            work = collect(job)
            break
        except Killed:
            before, killing.left, killing.written = killing.written, None, []
        work = collect(job)
        assert statistics(work) == expected
        # Where everything that passes is stored, only the work on the missing file is done twice.
        stages = (STATISTICS, *PASSING) if stored == "always" else (STATISTICS,)
        again = [x for x in killing.written if x[0] in stages and x in before]
        assert len(again) <= 1, "at most what belongs to the file that was not written"
        assert not any((work / stage).exists() for stage in PASSING)
    assert number > 5 and statistics(work) == expected
