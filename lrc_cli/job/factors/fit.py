"""One layer goes from a granted choice to packed factors and to the errors of the report.

All errors are recomputed from the stored, rounded tensors (docs/theory.md, C1).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from lrc_cli.engine import (
    STORAGES,
    Approximation,
    Choice,
    Errors,
    SolveError,
    Stored,
    rounded_bias,
)
from lrc_cli.errors import InputError, RunError
from lrc_cli.forms import DENSE, FORMS, WEIGHT, Packed, dense
from lrc_cli.job.work import Tensors, WorkDirectory
from lrc_cli.network.layer import Layer
from lrc_cli.report.record import LayerErrors, LayerFacts, MetricErrors, OutputErrors

RESOLUTION = 2.0**-24
"""The smallest squared error, relative to the total, that can be measured.

Gram matrices are kept in float32. Smaller errors, exact zeros included, read "below the numerical
floor" in reports.
"""


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """The outcome of a layer."""

    packed: Packed | None
    """The packed factors; None for a layer that stays dense."""
    bias: torch.Tensor | None = None
    """The new bias (m,), stored dtype; None where the bias does not change."""
    facts: LayerFacts
    """The facts for the report; see `fit_layer`."""

    def on_host(self) -> "Fitted":
        """Returns the same outcome in CPU memory, for another process."""
        bias = None if self.bias is None else self.bias.cpu()
        packed = None if self.packed is None else self.packed.on_host()
        return replace(self, packed=packed, bias=bias)

    def tensors(self, layer: Layer) -> dict[str, torch.Tensor]:
        """Returns the tensors that are written, by disk name; none where the layer stays dense."""
        if self.packed is None:
            return {}
        form, keys = FORMS[self.packed.form], layer.keys
        tensors = form.on_disk(self.packed, layer.layout)
        _check_others_fail(form.name, layer, tensors)
        written = {keys.key(name): tensor for name, tensor in tensors.items()}
        return written if self.bias is None else {**written, keys.bias: self.bias}


def _check_others_fail(form: str, layer: Layer, tensors: Mapping[str, torch.Tensor]) -> None:
    """Checks that a loader which knows nothing of lrc fails on the shape under the dense key.

    Raises:
        RunError: the form has no tensor under that key, or a tensor of the dense shape.
    """
    dense = layer.layout.weight(torch.empty(layer.shape, device="meta")).shape
    weight = tensors.get(WEIGHT)
    if weight is None or weight.shape == dense:
        what = "nothing" if weight is None else f"a tensor of the dense shape {tuple(dense)}"
        raise RunError(
            f"{layer.name}: storage {form} writes {what} under {layer.keys.weight}, which other"
            " loaders would take for the dense weight",
            "set another compression.storage for the layer",
        )


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked of one layer."""

    choice: Choice
    """The choice that the budget grants."""
    rank_multiple: int = 1
    """The step by which the rank rises where it has to."""
    dtype: torch.dtype
    """The dtype of the stored factors."""
    max_layer_error: float | None = None
    """A bound on the plain relative output error that the stored factors must meet."""
    bias: torch.Tensor | None = None
    """The bias (m,); None for a layer without a bias."""


def left_dense(reason: str, *, fallback: bool) -> Fitted:
    """Returns the outcome of a layer that is not factorised.

    Args:
        fallback: whether the layer was meant to be factorised and could not be.
    """
    facts = LayerFacts(storage=DENSE, reason=reason, fallback=fallback)
    return Fitted(packed=None, facts=facts)


def granted_dense() -> Fitted:
    """Returns the outcome of a layer to which the budget grants all its bytes."""
    return left_dense("dense pays better at this size", fallback=False)


def fit_layer(problem: Approximation, request: Request) -> Fitted:
    """Factorises, rounds, packs and measures one layer.

    Returns:
        The packed factors with facts. `errors.metric` is in the problem's unit. `errors.output` is
        relative (||W X - Z X~||_F / ||W X||_F). Each has the error of the stored tensors, of the
        optimum of the same rank (None where no optimum can be proved) and of plain SVD of the same
        rank. A form without a rank has the first error only.
    """
    if request.choice.is_dense:
        return granted_dense()
    try:
        problem, stored = _pack(problem, request)
    except SolveError as error:
        return left_dense(f"could not be solved: {error}", fallback=True)
    if stored is None:
        return left_dense("no smaller form meets max_layer_error", fallback=False)
    packed, (errors, bias) = stored.packed, _measured(problem, stored, request)
    facts = LayerFacts(
        storage=packed.form,
        rank=packed.rank,
        block=packed.parameters.get("block"),
        parameters=packed.parameters if packed.rank is None else None,
        reason=stored.reason,
        fallback=False,
        max_coefficient=FORMS[packed.form].largest_coefficient(packed),
        errors=errors_of(problem, packed, errors),
        **problem.facts,
    )
    return Fitted(packed=packed, bias=bias, facts=facts)


