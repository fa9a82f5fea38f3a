"""The probe measures evaluation and certification: both networks run over a few micro-batches.

The networks run through the head, one block of every kind and the tail. One of the networks has
compressed blocks.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from lrc_cli.data.draw import Sequences, micro_batch
from lrc_cli.data.purposes import CALIBRATION, CERTIFICATION
from lrc_cli.execution.chain import find_chain, segments_of
from lrc_cli.execution.glance import glance
from lrc_cli.forecast.clocks import NUM_BATCHES, Clock, typical
from lrc_cli.forecast.data_pass import counts_of
from lrc_cli.forecast.estimate import Memory, Piece
from lrc_cli.job.factors.fit import read_facts
from lrc_cli.job.factors.two_networks import TwoNetworks
from lrc_cli.job.output.certify import selection_of
from lrc_cli.job.plan import Plan
from lrc_cli.job.work import WorkDirectory
from lrc_cli.network.layer import Layer
from lrc_cli.quality import compare as comparison
from lrc_cli.quality import held_out
from lrc_cli.quality.compare import scoring
from lrc_cli.runtime.memory import PrivateMemory

Run = Callable[..., Any]
"""`compare.compare` or `held_out.measure`; missing are networks, sequences, `advance`, `only`."""


def run_quality(
    plan: Plan, work: WorkDirectory, units: Iterable[str]
) -> tuple[list[Piece], Memory]:
    """Returns the pieces and the memory of everything that comes after the factors.

    Args:
        units: the units whose factors are in `work`; all other layers stay dense here.
    """
    with PrivateMemory(plan.device) as memory:
        both = _Comparison(plan, work, units)
        batch = next(plan.sequences[CALIBRATION].batches(1))
        loss = scoring(plan.network, batch, plan.tokenizer)
        pieces = [Piece(phase="verification", seconds=both.opening)]
        seed = plan.config.runtime.seed
        compare = partial(comparison.compare, loss=loss, seed=seed)
        for name in plan.evaluation_names:
            pieces += both.pieces(
                "evaluation", compare, plan.sequences[name], comparison.MICRO_BATCH_TOKENS
            )
        if CERTIFICATION in plan.sequences:
            measure = partial(held_out.measure, layers=both.factorised, loss=loss, seed=seed)
            for phase, sequences in (
                ("selection", selection_of(plan, trained=plan.config.recover.is_used)),
                (CERTIFICATION, plan.sequences[CERTIFICATION]),
            ):
                run = partial(measure, decompose=phase == CERTIFICATION)
                pieces += both.pieces(phase, run, sequences, held_out.MICRO_BATCH_TOKENS)
    phase = "evaluation and certification"
    return pieces, Memory(phase=phase, measured=memory.peak, gpu=memory.gpu)


class _Comparison:
    """The dense network, and the checkpoint opened again with the factors of some units."""

    def __init__(self, plan: Plan, work: WorkDirectory, units: Iterable[str]) -> None:
        self.plan = plan
        batch = next(plan.sequences[CALIBRATION].batches(1))
        chain = find_chain(plan.network, batch)
        segments = segments_of(plan.network, chain, plan.layers, batch)
        clock = Clock(plan.device)
        networks = TwoNetworks(plan, chain, [batch])
        self.after = networks.compressed.network
        glance(self.after, batch)
        clock.tick()
        self.opening = clock.steps[0]
        """The seconds to open the checkpoint again and to run it once."""
        self.factorised, solved = list[Layer](), set[str]()
        for unit in units:
            tensors, _ = work.get(plan.factors_stage, unit)
            facts = read_facts(work, plan.factors_stage, unit)
            for layer in plan.units[unit]:
                networks.install(layer, tensors, facts[layer.name])
            solved |= set(facts)
            self.factorised += [x for x in plan.units[unit] if not facts[x.name].is_dense]
        self.counts = counts_of(plan, segments, solved)

    def pieces(self, phase: str, run: Run, sequences: Sequences, limit: int) -> list[Piece]:
        """Returns the pieces of one run over the sequences, in micro-batches of `limit` tokens."""
        size = micro_batch(sequences, limit)
        few, _ = sequences.split(size * NUM_BATCHES)
        clock = Clock(self.plan.device)
        networks = self.plan.network, self.after
        run(*networks, sequences=few, advance=clock.tick, only=set(self.counts))
        steps, times = clock.steps, -(-len(sequences) // size)
        each = len(steps) // len(self.counts)
        found = [
            Piece(
                phase=phase, seconds=typical(steps[i * each : (i + 1) * each]), times=times * count
            )
            for i, count in enumerate(self.counts.values())
        ]
        # The run looks for the segments before its first step.
        setup = max(steps[0] - typical(steps[:each]), 0.0)
        return [*found, Piece(phase=phase, seconds=setup)]
