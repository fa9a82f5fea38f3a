"""The probe measures the pass over the data with the job's own stage.

A few micro-batches run through the head, a block of every kind, the first block and the tail.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from lrc_cli.data.purposes import CALIBRATION
from lrc_cli.execution.chain import HEAD, TAIL, WHOLE, Segment, find_chain
from lrc_cli.execution.hooks import hidden_output
from lrc_cli.execution.segments import NO_CHAIN
from lrc_cli.forecast.clocks import NUM_BATCHES, Timed, typical
from lrc_cli.forecast.estimate import Memory, Piece
from lrc_cli.forecast.probe import Probe
from lrc_cli.job.plan import Plan
from lrc_cli.job.stage import run_stage
from lrc_cli.job.statistics import sweep
from lrc_cli.job.statistics.collect import Parts, StatisticsStage, is_measured, prepare_pass
from lrc_cli.job.statistics.sweep import Measurement
from lrc_cli.job.work import GRADIENTS, INPUTS, STATISTICS
from lrc_cli.network.parts import part_of
from lrc_cli.runtime.memory import PrivateMemory

PHASE = "statistics"


def run_statistics(probe: Probe) -> None:
    """Measures the pass. Statistics of the segments that ran stay in the probe's directory."""
    plan = probe.plan
    measured = [layer for layer in plan.layers if is_measured(plan, layer)]
    if not measured:  # only the checks and the quality of the output need data
        chain = find_chain(plan.network, next(plan.sequences[CALIBRATION].batches(1)))
        probe.why_whole = None if chain.names else NO_CHAIN
        return
    measurement, parts = prepare_pass(plan, probe.work, probe.quiet, measured)
    probe.why_whole = None if measurement.chain.names else parts.segmentation.reason
    hidden = hidden_output(measurement.chain.shape)  # the shapes are for one sequence
    probe.hidden_bytes = 0 if hidden is None else hidden.nbytes * len(plan.sequences[CALIBRATION])
    if not probe.missing(STATISTICS):
        return
    with PrivateMemory(plan.device) as memory:
        ran = _Pass(probe, measurement)
        ran.run(parts)
    probe.batch_ratio = ran.batch_ratio
    probe.pieces += ran.pieces()
    probe.passing_bytes = ran.passing_bytes
    probe.lag = ran.lag
    probe.boundary_bytes = int(ran.lag * ran.handed[INPUTS] + ran.handed[GRADIENTS])
    probe.spilled_bytes = ran.spilled_bytes
    probe.statistics_bytes = ran.statistics_bytes
    held = Memory(phase=PHASE, measured=memory.peak, kept=ran.kept_bytes, gpu=memory.gpu)
    probe.memory.append(held)


