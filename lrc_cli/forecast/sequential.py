"""The probe measures sequential fitting with the job's own stage.

Both networks run over a few micro-batches, through the head, one block of every kind and the tail.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from lrc_cli.data.purposes import CALIBRATION
from lrc_cli.engine import Choice, Drift
from lrc_cli.execution.chain import Chain, Segment, find_chain, segments_of
from lrc_cli.forecast.clocks import Clock, Timed
from lrc_cli.forecast.data_pass import counts_of
from lrc_cli.forecast.estimate import Memory, Piece
from lrc_cli.forecast.probe import Probe, on_few_sequences
from lrc_cli.job.factors.decide_sequential import Decision
from lrc_cli.job.factors.plain import PHASE
from lrc_cli.job.factors.sequential import SequentialStage
from lrc_cli.job.factors.two_networks import TwoNetworks
from lrc_cli.job.plan import Plan
from lrc_cli.job.stage import run_stage
from lrc_cli.job.work import WorkDirectory
from lrc_cli.network.layer import Layer
from lrc_cli.runtime.memory import PrivateMemory


def run_sequential(
    probe: Probe,
    plan: Plan,
    granted: Mapping[str, Choice],
    decision: Decision,
    kinds: Mapping[str, list[str]],
) -> list[Piece]:
    """Stores the factors of one unit of every kind at one size, and returns their times.

    Args:
        kinds: see `Probe.unit_kinds`.
    """
    few, ratio = on_few_sequences(plan)
    few = replace(few, layers=[layer for layer in plan.layers if layer.unit in kinds])
    one = next(plan.sequences[CALIBRATION].batches(1))
    segments = segments_of(plan.network, find_chain(plan.network, one), plan.layers, one)
    counts = counts_of(plan, segments, {layer.name for layer in few.layers})
    stage = _OnFewSegments(few, probe.work, granted, decision.excluded, counts)
    with PrivateMemory(plan.device) as memory:
        run_stage(Timed(stage, list(kinds), plan.device), probe.quiet)
    probe.memory.append(Memory(phase=PHASE, measured=memory.peak, gpu=memory.gpu))
    missing = [unit for unit in plan.units if not probe.has(plan.factors_stage, unit)]
    left = len(missing) / len(plan.units)
    pieces = list[Piece]()
    for name, walking in stage.walking_seconds.items():
        # The way is as long as the data, and there are as many solves as missing units.
        times = counts[name] if missing else 0
        solving = stage.segment_seconds[name] - walking
        pieces.append(Piece(phase=PHASE, seconds=walking, times=times * ratio))
        pieces.append(Piece(phase=PHASE, seconds=solving, times=counts[name] * left))
    return pieces


class _TimedNetworks(TwoNetworks):
    """Both networks, with the seconds of each segment and of the solves between its layers."""

    def __init__(self, plan: Plan, *given: Any) -> None:
        super().__init__(plan, *given)
        self.clock = Clock(plan.device)
        self.walking_seconds: dict[str, float] = {}
        """{segment: seconds of both networks}."""
        self.segment_seconds: dict[str, float] = {}
        """{segment: seconds until both networks have passed it, solves included}."""

    @contextmanager
    def _walks(self, segment: Segment) -> Iterator[None]:
        began = self.clock.now()
        yield
        before = self.walking_seconds.get(segment.name, 0.0)
        self.walking_seconds[segment.name] = before + self.clock.now() - began

    def drift(
        self, segment: Segment, layer: Layer, step: Callable[[], None]
    ) -> tuple[Drift, Drift | None] | None:
        """See TwoNetworks."""
        with self._walks(segment):
            return super().drift(segment, layer, step)

    def advance(self, segment: Segment) -> None:
        """See TwoNetworks."""
        with self._walks(segment):
            super().advance(segment)
        self.clock.tick()
        self.segment_seconds[segment.name] = self.clock.steps[-1]


class _OnFewSegments(SequentialStage):
    """The job's stage, which passes only some of the segments.

    Args:
        only: the names of the segments to pass.
    """

    networks_type = _TimedNetworks

    def __init__(
        self,
        plan: Plan,
        work: WorkDirectory,
        granted: Mapping[str, Choice],
        excluded: Mapping[str, str | None],
        only: Collection[str],
    ) -> None:
        super().__init__(plan, work, granted, excluded)
        self.only = only
        self.walking_seconds: dict[str, float] = {}
        self.segment_seconds: dict[str, float] = {}

    def segments(self, chain: Chain) -> list[Segment]:
        """See SequentialStage."""
        return [segment for segment in super().segments(chain) if segment.name in self.only]

    def open_networks(self, chain: Chain) -> TwoNetworks:
        """See SequentialStage."""
        networks = super().open_networks(chain)
        assert isinstance(networks, _TimedNetworks)
        self.walking_seconds = networks.walking_seconds
        self.segment_seconds = networks.segment_seconds
        return networks
