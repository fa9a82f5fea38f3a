"""Phase two without `compression.sequential` fits layers to their inputs in the dense network."""

from collections.abc import Mapping
from typing import Any

from lrc_cli.engine import Choice
from lrc_cli.job.factors.fit import Fitted
from lrc_cli.job.factors.problem import fit_plainly
from lrc_cli.job.factors.stored import contents_of
from lrc_cli.job.plan import Plan
from lrc_cli.job.stage import LayerStage
from lrc_cli.job.work import Tensors, WorkDirectory
from lrc_cli.network.layer import Layer

PHASE = "factors"


class FactorsStage(LayerStage[Fitted]):
    """The stage that makes the factors of every layer, each layer by itself.

    Args:
        granted: the choices that the budget grants, by layer name.
    """

    name = PHASE

    def __init__(self, plan: Plan, work: WorkDirectory, granted: Mapping[str, Choice]) -> None:
        super().__init__(plan, work, plan.factors_stage)
        self.granted = granted

    def solve(self, layer: Layer) -> Fitted:
        """See LayerStage."""
        return fit_plainly(self.plan, self.work, self.granted, layer)

    def contents(self, unit: str, results: Mapping[str, Fitted]) -> tuple[Tensors, dict[str, Any]]:
        """See LayerStage."""
        return contents_of(self.plan.units[unit], results)