class _Pass:
    """A pass over a few micro-batches, and what it says of the whole pass."""

    def __init__(self, probe: Probe, measurement: Measurement) -> None:
        self.probe, self.whole, self.work = probe, measurement, probe.work
        self.kinds = kinds_of(probe.plan, measurement.segments)
        self.few = replace(
            measurement,
            segments=representatives(measurement.segments, self.kinds),
            batches=measurement.batches[:NUM_BATCHES],
        )
        self.batch_ratio = len(measurement.batches) / len(self.few.batches)
        self.steps: dict[tuple[str, bool], float] = {}
        """{(segment, whether it ran backwards): seconds of one micro-batch}."""
        self.storing: list[float] = []
        """Seconds to store the statistics of each segment."""

    def run(self, parts: Parts) -> None:
        plan = self.probe.plan
        # Everything that passes is stored, to see its size.
        stage = StatisticsStage(plan, self.work, lambda _: (self.few, parts), store_every=0.0)
        timed = Timed(stage, list(plan.units), plan.device)
        run_stage(timed, self.probe.quiet)
        remaining = sweep.what_remains(self.few, lambda _: False, lambda *_: False)
        order = [*((i, False) for i in remaining.forward), *((i, True) for i in remaining.backward)]
        each = len(self.few.batches)
        for place, (number, back) in enumerate(order):
            name = self.few.segments[number].name
            self.steps[name, back] = typical(timed.steps.steps[place * each :][:each])
        self.storing = timed.storing.steps

    def pieces(self) -> list[Piece]:
        """Returns the whole pass, without the segments that an earlier run has measured."""
        missing = set(self.probe.missing(STATISTICS))
        left = [s for s in self.whole.segments if any(x.unit in missing for x in s.layers)]
        ran = {segment.name for segment in self.few.segments}
        found = [
            Piece(phase=PHASE, seconds=seconds, times=len(self.whole.batches))
            for segment in self.whole.segments
            for (name, back), seconds in self.steps.items()
            if name == (segment.name if segment.name in ran else self.kinds[segment.name])
            and (segment in left or not segment.layers or not back)
        ]
        stored = sum(self.storing) / max(len(self.storing), 1)
        return [*found, Piece(phase=PHASE, seconds=stored, times=len(left))]

    @property
    def handed(self) -> dict[str, float]:
        """Bytes that all micro-batches hand over at one boundary, forwards and backwards."""
        written, places = self.work.num_bytes, self.work.places
        return {
            stage: written.get(stage, 0) / max(len(places.get(stage, ())), 1) * self.batch_ratio
            for stage in (INPUTS, GRADIENTS)
        }

    @property
    def lag(self) -> int:
        """The number of segments that run between two times of storing what passes.

        Older states are deleted then. A pass that is too short to store anything counts whole.
        """
        back = any(x.name in self.whole.graded for s in self.whole.segments for x in s.layers)
        names = [self.kinds[segment.name] for segment in self.whole.segments]
        seconds = [self.steps[name, back] for name in names if (name, back) in self.steps]
        total = sum(seconds) * len(self.whole.batches)
        number = len(self.whole.segments)
        return max(int(number * min(sweep.STORE_EVERY / max(total, 1e-9), 1.0)), 1)

    @property
    def passing_bytes(self) -> int:
        """The bytes of files at the turn of the pass.

        The files are the inputs of all segments that will run backwards with the gradients of one
        segment, or the inputs of one segment less with the gradients of two. Where no segment runs
        backwards, the files are the inputs of two segments.
        """
        segments, graded = self.whole.segments, self.whole.graded
        before = [all(x.name not in graded for x in s.layers) for s in segments]
        first = before.index(False) if False in before else len(segments)
        back = len(segments) - max(first, 1)
        inputs, gradients = self.handed[INPUTS], self.handed[GRADIENTS]
        if self.lag == len(segments):  # it is over before anything else is stored
            return int(back * inputs)
        turn = back * inputs + gradients + max(gradients - inputs, 0)
        return int(max(turn, min(2, len(segments) - 1) * inputs))

    @property
    def statistics_bytes(self) -> int:
        """The bytes of the statistics of all missing units."""
        ran = {layer.unit for segment in self.few.segments for layer in segment.layers}
        written = self.work.num_bytes.get(STATISTICS, 0)
        return int(written / max(len(ran), 1) * len(self.probe.missing(STATISTICS)))

    @property
    def spilled_bytes(self) -> int:
        """The bytes in files without a name: beyond the memory limit, or inputs for a solver."""
        plan = self.probe.plan
        limit, tokens = plan.config.runtime.memory_bytes, plan.sequences[CALIBRATION].num_tokens
        beyond = 0 if limit is None else max(int(max(self.handed.values())) - limit, 0)
        reads = [x for x in plan.layers if plan.of(x).solver.reads_inputs]
        streamed = [4 * tokens * layer.shape[1] for layer in reads]
        return max([beyond, *streamed])

    @property
    def kept_bytes(self) -> int:
        """The bytes that the micro-batches which did not run add between two segments."""
        limit = self.probe.plan.config.runtime.memory_bytes
        whole = max(self.handed.values())
        kept = whole if limit is None else min(whole, limit)
        return max(int(kept - whole / self.batch_ratio), 0)


def kinds_of(plan: Plan, segments: Sequence[Segment]) -> dict[str, str]:
    """Returns {segment: its kind}, the middle segment with the same parameters and layers."""
    groups: dict[Any, list[str]] = {}
    for segment in segments:
        key: Any = segment.name
        if segment.name not in (HEAD, TAIL, WHOLE):
            parameters = part_of(plan.network.module, segment.name).named_parameters()
            # The layers are sorted because experts that the first sequence misses come last.
            own = sorted(layer.name.removeprefix(segment.name) for layer in segment.layers)
            key = (tuple((name, x.shape) for name, x in parameters), tuple(own))
        groups.setdefault(key, []).append(segment.name)
    return {name: names[len(names) // 2] for names in groups.values() for name in names}


def representatives(segments: Sequence[Segment], kinds: dict[str, str]) -> list[Segment]:
    """Returns one segment of every kind, and the first block, where the backward pass ends."""
    wanted = {*kinds.values(), HEAD, TAIL, WHOLE}
    wanted |= {segment.name for segment in segments[1:2]}
    return [segment for segment in segments if segment.name in wanted]


def counts_of(plan: Plan, segments: Sequence[Segment], solved: Collection[str]) -> dict[str, int]:
    """Returns {segment to run: number of segments of its kind}, in the order of their runs.

    Args:
        solved: layers that have factors. A segment whose layers all have factors stands for its
            kind, if there is such a segment.
    """
    kinds = kinds_of(plan, segments)
    groups: dict[str, list[Segment]] = {}
    for segment in segments:
        groups.setdefault(kinds[segment.name], []).append(segment)
    counts = {}
    for group in groups.values():
        own = [s for s in group if s.layers and {x.name for x in s.layers} <= set(solved)]
        counts[(own or group)[0].name] = len(group)
    return {s.name: counts[s.name] for s in segments if s.name in counts}