def _pack(problem: Approximation, request: Request) -> tuple[Approximation, Stored | None]:
    """Packs the layer as granted, and raises the rank until max_layer_error holds.

    Returns:
        The problem at the final rank, and the packed layer. The layer is None where no form that is
        smaller than dense meets what is asked.
    """
    m, n = problem.weight.shape
    choice, relative = request.choice, request.max_layer_error
    allowed = None if relative is None else relative**2 * problem.energy
    largest = min(m - 1, n)
    gains_bias = request.bias is None and problem.shift(problem.weight) is not None
    available = (m * n - (m if gains_bias else 0)) * request.dtype.itemsize
    if allowed is not None and choice.rank is not None:
        problem.solve(largest)  # the rank may have to rise: one solution holds all lower ranks
    while choice.rank is None or choice.rank <= largest:
        problem = problem if choice.rank is None else problem.at(choice.rank)
        stored = STORAGES[choice.form].pack(
            problem, choice, request.dtype, rank_multiple=request.rank_multiple
        )
        if stored.packed.num_bytes >= available:
            return problem, None
        if allowed is None or _measured(problem, stored, request)[0].output <= allowed:
            return problem, stored
        if choice.rank is None:
            return problem, None
        choice = choice._replace(rank=choice.rank + request.rank_multiple)
    return problem, None


def _measured(
    problem: Approximation, stored: Stored, request: Request
) -> tuple[Errors, torch.Tensor | None]:
    """Returns the errors of what is written, with the rounding of a new bias, and the bias."""
    errors = stored.errors
    if problem.shift(problem.weight) is None:
        return errors, None
    shift = problem.shift(dense(stored.packed))
    assert shift is not None
    bias, off = rounded_bias(request.bias, shift, request.dtype)
    return problem.offset(errors, off), bias


def errors_of(problem: Approximation, packed: Packed, stored: Errors) -> LayerErrors:
    """Returns what the report says of a layer's errors, beside the errors of other matrices."""
    rank, energy = packed.rank, problem.energy
    svd = None if rank is None else problem.svd_errors(rank)
    output_optimum = None if rank is None else problem.output_optimum(rank)
    metric = MetricErrors(
        unit=problem.unit,
        stored=stored.metric,
        optimum=None if rank is None else problem.optimum(rank),
        svd=None if svd is None else svd.metric,
        total=problem.total,
        floor=RESOLUTION * problem.total,
    )
    output = OutputErrors(
        inputs=problem.inputs,
        stored=_relative(stored.output, energy),
        optimum=None if output_optimum is None else _relative(output_optimum, energy),
        svd=None if svd is None else _relative(svd.output, energy),
        floor=math.sqrt(RESOLUTION),
    )
    return LayerErrors(metric=metric, output=output)


def _relative(error: float, energy: float) -> float:
    return math.sqrt(error / energy) if energy > 0 else 0.0


def fit_best(problems: Sequence[Approximation], request: Request) -> Fitted:
    """Returns the outcome with the lowest stored error, the first among equals.

    Args:
        problems: problems whose errors are in one unit.
    """
    outcomes = [fit_layer(problem, request) for problem in problems]
    factorised = [fitted for fitted in outcomes if fitted.packed is not None]
    return min(factorised or outcomes[:1], key=_stored_error)


def _stored_error(fitted: Fitted) -> float:
    """Returns the error in the problem's unit; zero where the layer stays dense."""
    errors = fitted.facts.errors
    return 0.0 if errors is None else errors.metric.stored


def contents_of(
    layers: Sequence[Layer], fitted: Mapping[str, Fitted]
) -> tuple[Tensors, dict[str, Any]]:
    """Returns what is written of a unit: its layers' factors by disk name, and their facts."""
    tensors: Tensors = {}
    for layer in layers:
        tensors |= fitted[layer.name].tensors(layer)
    return tensors, {layer.name: fitted[layer.name].facts.to_json() for layer in layers}


def read_facts(work: WorkDirectory, stage: str, unit: str) -> dict[str, LayerFacts]:
    """Returns the facts of a stored unit's layers, by name.

    Raises:
        DamagedUnit: the file does not hold what was stored, or the facts are not facts of layers.
    """
    stored = work.facts(stage, unit)
    try:
        return {name: LayerFacts.from_json(x, "facts", name) for name, x in stored.items()}
    except InputError as error:
        raise work.damaged(stage, unit, error.message) from error
