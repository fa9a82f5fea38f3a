"""Phase one measures the errors of the storages whose errors no spectrum tells."""

from collections.abc import Mapping
from typing import Any

import torch

from lrc_cli.engine import STORAGES, Errors, SolveError
from lrc_cli.job.plan import Plan
from lrc_cli.job.spectra.solve import weight_of
from lrc_cli.job.stage import LayerStage
from lrc_cli.job.statistics.collect import read_statistics
from lrc_cli.job.work import MEASURED, Tensors, WorkDirectory
from lrc_cli.network.layer import Layer


class MeasuredStage(LayerStage[Tensors]):
    """The stage that measures the errors of one storage's choices, in both units of a target.

    The result of a layer is (j, 2) float64, the `Errors` of each choice. A layer that must stay
    dense has no result.
    """

    name = "forms"

    def __init__(self, plan: Plan, work: WorkDirectory, storage: str) -> None:
        super().__init__(plan, work, folder_of(plan, storage))
        self.storage = storage

    def solve(self, layer: Layer) -> Tensors:
        """See LayerStage."""
        planned = self.plan.of(layer)
        statistics, _ = read_statistics(self.plan, self.work, layer)
        if statistics is None:
            return {}
        weight, metric = weight_of(self.plan, layer).double(), planned.solver.metric(statistics)
        try:
            errors = STORAGES[self.storage].measure(weight, metric, planned.dtype)
        except SolveError:  # the layer can be given to no choice of this storage
            return {}
        return {layer.name: torch.tensor(list(errors or ()), dtype=torch.float64)}

    def contents(self, unit: str, results: Mapping[str, Tensors]) -> tuple[Tensors, dict[str, Any]]:
        """See LayerStage."""
        tensors = {name: x for found in results.values() for name, x in found.items() if x.numel()}
        return tensors, {}


def folder_of(plan: Plan, storage: str) -> str:
    """Returns the folder of a storage's errors. The dtype counts, because it rounds."""
    return f"{MEASURED}/{storage}-{plan.config.output.dtype}"


def measured_storages(plan: Plan) -> list[str]:
    """Returns the storages of the plan whose errors no spectrum tells."""
    asked = dict.fromkeys(plan.of(layer).storage for layer in plan.layers)
    return [storage for storage in asked if STORAGES[storage].is_measured]


def read_measured(plan: Plan, work: WorkDirectory, unit: str) -> Tensors:
    """Returns the errors that the target bounds, by layer name, where a storage measures errors."""
    kind = Errors._fields.index(
        "metric" if plan.config.compression.max_layer_error is None else "output"
    )
    found: Tensors = {}
    for layer in plan.units[unit]:
        storage = plan.of(layer).storage
        folder = folder_of(plan, storage)
        if STORAGES[storage].is_measured and work.has(folder, unit):
            tensors, _ = work.get(folder, unit, [layer.name])
            found |= {name: tensor[:, kind] for name, tensor in tensors.items()}
    return found
