"""The rows of calibration data that reach each layer decide how much data is drawn by default.

A fit learns what its rows have in common and what they do not. The error on other data exceeds the
error on these rows by a share that falls like inputs / rows (docs/theory.md), so the number of rows
follows from the widest layers.
"""

import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lrc_cli.config import Config
from lrc_cli.data.draw import Purpose, Sequences, draw, num_positions
from lrc_cli.data.padding import masks_of
from lrc_cli.data.processors import Processors
from lrc_cli.data.purposes import CALIBRATION, RECOVER, purposes_of
from lrc_cli.engine import Solver
from lrc_cli.execution.constancy import Trace
from lrc_cli.network.layer import Layer
from lrc_cli.text import count, percent

ROWS_PER_INPUT = 20
"""The rows for each input of a layer that a default amount of data gives.

On SmolLM2 at 0.6, with 21 rows for each input, twice as many would take 0.03 of 0.94 nats from the
loss that is lost (docs/benchmarks.md). Sequential fitting needs 17 or more.
"""
REACHED = 0.9
"""The fraction of the layers' weights that get so many rows. A few layers, such as a head that sees
one row of a sequence, do not decide for all."""
MOST_POSITIONS = 1 << 20
"""The most tokens, or rows of features, that a default amount of data has."""


@dataclass(frozen=True, kw_only=True)
class Reach:
    """The rows that calibration data give the layers, by the layer for which they are just enough.

    Layers with nine tenths of the weights have as many rows for each input as this layer, or more.
    """

    name: str
    num_inputs: int
    rows: float
    """The rows of all sequences."""
    num_sequences: int
    short: float
    """The fraction of the weights in layers with fewer rows than inputs."""

    def to_json(self) -> dict[str, Any]:
        """Returns what `lrc plan` says of it."""
        return {
            "num_sequences": self.num_sequences,
            "layer": self.name,
            "inputs": self.num_inputs,
            "rows": round(self.rows),
        }

    @property
    def shortfalls(self) -> list[str]:
        """Returns a sentence where many weights have fewer rows than inputs."""
        if self.short <= 1 - REACHED:
            return []
        return [
            f"{CALIBRATION}: layers with {percent(self.short)} of the weights have more inputs than"
            f" rows to fit to, such as {self.name}: {count(self.num_inputs)} inputs,"
            f" {count(round(self.rows))} rows: give more sequences"
        ]


def rows_per_sequence(
    trace: Trace, layers: Sequence[Layer], sequences: Sequences
) -> dict[str, float]:
    """Returns the rows of one sequence that reach each layer, by its name: padding is left out.

    Layers whose names differ in numbers only, such as the experts of all blocks, get their mean:
    one sequence says little of a single expert.

    Args:
        trace: a pass over one of the sequences.
    """
    real = {mask.shape[1]: mask.float().mean().item() for mask in masks_of(sequences.inputs)}
    groups = defaultdict[tuple[str, tuple[int, int]], list[str]](list)
    for layer in layers:
        groups[re.sub(r"\d+", "*", layer.name), layer.shape].append(layer.name)
    found: dict[str, float] = {}
    for (_, (m, _)), names in groups.items():
        rows = sum(trace.did.returned[name] for name in names) / (m * len(names))
        found |= dict.fromkeys(names, rows * real.get(int(rows), 1.0))
    return found


def reach_of(layers: Sequence[Layer], trace: Trace, sequences: Sequences) -> Reach | None:
    """Returns what calibration sequences give the layers; None without a layer.

    Args:
        layers: the layers that are fitted to data.
        trace: a pass over one of the sequences.
    """
    rows, number = rows_per_sequence(trace, layers, sequences), len(sequences)
    sizes = {layer.name: layer.shape[0] * layer.shape[1] for layer in layers}
    whole, passed = sum(sizes.values()), 0
    few = [x for x in layers if rows[x.name] * number < x.shape[1]]
    for layer in sorted(layers, key=lambda x: rows[x.name] / x.shape[1], reverse=True):
        passed += sizes[layer.name]
        if passed >= REACHED * whole:
            return Reach(
                name=layer.name,
                num_inputs=layer.shape[1],
                rows=rows[layer.name] * number,
                num_sequences=number,
                short=sum(sizes[x.name] for x in few) / whole,
            )
    return None


def default_number(config: Config, reach: Reach | None, drawn: Sequences) -> int:
    """Returns the number of calibration sequences for a config that gives none.

    It is the config's default, or what gives the widest layers ROWS_PER_INPUT rows for each input,
    as far as the data goes and leaves the other purposes what they ask for.

    Args:
        reach: what `drawn` gives the layers.
        drawn: the calibration sequences, of the default number.
    """
    if reach is None or reach.rows <= 0:
        return len(drawn)
    wanted = -(-ROWS_PER_INPUT * reach.num_inputs * reach.num_sequences // int(reach.rows))
    most = MOST_POSITIONS // num_positions(drawn)
    there = drawn.population * (drawn.one_in or 1) - _others(config)
    return max(len(drawn), min(wanted, most, there))


def _others(config: Config) -> int:
    """Returns the calibration sequences that other purposes could take from the same data."""
    own, *others = purposes_of(config)

    def size(purpose: Purpose) -> int:
        takes_rest = purpose.name == RECOVER and not purpose.required
        same = os.path.realpath(purpose.path) == os.path.realpath(own.path)
        if takes_rest or not same:
            return 0
        return -(-purpose.num_sequences * purpose.sequence_length // own.sequence_length)

    return sum(map(size, others))


def with_enough_data(
    config: Config,
    solvers: Mapping[str, Solver],
    trace: Trace,
    sequences: Mapping[str, Sequences],
    processors: Processors,
) -> tuple[Config, dict[str, Sequences], Reach | None]:
    """Returns the config with the number of calibration sequences that it leaves open.

    Args:
        config: the job.
        solvers: by layer name; the layers whose solvers need data count.
        trace: a pass of the layers over one of the calibration sequences.
        sequences: what was drawn for the config.
        processors: the processors of the checkpoint.

    Returns:
        The config; the sequences of every purpose, drawn again where the number has grown; and what
        the calibration sequences give the layers.
    """
    drawn = sequences[CALIBRATION]
    layers = [layer for layer in trace.layers if solvers[layer.name].needs]
    reach = reach_of(layers, trace, drawn)
    number = default_number(config, reach, drawn)
    if number <= len(drawn) or not config.calibration.num_sequences_is_default:
        return config, dict(sequences), reach
    purposes = purposes_of(with_number(config, number, required=False))
    more = draw(purposes, processors=processors, seed=config.calibration.seed)
    found = more[CALIBRATION]
    return with_number(config, len(found)), more, reach_of(layers, trace, found)


def with_number(config: Config, number: int, *, required: bool = True) -> Config:
    """Returns the config with this number of calibration sequences.

    Args:
        required: whether the number counts as written in the config: fewer are then an error.
    """
    given = replace(config.calibration, num_sequences=number, num_sequences_is_default=not required)
    return replace(config, calibration=given)
