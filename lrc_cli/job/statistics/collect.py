"""Phase one collects the missing statistics in one pass over the data and stores them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lrc_cli.data.draw import micro_batch
from lrc_cli.data.purposes import CALIBRATION
from lrc_cli.engine import Statistics
from lrc_cli.errors import InputError
from lrc_cli.execution.chain import Segment
from lrc_cli.execution.constancy import repeating
from lrc_cli.execution.losses import Loss, choose_loss
from lrc_cli.execution.segments import Segmentation, find_segments
from lrc_cli.job.plan import Plan
from lrc_cli.job.stage import Advance, Solved, Stage, Task
from lrc_cli.job.statistics.moments import Moments
from lrc_cli.job.statistics.sweep import Measurement, Sweep
from lrc_cli.job.work import (
    PARTS,
    PASSING,
    STATISTICS,
    Tensors,
    WorkDirectory,
    compress_gram,
    expand_gram,
)
from lrc_cli.network.layer import Layer
from lrc_cli.runtime.progress import Progress
from lrc_cli.runtime.spill import HostMemory

MICRO_BATCH_TOKENS = 2048
UNSEEN = "no calibration input reached it"
"""The reason why a layer without statistics stays dense."""


Prepare = Callable[[Sequence[Layer]], tuple[Measurement, "Parts"]]
"""Returns the pass that measures some layers, and the object that cuts its outcome by unit."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one segment says about a unit: the moments of the unit's layers that run there."""

    stage: str
    """The stage in which this part waits for the other parts of the unit."""
    others: Sequence[str]
    """The stages of the other parts: one for each other segment that has layers of the unit."""
    tensors: Tensors
    layers: Mapping[str, Any]
    """Facts by layer name."""
    loss: Loss | None


UNMEASURED = Part(stage="", others=(), tensors={}, layers={}, loss=None)
"""What is known about a unit whose layers have methods that need no data."""


class StatisticsStage(Stage[Part]):
    """The stage that measures Gram matrices of every layer, in one pass over the calibration data.

    Every measured layer gets a Gram matrix of its inputs. Some methods also ask for a Gram matrix
    of the gradients by the layer's outputs. All processes measure every unit, each process on some
    of the micro-batches.

    Args:
        prepare: called once with the layers to measure, if there are any.
        store_every: see Sweep.
    """

    name = "statistics"

    def __init__(
        self,
        plan: Plan,
        work: WorkDirectory,
        prepare: Prepare,
        *,
        store_every: float | None = None,
    ) -> None:
        super().__init__(work, STATISTICS, plan.units)
        self.plan, self.prepare, self.store_every = plan, prepare, store_every

    def task(self, units: Sequence[str]) -> Task[Part]:
        """See Stage."""
        members = self.plan.units
        layers = [x for unit in units for x in members[unit] if is_measured(self.plan, x)]
        measured = {layer.unit for layer in layers}
        others = [unit for unit in units if unit not in measured and self.plan.owns(unit)]
        if not layers:
            return Task(cost=0.0, solve=lambda _: _unmeasured(others))
        measurement, parts = self.prepare(layers)
        memory = HostMemory(self.plan.config.runtime.memory_bytes, self.work.root)
        sweep = Sweep(
            measurement,
            self.work,
            finished=parts.has,
            keep=memory.keep,
            store_every=self.store_every,
        )

        def solve(advance: Advance) -> Solved[Part]:
            yield from _unmeasured(others)
            for segment, moments in sweep.run(advance):
                yield from parts.of(segment, moments)
                del moments  # the memory is free before the next segment is measured

        return Task(cost=sweep.cost, solve=solve)

    def store(self, unit: str, outcome: Part) -> None:
        """Stores a part of a unit, or the whole unit with the last part."""
        if not all(self.work.has(stage, unit) for stage in outcome.others):
            self.work.put(outcome.stage, unit, outcome.tensors, outcome.layers)
            return
        tensors, measured = outcome.tensors, dict(outcome.layers)
        for stage in outcome.others:
            more, more_facts = self.work.get(stage, unit)
            tensors, measured = tensors | more, measured | more_facts
        facts = _facts(self.plan.units[unit], measured, outcome.loss)
        self.work.put(STATISTICS, unit, tensors, facts)

    def drop_damaged(self) -> list[str]:
        """See Stage.

        With one unit all statistics are deleted, and everything on the way to them: a layer's
        matrix may lie in the unit of another layer, and a pass that goes on needs all files that an
        earlier pass has left.
        """
        units = super().drop_damaged()
        passing = [x for stage in PASSING for x in self.work.drop_damaged(stage)]
        if units or passing:
            self.work.drop([*PASSING, STATISTICS] if units else PASSING)
        return units + passing

    def close(self) -> None:
        """See Stage."""
        self.work.drop(PASSING)


def _unmeasured(units: Sequence[str]) -> Solved[Part]:
    for unit in units:
        yield unit, UNMEASURED


def is_measured(plan: Plan, layer: Layer) -> bool:
    """Returns whether the layer's method needs data."""
    return "gram" in plan.of(layer).solver.needs


def prepare_pass(
    plan: Plan, work: WorkDirectory, progress: Progress, layers: Sequence[Layer]
) -> tuple[Measurement, "Parts"]:
    """Returns the pass that measures `layers`, and the object that cuts its outcome by unit."""
    graded = {layer.name for layer in layers if "fisher" in plan.of(layer).solver.needs}
    loss = _loss(plan, progress) if graded else None
    sequences = plan.sequences[CALIBRATION]
    # The checks have noted a pass over the same sequence.
    again = repeating(plan.network, plan.trace)
    segmentation = find_segments(plan.network, layers, graded, plan.trace.batch, again)
    if not segmentation.chain.names:
        progress.note(f"the network runs whole, not block by block: {segmentation.reason}")
    measurement = Measurement(
        network=plan.network,
        chain=segmentation.chain,
        segments=segmentation.segments,
        batches=list(sequences.batches(micro_batch(sequences, MICRO_BATCH_TOKENS))),
        leaders=segmentation.leaders,
        graded=graded,
        loss=loss,
        seed=plan.config.runtime.seed,
        center=plan.config.compression.center,
    )
    return measurement, Parts(plan, work, segmentation, loss)


