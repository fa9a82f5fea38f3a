"""`lrc plan` says here what more calibration data would bring, from layers on other data.

Factors err more on data that they were not fitted to. In docs/theory.md the share by which they do
falls like 1 / rows, so what twice the data would bring follows from the two errors.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from lrc_cli.data.draw import Sequences, draw
from lrc_cli.data.padding import Masks, masks_of, unpadded
from lrc_cli.data.processors import open_processors
from lrc_cli.data.purposes import RECOVER, purposes_of
from lrc_cli.engine import Choice, SolveError, problems_of
from lrc_cli.execution.hooks import hooked
from lrc_cli.job.factors.plain import GivenLayer
from lrc_cli.job.plan import Plan
from lrc_cli.job.spectra.survey import dense_reason
from lrc_cli.job.work import WorkDirectory
from lrc_cli.network.layer import Layer

OTHER = "other data"
"""The purpose of the sequences that nothing is fitted to; a config cannot have this name twice."""
NUM_SEQUENCES = 8
"""The sequences that layers are judged on."""
NUM_LAYERS = 8
"""The layers that are judged, evenly spread over all."""


@dataclass
class _Judged:
    """One layer with the factors of its rank, and its errors on other data."""

    layer: Layer
    difference: torch.Tensor
    """W - Z (m, n) float32."""
    weight: torch.Tensor
    """W (m, n) float32."""
    fisher: torch.Tensor | None
    """(m, m) float32: the metric of the outputs; None for the plain one."""
    mean: torch.Tensor | None
    """The mean input (n,) float32, where the bias makes up for it."""
    fitted: float
    """The metric error on the calibration data."""
    whole: float
    """The metric error of Z = 0 on the calibration data."""
    error: float = 0.0
    """The metric error on other data, summed over rows and not scaled."""
    energy: float = 0.0
    """The error of Z = 0 on other data, in the same unit."""

    def add(self, rows: torch.Tensor) -> None:
        """Adds rows (T, n) of other data."""
        x = rows.float() if self.mean is None else rows.float() - self.mean
        self.error += self._form(x @ self.difference.T)
        self.energy += self._form(x @ self.weight.T)

    def _form(self, outputs: torch.Tensor) -> float:
        weighted = outputs if self.fisher is None else outputs @ self.fisher
        return torch.sum(weighted * outputs, dtype=torch.float64).item()

    @property
    def unseen(self) -> float:
        """The metric error that other data of the calibration data's energy would show."""
        return self.whole * self.error / self.energy if self.energy > 0 else self.fitted


def judge_on_other_data(
    plan: Plan, work: WorkDirectory, granted: Mapping[str, Choice]
) -> dict[str, Any]:
    """Returns what layers lose on sequences that nothing is fitted to, and what more data brings.

    Args:
        work: has the statistics and spectra of all layers.
        granted: the choices of one size.

    Returns:
        `left`, the number of sequences that the data has left; where there are some, `others`, the
        number that layers were judged on, and `unseen`, by what share their error is larger there,
        and `twice`, the share of the error on other data that twice as many sequences would take.
    """
    other = _other_sequences(plan)
    if other is None:
        return {"left": 0}
    found: dict[str, Any] = {"left": other.population * (other.one_in or 1)}
    judged = _layers(plan, work, granted)
    if not judged:
        return found
    _run(plan, other, judged)
    fitted, unseen = (sum(x.fitted for x in judged), sum(x.unseen for x in judged))
    if not fitted > 0:
        return found
    gap = max(unseen / fitted - 1, 0.0)
    # Errors on fitted and on other data lie as far below and above what endless data would give.
    share = gap / (2 + gap)
    return {**found, "others": len(other), "unseen": gap, "twice": share / 2 / (1 + share)}


def _other_sequences(plan: Plan) -> Sequences | None:
    """Returns sequences of the calibration data that no purpose takes; None: none is left."""
    config = plan.config
    purposes = [purpose for purpose in purposes_of(config) if purpose.name != RECOVER]
    other = replace(purposes[0], name=OTHER, num_sequences=NUM_SEQUENCES, required=False)
    processors = open_processors(
        plan.source, plan.network.module, trust_remote_code=config.model.trust_remote_code
    )
    drawn = draw([*purposes, other], processors=processors, seed=config.calibration.seed)
    return drawn.get(OTHER)


def _layers(plan: Plan, work: WorkDirectory, granted: Mapping[str, Choice]) -> list[_Judged]:
    able = [
        layer
        for layer in plan.layers
        if granted[layer.name].rank and "gram" in plan.of(layer).solver.needs
        if dense_reason(work, layer) is None and not layer.tied_to
    ]
    number = min(NUM_LAYERS, len(able))
    chosen = [able[i * len(able) // number] for i in range(number)]
    return [found for layer in chosen if (found := _judged(plan, work, granted, layer))]


def _judged(
    plan: Plan, work: WorkDirectory, granted: Mapping[str, Choice], layer: Layer
) -> _Judged | None:
    rank = granted[layer.name].rank
    assert rank is not None
    given = GivenLayer(plan, work, layer)
    try:
        problem = problems_of(plan.of(layer).solver, given)[0].at(rank)
        matrix = problem.solve(rank).factors.dense()
    except SolveError:
        return None
    fisher, mean = problem.metric.fisher, given.statistics.mean
    return _Judged(
        layer=layer,
        difference=(problem.weight - matrix).float(),
        weight=problem.weight.float(),
        fisher=None if fisher is None else fisher.float(),
        mean=None if mean is None else mean.float(),
        fitted=problem.metric.error(problem.weight - matrix),
        whole=problem.metric.error(problem.weight),
    )


@torch.no_grad()
def _run(plan: Plan, other: Sequences, judged: list[_Judged]) -> None:
    by_name = {x.layer.name: x for x in judged}
    masks: Masks = ()

    def take(layer: Layer, x: torch.Tensor, _: torch.Tensor) -> None:
        by_name[layer.name].add(unpadded(x, masks).reshape(-1, x.shape[-1]))

    with hooked(plan.network, [x.layer for x in judged], take):
        for batch in other.batches(1):
            masks = masks_of(batch)
            plan.network(batch)
