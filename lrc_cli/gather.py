"""Phase one, data: which statistics are missing, one pass that collects them, where they lie."""

from typing import Any

import torch

from lrc_cli.engine import Statistics
from lrc_cli.errors import InputError
from lrc_cli.losses import Loss, choose_loss
from lrc_cli.models import Layer, input_groups
from lrc_cli.plan import Plan
from lrc_cli.progress import Progress
from lrc_cli.purposes import CALIBRATION
from lrc_cli.statistics import GramSum, collect, micro_batch
from lrc_cli.work import STATISTICS, WorkDirectory, compress_gram, expand_gram

MICRO_BATCH_TOKENS = 2048


def collect_statistics(plan: Plan, work: WorkDirectory, progress: Progress) -> None:
    """Gram matrices of every unit that has none yet, in one pass over the calibration data."""
    missing = [unit for unit in plan.units if not work.has(STATISTICS, unit)]
    layers = [layer for unit in missing for layer in plan.units[unit]]
    measured = [layer for layer in layers if "gram" in plan.solvers[layer.name].needs]
    if not measured:
        for unit in missing:
            work.put(STATISTICS, unit, {}, {"layers": {}, "loss": None})
        return
    network, sequences = plan.network, plan.sequences[CALIBRATION]
    probe = next(sequences.batches(1))
    graded = [layer for layer in measured if "fisher" in plan.solvers[layer.name].needs]
    loss = _loss(plan, progress) if graded else None
    leaders = input_groups(network, measured, probe)
    groups: dict[str, list[Layer]] = {}
    for layer in measured:
        if layer.name in leaders:
            groups.setdefault(leaders[layer.name], []).append(layer)
    with progress.phase("statistics", len(sequences)) as phase:
        grams, fishers = collect(
            network,
            sequences,
            inputs=groups,
            outputs=graded,
            loss=loss,
            seed=plan.config.runtime.seed,
            micro_batch=micro_batch(sequences, MICRO_BATCH_TOKENS),
            advance=phase.advance,
            center=plan.config.compression.center,
        )
    for unit in missing:
        members = plan.units[unit]
        facts = {
            "layers": {x.name: _facts(x, leaders, groups, grams, fishers) for x in members},
            "loss": None if loss is None else loss.facts(),
        }
        tensors = _packed(members, grams, fishers)
        if plan.config.compression.center:
            tensors |= {
                f"mean.{x.name}": grams[x.name].mean_row() for x in members if x.name in grams
            }
        work.put(STATISTICS, unit, tensors, facts)


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
    layer: Layer,
    leaders: dict[str, str],
    groups: dict[str, list[Layer]],
    grams: dict[str, GramSum],
    fishers: dict[str, GramSum],
) -> dict[str, Any]:
    """Where the layer's Gram matrices lie: that of its inputs is stored once, with the leader."""
    group = leaders.get(layer.name)
    return {
        "group": group,
        "group_unit": groups[group][0].unit if group else None,
        "tokens": grams[group].num_rows if group in grams else 0,
        "has_gradient": layer.name in fishers,
    }


def _packed(
    layers: list[Layer], grams: dict[str, GramSum], fishers: dict[str, GramSum]
) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for layer in layers:
        for kind, sums in (("gram", grams), ("fisher", fishers)):
            if layer.name in sums:
                triangle, scale = compress_gram(sums[layer.name].mean())
                tensors[f"{kind}.{layer.name}"] = triangle
                tensors[f"{kind}-scale.{layer.name}"] = scale
    return tensors


def read_statistics(plan: Plan, work: WorkDirectory, layer: Layer) -> tuple[Statistics | None, str]:
    """A layer's statistics on the run's device; None, with the reason, where it must stay dense."""
    needs = plan.solvers[layer.name].needs
    if not needs:
        return Statistics(), ""
    tensors, facts = work.get(STATISTICS, layer.unit)
    seen = facts["layers"][layer.name]
    if not seen["tokens"]:
        return None, "no calibration input reached it"
    if "fisher" in needs and not seen["has_gradient"]:
        return None, "the loss does not depend on it"

    def expand(kind: str, name: str, stored: dict[str, torch.Tensor]) -> torch.Tensor:
        return expand_gram(stored[f"{kind}.{name}"], stored[f"{kind}-scale.{name}"], plan.device)

    leader = (
        tensors if seen["group_unit"] == layer.unit else work.get(STATISTICS, seen["group_unit"])[0]
    )
    fisher = expand("fisher", layer.name, tensors) if "fisher" in needs else None
    gram, mean = expand("gram", seen["group"], leader), leader.get(f"mean.{seen['group']}")
    mean = None if mean is None else mean.to(plan.device)
    return Statistics(gram=gram, fisher=fisher, mean=mean), ""
