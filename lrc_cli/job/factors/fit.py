"""One layer: from a granted rank to packed factors and to the errors that the report prints.

All errors are recomputed from the stored, rounded tensors (docs/theory.md, C1).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from lrc_cli.engine import (
    DENSE,
    Approximation,
    Errors,
    Packed,
    SolveError,
    Stored,
    dense,
    pack_best,
)
from lrc_cli.network.layer import Layer
from lrc_cli.report.record import DENSE as DENSE_STORAGE
from lrc_cli.report.record import LayerErrors, LayerFacts, MetricErrors, OutputErrors

RESOLUTION = 2.0**-24
"""Of squared errors, relative to the total: Gram matrices are kept in float32. What is measured
below it, exact zeros included, reads "below the numerical floor" in reports."""


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A layer's outcome: packed factors, or None for a layer that stays dense."""

    packed: Packed | None
    bias: torch.Tensor | None = None
    """The new bias (m,), stored dtype; None where the old one stays."""
    facts: LayerFacts
    """For the report; see `fit_layer`."""

    def on_host(self) -> "Fitted":
        """The same in CPU memory, to be handed to another process."""
        bias = None if self.bias is None else self.bias.cpu()
        packed = None if self.packed is None else self.packed.on_host()
        return replace(self, packed=packed, bias=bias)

    def tensors(self, layer: Layer) -> dict[str, torch.Tensor]:
        """What is written for the layer, by disk names; empty where it stays dense."""
        if self.packed is None:
            return {}
        keys = layer.keys
        written = {
            keys.weight: layer.layout.inner(self.packed.weight),
            keys.up: layer.layout.outer(self.packed.up),
            keys.perm: self.packed.perm,
            keys.bias: self.bias,
        }
        return {name: tensor for name, tensor in written.items() if tensor is not None}


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked of one layer."""

    rank: int
    """The granted rank; DENSE leaves the layer as it is."""
    rank_multiple: int
    storage: str
    dtype: torch.dtype
    """Of the stored factors."""
    max_layer_error: float | None = None
    """A bound on the plain relative output error that the stored factors must meet."""
    bias: torch.Tensor | None = None
    """The layer's bias (m,); None where it has none."""


def left_dense(reason: str, *, fallback: bool) -> Fitted:
    """The outcome of a layer that is not factorised.

    Args:
        fallback: True where the layer was meant to be factorised and could not be.
    """
    facts = LayerFacts(storage=DENSE_STORAGE, reason=reason, fallback=fallback)
    return Fitted(packed=None, facts=facts)


def granted_dense() -> Fitted:
    """The outcome of a layer to which the budget grants all its bytes."""
    return left_dense("dense pays better at this size", fallback=False)


def fit_layer(problem: Approximation, request: Request) -> Fitted:
    """Factorise, round and pack one layer, and measure it.

    Returns:
        The packed factors with facts: `errors.metric` in the problem's unit and `errors.output`
        relative (||W X - Z X~||_F / ||W X||_F), each for the stored factors, for the optimum of
        that rank (None where none can be proved) and for plain SVD of that rank.
    """
    if request.rank == DENSE:
        return granted_dense()
    try:
        problem, stored = _pack(problem, request)
    except SolveError as error:
        return left_dense(f"could not be solved: {error}", fallback=True)
    if stored is None:
        return left_dense("no smaller form meets max_layer_error", fallback=False)
    packed, (errors, bias) = stored.packed, _measured(problem, stored, request)
    facts = LayerFacts(
        storage=packed.storage,
        rank=packed.rank,
        block=packed.block,
        reason=stored.reason,
        fallback=False,
        max_coefficient=packed.up.abs().max().item() if packed.perm is not None else None,
        errors=_errors(problem, packed, errors),
        **problem.facts,
    )
    return Fitted(packed=packed, bias=bias, facts=facts)


def _pack(problem: Approximation, request: Request) -> tuple[Approximation, Stored | None]:
    """The form with the lowest stored error; the rank is raised until max_layer_error holds.

    Returns:
        The problem of the final rank, and the form (None: none is smaller than dense).
    """
    m, n = problem.weight.shape
    rank, relative = request.rank, request.max_layer_error
    allowed = None if relative is None else relative**2 * problem.energy
    largest = min(m - 1, n)
    gains_bias = request.bias is None and problem.shift(problem.weight) is not None
    available = (m * n - (m if gains_bias else 0)) * request.dtype.itemsize
    if allowed is not None:
        problem.solve(largest)  # the rank may have to rise: one solution holds them all
    while rank <= largest:
        problem = problem.at(rank)
        stored = pack_best(
            problem,
            rank,
            request.dtype,
            storage=request.storage,
            rank_multiple=request.rank_multiple,
        )
        if stored.packed.num_bytes >= available:
            return problem, None
        if allowed is None or _measured(problem, stored, request)[0].output <= allowed:
            return problem, stored
        rank += request.rank_multiple
    return problem, None


def _measured(
    problem: Approximation, stored: Stored, request: Request
) -> tuple[Errors, torch.Tensor | None]:
    """The errors of what is written, the rounding of a new bias included, and that bias."""
    errors = stored.errors
    if problem.shift(problem.weight) is None:
        return errors, None
    shift = problem.shift(dense(stored.packed))
    assert shift is not None
    exact = shift if request.bias is None else request.bias.to(shift) + shift
    bias = exact.to(request.dtype)
    return problem.offset(errors, bias.to(exact) - exact), bias


def _errors(problem: Approximation, packed: Packed, stored: Errors) -> LayerErrors:
    rank, energy = packed.rank, problem.energy
    svd = problem.svd_errors(rank)
    metric = MetricErrors(
        unit=problem.unit,
        stored=stored.metric,
        optimum=problem.optimum(rank),
        svd=svd.metric,
        total=problem.total,
        floor=RESOLUTION * problem.total,
    )
    output = OutputErrors(
        inputs=problem.inputs,
        stored=_relative(stored.output, energy),
        optimum=_relative(problem.output_optimum(rank), energy),
        svd=_relative(svd.output, energy),
        floor=math.sqrt(RESOLUTION),
    )
    return LayerErrors(metric=metric, output=output)


def _relative(error: float, energy: float) -> float:
    return math.sqrt(error / energy) if energy > 0 else 0.0


def fit_best(problems: Sequence[Approximation], request: Request) -> Fitted:
    """The best outcome, as stored, of problems with one judge; the first of equals."""
    outcomes = [fit_layer(problem, request) for problem in problems]
    factorised = [fitted for fitted in outcomes if fitted.packed is not None]
    return min(factorised or outcomes[:1], key=_stored_error)


def _stored_error(fitted: Fitted) -> float:
    """The error in the problem's unit; zero where the layer stays dense."""
    errors = fitted.facts.errors
    return 0.0 if errors is None else errors.metric.stored
