"""The probe measures a job on a little of it, and solves the layers of one unit of every kind.

The solves use the job's statistics where an earlier run has stored them. Otherwise they use the
statistics that `data_pass.py` has collected from a few micro-batches.
"""

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lrc_cli.data.draw import micro_batch
from lrc_cli.data.purposes import CALIBRATION
from lrc_cli.engine import Choice, Predicted
from lrc_cli.forecast.clocks import NUM_BATCHES, Timed, TimedWork
from lrc_cli.forecast.estimate import Memory, Piece
from lrc_cli.job.factors.plain import FactorsStage
from lrc_cli.job.plan import Plan
from lrc_cli.job.spectra.solve import num_workers
from lrc_cli.job.spectra.survey import SpectraStage, unit_predicted
from lrc_cli.job.stage import run_stage
from lrc_cli.job.statistics.collect import MICRO_BATCH_TOKENS, is_measured
from lrc_cli.job.work import SPECTRA, STATISTICS, Tensors, WorkDirectory
from lrc_cli.network.layer import Layer
from lrc_cli.runtime.memory import PrivateMemory
from lrc_cli.runtime.progress import Progress


@dataclass
class Probe:
    """The measurements of one checkpoint and its data.

    Args:
        plan: the plan of any of the sizes.
        job_work: the work directory of the job, if there is one; its units need not be done again.
        work: the work directory of the probe.
    """

    plan: Plan
    job_work: WorkDirectory | None
    work: TimedWork
    stop: Progress
    """The display of the command, which tells between two steps whether to stop."""
    pieces: list[Piece] = field(default_factory=list)
    memory: list[Memory] = field(default_factory=list)
    passing_bytes: int = 0
    """The bytes that the whole pass writes to the work directory and deletes again."""
    boundary_bytes: int = 0
    """The part of `passing_bytes` that is deleted at once, near the end too."""
    lag: int = 1
    """The number of units that are measured before their inputs are deleted."""
    spilled_bytes: int = 0
    """The bytes in files without a name, while layers are solved or networks run."""
    statistics_bytes: int = 0
    """The bytes of missing statistics."""
    hidden_bytes: int = 0
    """The bytes of one network's hidden states between two segments."""
    why_whole: str | None = None
    """Why the network runs whole, not block by block; None: it does not."""
    batch_ratio: float = 1.0
    """The number of all micro-batches, divided by the few that ran."""

    @property
    def quiet(self) -> Progress:
        return Progress(stop=self.stop.stop, quiet=True)

    def has(self, stage: str, unit: str) -> bool:
        """Returns whether the job's work directory has the unit."""
        return self.job_work is not None and self.job_work.has(stage, unit)

    def missing(self, stage: str) -> list[str]:
        """Returns the units that the job has yet to do."""
        return [unit for unit in self.plan.units if not self.has(stage, unit)]

    def has_factors(self, plan: Plan) -> bool:
        """Returns whether the job's work directory has all factors of a size."""
        return all(self.has(plan.factors_stage, unit) for unit in plan.units)

    def unit_kinds(self) -> dict[str, list[str]]:
        """Returns {unit whose statistics are at hand: all units like it, itself included}."""
        groups: dict[Any, list[str]] = {}
        for unit, layers in self.plan.units.items():
            solvers = [self.plan.of(layer).solver.name for layer in layers]
            like = [(x.name.removeprefix(unit), x.shape) for x in layers]
            groups.setdefault((tuple(like), tuple(solvers)), []).append(unit)
        found = {}
        for units in groups.values():
            at_hand = [unit for unit in units if self._is_at_hand(unit)]
            found[at_hand[len(at_hand) // 2] if at_hand else units[0]] = units
        return found

    def _is_at_hand(self, unit: str) -> bool:
        measured = any(is_measured(self.plan, layer) for layer in self.plan.units[unit])
        return not measured or self.work.has(STATISTICS, unit) or self.has(STATISTICS, unit)

    def _fetch(self, unit: str) -> None:
        """Brings a unit's statistics into the probe's directory, with the units they refer to."""
        if self.work.has(STATISTICS, unit):
            return
        if not self.has(STATISTICS, unit):
            self.work.put(STATISTICS, unit, *_no_tokens(self.plan.units[unit]))
            return
        assert self.job_work is not None
        tensors, facts = self.job_work.get(STATISTICS, unit)
        self.work.put(STATISTICS, unit, tensors, facts)
        for seen in facts["layers"].values():
            if seen["group_unit"] is not None:
                self._fetch(seen["group_unit"])

    def spread_facts(self, kinds: dict[str, list[str]]) -> None:
        """Stores for every unit how many tokens will reach its layers, as its kind tells."""
        for representative, units in kinds.items():
            tensors, facts = self.work.get(STATISTICS, representative)
            ratio = 1.0 if self.has(STATISTICS, representative) else self.batch_ratio
            for unit in units:
                pairs = zip(self.plan.units[unit], self.plan.units[representative], strict=True)
                seen = {layer.name: facts["layers"][like.name] for layer, like in pairs}
                own = {**facts, "layers": {name: _scaled(x, ratio) for name, x in seen.items()}}
                is_own = unit == representative
                if is_own or not self.work.has(STATISTICS, unit):
                    self.work.put(STATISTICS, unit, tensors if is_own else {}, own)

    def run_spectra(self, kinds: dict[str, list[str]]) -> None:
        """Solves and times the spectra of one unit of every kind."""
        for unit in kinds:
            self._fetch(unit)
        with PrivateMemory(self.plan.device) as memory:
            for unit in kinds:
                stage = Timed(SpectraStage(self.plan, self.work), [unit], self.plan.device)
                (seconds,) = run_stage(stage, self.quiet).values()
                left = sum(not self.has(SPECTRA, other) for other in kinds[unit])
                self.pieces.append(Piece(phase="spectra", seconds=seconds, times=left))
        self.memory.append(Memory(phase="spectra", measured=memory.peak, gpu=memory.gpu))

    def predicted(self, kinds: dict[str, list[str]]) -> dict[str, Predicted]:
        """Returns the predicted errors of all layers, by name.

        A layer that the job has not surveyed gets the errors of a layer of the same kind.
        """
        found: dict[str, Predicted] = {}
        for representative, units in kinds.items():
            like = unit_predicted(self.plan, self.work, representative)
            for unit in units:
                if self.has(SPECTRA, unit):
                    assert self.job_work is not None
                    found |= unit_predicted(self.plan, self.job_work, unit)
                    continue
                pairs = zip(self.plan.units[unit], self.plan.units[representative], strict=True)
                found |= {x.name: like[y.name] for x, y in pairs if y.name in like}
        return found

    def run_factors(
        self, plan: Plan, granted: Mapping[str, Choice], kinds: dict[str, list[str]]
    ) -> list[Piece]:
        """Stores the factors of one unit of every kind at one size, and returns their times."""
        pieces = list[Piece]()
        with PrivateMemory(plan.device) as memory:
            for unit, units in kinds.items():
                layers = plan.units[unit]
                reads_inputs = any(plan.of(layer).solver.reads_inputs for layer in layers)
                few, ratio = on_few_sequences(plan) if reads_inputs else (plan, 1.0)
                # One unit may have fewer layers than the job will solve side by side, so it is done
                # several times.
                together = min(-(-num_workers(plan, layers) // len(layers)), len(units))
                stage = Timed(FactorsStage(few, self.work, granted), [unit] * together, plan.device)
                (seconds,) = run_stage(stage, self.quiet).values()
                left = sum(not self.has(plan.factors_stage, other) for other in units)
                times = left * ratio / together
                pieces.append(Piece(phase="factors", seconds=seconds, times=times))
        self.memory.append(Memory(phase="factors", measured=memory.peak, gpu=memory.gpu))
        return pieces


def on_few_sequences(plan: Plan) -> tuple[Plan, float]:
    """Returns a plan with few calibration sequences, and the number of all divided by the few."""
    whole = plan.sequences[CALIBRATION]
    number = min(NUM_BATCHES * micro_batch(whole, MICRO_BATCH_TOKENS), len(whole))
    few, _ = whole.split(number)
    return replace(plan, sequences={**plan.sequences, CALIBRATION: few}), len(whole) / number


def existing_parent(path: Path) -> Path:
    """Returns the last directory on the way to `path` that exists."""
    path = path.absolute()
    while not path.is_dir():
        path = path.parent
    return path


def probe_directory(plan: Plan, stack: ExitStack) -> TimedWork:
    """Makes the probe's work directory, on the disk of the job's. The stack deletes it."""
    place = existing_parent(plan.work_dir)
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix=".lrc-probe-", dir=place))
    work = TimedWork(Path(folder))
    stack.enter_context(work)
    return work


def _no_tokens(layers: Sequence[Layer]) -> tuple[Tensors, dict[str, Any]]:
    """Returns the statistics of layers that no token has reached."""
    seen = {"group": None, "group_unit": None, "tokens": 0, "has_gradient": False}
    return {}, {"layers": {layer.name: dict(seen) for layer in layers}, "loss": None}


def _scaled(seen: dict[str, Any], ratio: float) -> dict[str, Any]:
    return {**seen, "tokens": int(seen["tokens"] * ratio)}
