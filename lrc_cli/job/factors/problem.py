"""One layer's solve, from plan and work directory: its weight, problem, request and cost."""

from collections.abc import Mapping
from dataclasses import replace

from lrc_cli.data.purposes import CALIBRATION
from lrc_cli.engine import (
    DENSE,
    NUCLEAR,
    RELU,
    Approximation,
    Rectified,
    SameInput,
    Shrunk,
    SolveError,
)
from lrc_cli.job.factors.fit import Fitted, Request, fit_layer, fit_rectified, left_dense
from lrc_cli.job.factors.relu_inputs import read_inputs
from lrc_cli.job.plan import Plan
from lrc_cli.job.spectra.solve import weight_of
from lrc_cli.job.spectra.survey import dense_reason, read_survey
from lrc_cli.job.statistics.collect import read_statistics
from lrc_cli.job.work import STATISTICS, WorkDirectory
from lrc_cli.network.layer import Layer


def problem_of(plan: Plan, work: WorkDirectory, layer: Layer) -> Approximation:
    """The layer's approximation problem on the inputs that it has in the dense network."""
    statistics, _ = read_statistics(plan, work, layer)
    assert statistics is not None
    weight, planned = weight_of(plan, layer), plan.of(layer)
    solver = planned.solver
    if solver is NUCLEAR:
        return Shrunk(weight, statistics, share=planned.threshold)
    return SameInput(weight, statistics, solver, read_survey(plan, work, layer))


def _rectified(plan: Plan, work: WorkDirectory, layer: Layer) -> Rectified:
    """The problem behind the ReLU that follows the layer."""
    statistics, _ = read_statistics(plan, work, layer)
    assert statistics is not None
    bias = layer.bias(plan.source)
    return Rectified(
        weight_of(plan, layer),
        None if bias is None else bias.to(plan.device),
        statistics,
        read_inputs(plan.network, plan.sequences[CALIBRATION], layer, work.root),
        read_survey(plan, work, layer),
        dtype=plan.of(layer).dtype,
        ridge=plan.config.compression.ridge,
    )


def request_of(plan: Plan, layer: Layer, rank: int) -> Request:
    """What is asked of the layer at its granted rank."""
    planned = plan.of(layer)
    return Request(
        rank=rank,
        rank_multiple=planned.rank_multiple,
        storage=planned.storage,
        dtype=planned.dtype,
        max_layer_error=planned.max_layer_error,
        bias=layer.bias(plan.source),
    )


def fit(plan: Plan, work: WorkDirectory, ranks: Mapping[str, int], layer: Layer) -> Fitted:
    """The layer's outcome on the inputs that it has in the dense network."""
    reason = dense_reason(work, layer)
    if reason is not None:
        return left_dense(reason, fallback=True)
    return _noting_few_tokens(work, layer, _fit(plan, work, layer, ranks[layer.name]))


def _fit(plan: Plan, work: WorkDirectory, layer: Layer, rank: int) -> Fitted:
    request = request_of(plan, layer, rank)
    if plan.of(layer).solver is RELU and request.rank != DENSE:
        try:
            problem = _rectified(plan, work, layer)
        except SolveError as error:
            return left_dense(f"could not be solved: {error}", fallback=True)
        return fit_rectified(problem, request)
    return fit_layer(problem_of(plan, work, layer), request)


def _noting_few_tokens(work: WorkDirectory, layer: Layer, fitted: Fitted) -> Fitted:
    """Say so where an expert was fitted to fewer tokens than it has inputs.

    No inverse is taken, so the factors are finite; directions that no token excited are not kept.
    """
    tokens = work.facts(STATISTICS, layer.unit)["layers"][layer.name]["tokens"]
    # Without any it was fitted to its weight alone.
    if fitted.packed is None or not 0 < tokens < layer.shape[1]:
        return fitted
    few = f"fitted to {tokens} tokens, fewer than its {layer.shape[1]} inputs"
    reason = "; ".join(filter(None, (fitted.facts["reason"], few)))
    return replace(fitted, facts=fitted.facts | {"reason": reason})
