"""Phase two without `compression.sequential` fits layers to their inputs in the dense network."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from lrc_cli.data.purposes import CALIBRATION
from lrc_cli.engine import Choice, SolveError, Statistics, Survey, problems_of
from lrc_cli.job.factors.fit import (
    Fitted,
    Request,
    contents_of,
    fit_best,
    granted_dense,
    left_dense,
    read_facts,
)
from lrc_cli.job.factors.layer_inputs import read_inputs
from lrc_cli.job.plan import Plan
from lrc_cli.job.spectra.solve import weight_of
from lrc_cli.job.spectra.survey import dense_reason, read_survey
from lrc_cli.job.stage import LayerStage
from lrc_cli.job.statistics.collect import read_statistics
from lrc_cli.job.work import STATISTICS, Tensors, WorkDirectory
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

    def check(self, folder: str, unit: str) -> None:
        """See Stage."""
        read_facts(self.work, folder, unit)

    def solve(self, layer: Layer) -> Fitted:
        """See LayerStage."""
        return fit_plainly(self.plan, self.work, self.granted, layer)

    def contents(self, unit: str, results: Mapping[str, Fitted]) -> tuple[Tensors, dict[str, Any]]:
        """See LayerStage."""
        return contents_of(self.plan.units[unit], results)


class GivenLayer:
    """The values of a layer for its solver (`engine.Given`). Every value is read on demand."""

    def __init__(self, plan: Plan, work: WorkDirectory, layer: Layer) -> None:
        self._plan, self._work, self._layer = plan, work, layer
        planned = plan.of(layer)
        self.dtype = planned.dtype
        self.threshold = planned.threshold
        self.ridge = plan.config.compression.ridge

    @property
    def weight(self) -> torch.Tensor:
        return weight_of(self._plan, self._layer)

    @property
    def bias(self) -> torch.Tensor | None:
        bias = self._layer.bias(self._plan.source)
        return None if bias is None else bias.to(self._plan.device)

    @property
    def statistics(self) -> Statistics:
        statistics, _ = read_statistics(self._plan, self._work, self._layer)
        assert statistics is not None
        return statistics

    @property
    def survey(self) -> Survey:
        return read_survey(self._plan, self._work, self._layer)

    @property
    def inputs(self) -> torch.Tensor:
        sequences = self._plan.sequences[CALIBRATION]
        return read_inputs(self._plan.network, sequences, self._layer, self._work.root)


def request_of(plan: Plan, layer: Layer, choice: Choice) -> Request:
    """Returns what is asked of a layer to which the budget grants `choice`."""
    planned = plan.of(layer)
    return Request(
        choice=choice,
        rank_multiple=planned.rank_multiple,
        dtype=planned.dtype,
        max_layer_error=planned.max_layer_error,
        bias=layer.bias(plan.source),
    )


def fit_plainly(
    plan: Plan, work: WorkDirectory, granted: Mapping[str, Choice], layer: Layer
) -> Fitted:
    """Fits the layer to its inputs in the dense network and returns the outcome."""
    reason = dense_reason(work, layer)
    if reason is not None:
        return left_dense(reason, fallback=True)
    return _noting_few_tokens(work, layer, _fit(plan, work, layer, granted[layer.name]))


def _fit(plan: Plan, work: WorkDirectory, layer: Layer, choice: Choice) -> Fitted:
    if choice.is_dense:
        return granted_dense()
    try:
        problems = problems_of(plan.of(layer).solver, GivenLayer(plan, work, layer))
    except SolveError as error:
        return left_dense(f"could not be solved: {error}", fallback=True)
    return fit_best(problems, request_of(plan, layer, choice))


def _noting_few_tokens(work: WorkDirectory, layer: Layer, fitted: Fitted) -> Fitted:
    """Notes in the facts where a layer, such as an expert, had fewer tokens than inputs.

    The factors are finite, because no inverse is taken. Directions that no token has are not kept.
    """
    tokens = work.facts(STATISTICS, layer.unit)["layers"][layer.name]["tokens"]
    # A layer without tokens was fitted to its weight alone.
    if fitted.packed is None or not 0 < tokens < layer.shape[1]:
        return fitted
    few = f"fitted to {tokens} tokens, fewer than its {layer.shape[1]} inputs"
    reason = "; ".join(filter(None, (fitted.facts.reason, few)))
    return replace(fitted, facts=replace(fitted.facts, reason=reason))