def _loss(plan: Plan, progress: Progress) -> Loss:
    compression, probe = plan.config.compression, next(plan.sequences[CALIBRATION].batches(1))
    loss = choose_loss(compression.loss, plan.network, probe, plan.tokenizer)
    progress.note(f"loss: {loss.description}")
    if compression.max_loss_increase is not None and loss.kind == "output":
        raise InputError(
            "compression.max_loss_increase: this network has no likelihood, its loss is the change"
            " of its outputs",
            "set size or max_layer_error",
        )
    return loss


def _facts(
    layers: Sequence[Layer], measured: Mapping[str, Any], loss: Loss | None
) -> dict[str, Any]:
    """Returns where the Gram matrices of a unit's layers lie, and how many tokens were summed."""
    nothing = {"group": None, "group_unit": None, "tokens": 0, "has_gradient": False}
    return {
        "layers": {layer.name: measured.get(layer.name, nothing) for layer in layers},
        "loss": None if loss is None else loss.facts(),
    }


class Parts:
    """The outcome of a pass, cut by unit as each segment comes in.

    A unit whose layers run in several segments waits, in the stage PARTS, for the last segment.
    """

    def __init__(
        self, plan: Plan, work: WorkDirectory, segmentation: Segmentation, loss: Loss | None
    ) -> None:
        self.plan, self.work, self.segmentation, self.loss = plan, work, segmentation, loss

    def has(self, segment: Segment) -> bool:
        """Returns whether the segment was measured before."""
        return all(
            self.work.has(_parts(segment), unit) or self.work.has(STATISTICS, unit)
            for unit in {layer.unit for layer in segment.layers}
        )

    def of(self, segment: Segment, moments: Moments) -> Iterator[tuple[str, Part]]:
        """Yields each unit's part of what all processes have measured, at the unit's owner.

        Raises:
            RunError: a sum is not finite.
        """
        units = {layer.name: layer.unit for layer in segment.layers}
        owners = {name: self.plan.owners[unit] for name, unit in units.items()}
        moments.sum_to(owners, self.plan.processes)
        for unit in filter(self.plan.owns, dict.fromkeys(units.values())):
            layers = [layer for layer in segment.layers if layer.unit == unit]
            moments.check_finite([layer.name for layer in layers])
            yield (
                unit,
                Part(
                    stage=_parts(segment),
                    others=self._others(segment, unit),
                    tensors=_packed(layers, moments),
                    layers={layer.name: self._fact(layer.name, units, moments) for layer in layers},
                    loss=self.loss,
                ),
            )

    def _others(self, segment: Segment, unit: str) -> list[str]:
        return [
            _parts(other)
            for other in self.segmentation.segments
            if other is not segment and any(layer.unit == unit for layer in other.layers)
        ]

    def _fact(self, name: str, units: Mapping[str, str], moments: Moments) -> dict[str, Any]:
        """Returns where a layer's Gram matrices lie.

        The matrix of an input is stored once, with the first layer that reads the input.
        """
        leader = self.segmentation.leaders[name]
        gram = moments.grams.get(leader)
        return {
            "group": leader,
            "group_unit": units[leader],
            "tokens": 0 if gram is None else gram.num_rows,
            "has_gradient": name in moments.fishers,
        }


def _parts(segment: Segment) -> str:
    return f"{PARTS}/{segment.name}"


def _packed(layers: Sequence[Layer], moments: Moments) -> Tensors:
    tensors: Tensors = {}
    for layer in layers:
        for kind, sums, num in (
            ("gram", moments.grams, None),
            ("fisher", moments.fishers, moments.num_tokens),
        ):
            if layer.name in sums:
                triangle, scale = compress_gram(sums[layer.name].lower(num))
                tensors[f"{kind}.{layer.name}"] = triangle
                tensors[f"{kind}-scale.{layer.name}"] = scale
        if moments.center and layer.name in moments.grams:
            tensors[f"mean.{layer.name}"] = moments.grams[layer.name].mean_row()
    return tensors


def read_statistics(plan: Plan, work: WorkDirectory, layer: Layer) -> tuple[Statistics | None, str]:
    """Returns a layer's statistics on the run's device.

    The result is None, with a reason, where the layer must stay dense.
    """
    needs = plan.of(layer).solver.needs
    if not needs:
        return Statistics(), ""
    seen = work.facts(STATISTICS, layer.unit)["layers"][layer.name]
    if not seen["tokens"]:
        return None, UNSEEN
    if "fisher" in needs and not seen["has_gradient"]:
        return None, "the loss does not depend on it"

    def read(unit: str, kind: str, name: str) -> torch.Tensor:
        triangle, scale = f"{kind}.{name}", f"{kind}-scale.{name}"
        stored, _ = work.get(STATISTICS, unit, (triangle, scale))
        return expand_gram(stored[triangle], stored[scale], plan.device)

    leader, key = seen["group"], f"mean.{seen['group']}"
    means, _ = work.get(STATISTICS, seen["group_unit"], [key])
    return Statistics(
        gram=read(seen["group_unit"], "gram", leader),
        fisher=read(layer.unit, "fisher", layer.name) if "fisher" in needs else None,
        mean=means[key].to(plan.device) if key in means else None,
    ), ""
