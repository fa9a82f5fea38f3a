"""Phase one surveys every layer: what is known of it at every rank, which is then stored."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from lrc_cli.engine import Errors, Predicted, References, SolveError, Survey, survey
from lrc_cli.job.plan import Plan
from lrc_cli.job.spectra.measured import read_measured
from lrc_cli.job.spectra.solve import weight_of
from lrc_cli.job.stage import LayerStage
from lrc_cli.job.statistics.collect import read_statistics
from lrc_cli.job.work import SPECTRA, Tensors, WorkDirectory
from lrc_cli.network.layer import Layer

SPECTRUM, OUTPUT_CURVE, VECTORS, ZERO = "spectrum", "output_curve", "vectors", "zero"


class SpectraStage(LayerStage[tuple[Tensors, str]]):
    """The stage that finds what is known of every layer at every rank.

    The result of a layer is the tensors of its survey, or the reason why the layer stays dense.
    """

    name = "spectra"

    def __init__(self, plan: Plan, work: WorkDirectory) -> None:
        super().__init__(plan, work, SPECTRA)

    def solve(self, layer: Layer) -> tuple[Tensors, str]:
        """See LayerStage."""
        return _survey(self.plan, self.work, layer)

    def contents(
        self, unit: str, results: Mapping[str, tuple[Tensors, str]]
    ) -> tuple[Tensors, dict[str, Any]]:
        """See LayerStage."""
        tensors = {key: tensor for found, _ in results.values() for key, tensor in found.items()}
        return tensors, {"dense": {name: reason for name, (_, reason) in results.items() if reason}}


def _survey(plan: Plan, work: WorkDirectory, layer: Layer) -> tuple[Tensors, str]:
    """Returns the tensors of a layer's survey, or the reason why the layer must stay dense."""
    statistics, reason = read_statistics(plan, work, layer)
    if statistics is None:
        return {}, reason
    try:
        found = survey(plan.of(layer).solver, weight_of(plan, layer), statistics)
    except SolveError as error:
        return {}, f"could not be solved: {error}"
    tensors = {SPECTRUM: found.spectrum, OUTPUT_CURVE: found.output_curve}
    if found.vectors is not None:
        tensors[VECTORS] = found.vectors.float()
    if found.references is not None:
        tensors |= found.references._asdict()
    if found.zero is not None:
        tensors[ZERO] = torch.tensor(found.zero, dtype=torch.float64)
    # Some solvers give one tensor twice, and safetensors stores no tensors that share memory.
    return {
        f"{kind}.{layer.name}": tensor.cpu().contiguous()
        if kind == VECTORS
        else tensor.cpu().clone()
        for kind, tensor in tensors.items()
    }, ""


def read_survey(plan: Plan, work: WorkDirectory, layer: Layer) -> Survey:
    """Returns a layer's survey on the run's device. The vectors are in float32."""
    kinds = (SPECTRUM, OUTPUT_CURVE, VECTORS, ZERO, *References._fields)
    stored, _ = work.get(SPECTRA, layer.unit, [f"{kind}.{layer.name}" for kind in kinds])

    def read(kind: str) -> torch.Tensor | None:
        tensor = stored.get(f"{kind}.{layer.name}")
        return None if tensor is None else tensor.to(plan.device)

    spectrum, curve = read(SPECTRUM), read(OUTPUT_CURVE)
    assert spectrum is not None and curve is not None
    compared = {kind: tensor for kind in References._fields if (tensor := read(kind)) is not None}
    zero = read(ZERO)
    return Survey(
        spectrum=spectrum,
        output_curve=curve,
        vectors=read(VECTORS),
        references=References(**compared) if compared else None,
        zero=None if zero is None else Errors(*zero.tolist()),
    )


def dense_reason(work: WorkDirectory, layer: Layer) -> str | None:
    """Returns why phase one leaves the layer dense; None where it does not."""
    reasons: dict[str, str] = work.facts(SPECTRA, layer.unit)["dense"]
    return reasons.get(layer.name)


def dense_reasons(plan: Plan, work: WorkDirectory) -> dict[str, str]:
    """Returns why phase one leaves layers dense, by layer name."""
    reasons: dict[str, str] = {}
    for unit in plan.units:
        reasons |= work.facts(SPECTRA, unit)["dense"]
    return reasons


def read_predicted(plan: Plan, work: WorkDirectory) -> dict[str, Predicted]:
    """Returns the errors that the target bounds, by layer name."""
    found: dict[str, Predicted] = {}
    for unit in plan.units:
        found |= unit_predicted(plan, work, unit)
    return found


def unit_predicted(plan: Plan, work: WorkDirectory, unit: str) -> dict[str, Predicted]:
    """Returns the errors that the target bounds for the layers of one unit, by name."""
    kind = SPECTRUM if plan.config.compression.max_layer_error is None else OUTPUT_CURVE
    stored, _ = work.get(SPECTRA, unit, [f"{kind}.{layer.name}" for layer in plan.units[unit]])
    spectra = {name.removeprefix(f"{kind}."): tensor for name, tensor in stored.items()}
    measured = read_measured(plan, work, unit)
    return {
        name: Predicted(spectrum=spectrum, measured=measured.get(name))
        for name, spectrum in spectra.items()
    }


def vectors_bytes(plan: Plan, units: Iterable[str]) -> int:
    """Returns the bytes of the units' surveys on disk, without a few numbers for each rank."""
    layers = [
        layer
        for unit in units
        for layer in plan.units[unit]
        if plan.of(layer).solver.spanned is not None
    ]
    return sum(min(layer.shape) ** 2 * torch.float32.itemsize for layer in layers)
