"""Phase one, data: which statistics are missing, one pass that collects them, where they lie."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lrc_cli.data.draw import micro_batch
from lrc_cli.data.purposes import CALIBRATION
from lrc_cli.engine import Statistics
from lrc_cli.errors import InputError
from lrc_cli.execution.chain import Segment
from lrc_cli.execution.losses import Loss, choose_loss
from lrc_cli.execution.segments import Cut, find_cut
from lrc_cli.job.plan import Plan
from lrc_cli.job.statistics.moments import Moments
from lrc_cli.job.statistics.sweep import Job, Sweep
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


def collect_statistics(plan: Plan, work: WorkDirectory, progress: Progress) -> None:
    """Gram matrices of every unit that has none yet, in one pass over the calibration data."""
    missing = {unit: plan.units[unit] for unit in work.missing(STATISTICS, plan.units)}
    for unit, layers in missing.items():
        if plan.owns(unit) and not any(is_measured(plan, layer) for layer in layers):
            work.put(STATISTICS, unit, {}, _facts(layers, {}, None))
    measured = [x for layers in missing.values() for x in layers if is_measured(plan, x)]
    if measured:
        _measure(plan, work, missing, measured, progress)
    work.drop(PASSING)


def is_measured(plan: Plan, layer: Layer) -> bool:
    return "gram" in plan.of(layer).solver.needs


def _measure(
    plan: Plan,
    work: WorkDirectory,
    units: Mapping[str, list[Layer]],
    layers: Sequence[Layer],
    progress: Progress,
) -> None:
    """Collect the Gram matrices of `layers` and store them with those of their units."""
    job, store = prepare(plan, work, units, layers, progress)
    memory = HostMemory(plan.config.runtime.memory_bytes, work.root)
    sweep = Sweep(job, work, finished=store.has, finish=store.put, keep=memory.keep)
    with progress.phase("statistics", sweep.cost) as phase:
        sweep.run(phase.advance)


def prepare(
    plan: Plan,
    work: WorkDirectory,
    units: Mapping[str, list[Layer]],
    layers: Sequence[Layer],
    progress: Progress,
) -> tuple[Job, "UnitStore"]:
    """The pass that measures `layers`, and what stores its outcome by `units`."""
    graded = {layer.name for layer in layers if "fisher" in plan.of(layer).solver.needs}
    loss = _loss(plan, progress) if graded else None
    sequences = plan.sequences[CALIBRATION]
    cut = find_cut(plan.network, layers, graded, next(sequences.batches(1)))
    if not cut.chain.names:
        progress.note(f"the network runs whole, not block by block: {cut.reason}")
    job = Job(
        network=plan.network,
        chain=cut.chain,
        segments=cut.segments,
        batches=list(sequences.batches(micro_batch(sequences, MICRO_BATCH_TOKENS))),
        leaders=cut.leaders,
        graded=graded,
        loss=loss,
        seed=plan.config.runtime.seed,
        center=plan.config.compression.center,
    )
    return job, UnitStore(plan, work, units, cut, loss)


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
    """A unit's facts: where its layers' Gram matrices lie, and how many tokens they are of."""
    nothing = {"group": None, "group_unit": None, "tokens": 0, "has_gradient": False}
    return {
        "layers": {layer.name: measured.get(layer.name, nothing) for layer in layers},
        "loss": None if loss is None else loss.facts(),
    }


class UnitStore:
    """Stores segments' statistics by unit.

    A unit whose layers run in several segments waits, in the stage PARTS, for the last of them.
    """

    def __init__(
        self,
        plan: Plan,
        work: WorkDirectory,
        units: Mapping[str, list[Layer]],
        cut: Cut,
        loss: Loss | None,
    ) -> None:
        self.plan, self.work, self.units = plan, work, units
        self.cut, self.loss = cut, loss

    def has(self, segment: Segment) -> bool:
        """Whether the segment was measured."""
        return all(
            self.work.has(_parts(segment), unit) or self.work.has(STATISTICS, unit)
            for unit in {layer.unit for layer in segment.layers}
        )

    def put(self, segment: Segment, moments: Moments) -> None:
        """Store what all processes have measured in a segment: each unit by its owner.

        Raises:
            RunError: it is not finite, or the disk is full.
        """
        units = {layer.name: layer.unit for layer in segment.layers}
        owners = {name: self.plan.owners[unit] for name, unit in units.items()}
        moments.sum_to(owners, self.plan.processes)
        for unit in filter(self.plan.owns, dict.fromkeys(units.values())):
            layers = [layer for layer in segment.layers if layer.unit == unit]
            moments.check_finite([layer.name for layer in layers])
            tensors = _packed(layers, moments)
            facts = {layer.name: self._fact(layer.name, units, moments) for layer in layers}
            self._put_unit(segment, unit, tensors, facts)

    def _put_unit(
        self, segment: Segment, unit: str, tensors: Tensors, facts: dict[str, Any]
    ) -> None:
        others = [
            _parts(other)
            for other in self.cut.segments
            if other is not segment and any(layer.unit == unit for layer in other.layers)
        ]
        if not all(self.work.has(stage, unit) for stage in others):
            self.work.put(_parts(segment), unit, tensors, facts)
            return
        for stage in others:
            more, more_facts = self.work.get(stage, unit)
            tensors, facts = tensors | more, facts | more_facts
        self.work.put(STATISTICS, unit, tensors, _facts(self.units[unit], facts, self.loss))

    def _fact(self, name: str, units: Mapping[str, str], moments: Moments) -> dict[str, Any]:
        """Where a layer's Gram matrices lie: that of its inputs is stored once, with the leader."""
        leader = self.cut.leaders[name]
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
    """A layer's statistics on the run's device; None, with the reason, where it must stay dense."""
    needs = plan.of(layer).solver.needs
    if not needs:
        return Statistics(), ""
    seen = work.facts(STATISTICS, layer.unit)["layers"][layer.name]
    if not seen["tokens"]:
        return None, "no calibration input reached it"
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
