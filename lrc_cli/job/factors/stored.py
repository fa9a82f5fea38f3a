"""A unit's factors and facts are written to the work directory and read back here."""

from collections.abc import Mapping, Sequence
from typing import Any

from lrc_cli.job.factors.fit import Fitted
from lrc_cli.job.work import Tensors, WorkDirectory
from lrc_cli.network.layer import Layer
from lrc_cli.report.record import LayerFacts


def contents_of(
    layers: Sequence[Layer], fitted: Mapping[str, Fitted]
) -> tuple[Tensors, dict[str, Any]]:
    """Returns what is written of a unit: its layers' factors by disk name, and their facts."""
    tensors: Tensors = {}
    for layer in layers:
        tensors |= fitted[layer.name].tensors(layer)
    return tensors, {layer.name: fitted[layer.name].facts.to_json() for layer in layers}


def read_facts(work: WorkDirectory, stage: str, unit: str) -> dict[str, LayerFacts]:
    """Returns the facts of a stored unit's layers, by name. Raises as `WorkDirectory.get` does."""
    stored = work.facts(stage, unit)
    return {name: LayerFacts.from_json(x, f"{stage}/{unit}", name) for name, x in stored.items()}
