"""What sequential fitting adds to the factors: both networks' way to every group of layers."""

from collections import Counter

import torch

from lrc_cli.data.draw import micro_batch
from lrc_cli.data.purposes import CALIBRATION
from lrc_cli.forecast.clocks import NUM_BATCHES, Clock, typical
from lrc_cli.forecast.estimate import Piece
from lrc_cli.forecast.probe import Probe
from lrc_cli.job.factors.two_networks import DriftSum
from lrc_cli.job.statistics.collect import MICRO_BATCH_TOKENS
from lrc_cli.job.work import STATISTICS


def sequential_pieces(probe: Probe) -> list[Piece]:
    """Pieces of the phase "factors", beside the solves.

    Both networks pass every block once, and walk to the input of each group of layers that read the
    same, half of a block on average; there the moments of both inputs are summed.
    """
    plan = probe.plan
    sequences = plan.sequences[CALIBRATION]
    size = micro_batch(sequences, MICRO_BATCH_TOKENS)
    times = -(-len(sequences) // size)
    tokens = sequences.num_tokens // times
    walk, pieces = _walk(probe, size), list[Piece]()
    groups: Counter[int] = Counter()
    for unit, layers in plan.units.items():
        seen = probe.work.facts(STATISTICS, unit)["layers"]
        leaders = {seen[x.name]["group"] or x.name: x.shape[1] for x in layers}
        groups.update(leaders.values())
    share = 2.0 + sum(groups.values()) / max(len(plan.units), 1)
    pieces.append(Piece(phase="factors", seconds=walk, times=share * times))
    for width, count in groups.items():
        seconds = _moments(probe, tokens, width)
        pieces.append(Piece(phase="factors", seconds=seconds, times=count * times))
    return pieces


def _walk(probe: Probe, size: int) -> float:
    """Seconds of one micro-batch through the whole dense network."""
    clock, network = Clock(probe.plan.device), probe.plan.network
    for batch in list(probe.plan.sequences[CALIBRATION].batches(size))[:NUM_BATCHES]:
        clock.restart()
        with torch.no_grad():
            network(batch)
        clock.tick()
    return typical(clock.steps)


def _moments(probe: Probe, tokens: int, width: int) -> float:
    clock = Clock(probe.plan.device)
    rows = torch.randn(tokens, width).to(probe.plan.device)
    sums = DriftSum(width, probe.plan.device, center=probe.plan.config.compression.center)
    for _ in range(NUM_BATCHES):
        clock.restart()
        sums.add(rows, rows)
        clock.tick()
    return typical(clock.steps)
