"""One layer: from a granted rank to packed factors and to the errors that the report prints.

All errors are recomputed from the stored, rounded tensors (C1 of method.md section 7).
"""

import math
from dataclasses import dataclass
from typing import Any

import torch

from lrc_cli.engine import (
    DENSE,
    FROBENIUS,
    SVD,
    Metric,
    Packed,
    SolveError,
    Solver,
    Statistics,
    dense,
    pack_best,
    tails,
)

RESOLUTION = 2.0**-24
"""Of squared errors, relative to the total: Gram matrices are kept in float32. What is measured
below it, exact zeros included, reads "below the numerical floor" in reports."""


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A layer's outcome: packed factors, or None for a layer that stays dense."""

    packed: Packed | None
    facts: dict[str, Any]
    """For the report; see `fit_layer`."""

    def tensors(self, key: str) -> dict[str, torch.Tensor]:
        """What is written for the layer of this disk name; empty where it stays dense."""
        if self.packed is None:
            return {}
        written = {f"{key}.weight": self.packed.weight, f"{key}.up.weight": self.packed.up}
        return written if self.packed.perm is None else {**written, f"{key}.perm": self.packed.perm}


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


def left_dense(reason: str, *, fallback: bool) -> Fitted:
    """The outcome of a layer that is not factorised.

    Args:
        fallback: True where the layer was meant to be factorised and could not be.
    """
    return Fitted(packed=None, facts={"storage": "dense", "reason": reason, "fallback": fallback})


def fit_layer(
    weight: torch.Tensor,
    solver: Solver,
    statistics: Statistics,
    spectrum: torch.Tensor,
    request: Request,
) -> Fitted:
    """Factorise, round and pack one layer, and measure it.

    Args:
        weight: (m, n), any floating dtype.
        spectrum: the solver's, (k,) float64.

    Returns:
        The packed factors with facts: `errors.metric` in the solver's unit and `errors.output`
        relative (||(W - Z) X||_F / ||W X||_F), each for the stored factors, for the optimum of that
        rank and for plain SVD of that rank.
    """
    if request.rank == DENSE:
        return left_dense("dense pays better at this size", fallback=False)
    target = weight.double()
    try:
        packed, reason = _pack(target, solver, statistics, spectrum, request)
    except SolveError as error:
        return left_dense(f"could not be solved: {error}", fallback=True)
    if packed is None:
        return left_dense("no smaller form meets max_layer_error", fallback=False)
    facts = {
        "storage": packed.storage,
        "rank": packed.rank,
        "block": packed.block,
        "reason": reason,
        "fallback": False,
        "max_coefficient": packed.up.abs().max().item() if packed.perm is not None else None,
        "errors": _errors(target, packed, solver, statistics, spectrum),
    }
    return Fitted(packed=packed, facts=facts)


def _pack(
    target: torch.Tensor,
    solver: Solver,
    statistics: Statistics,
    spectrum: torch.Tensor,
    request: Request,
) -> tuple[Packed | None, str]:
    """The form with the lowest stored error; the rank is raised until max_layer_error holds."""
    m, n = target.shape
    metric, rank = solver.metric(statistics), request.rank
    allowed = _allowed_error(target, statistics, request.max_layer_error)
    largest = min(m - 1, n)
    # The rank may have to rise; solutions are nested, so one of the largest rank holds them all.
    factors = solver.factorize(target, statistics, rank if allowed is None else largest)
    while rank <= largest:
        stored = pack_best(
            factors.truncated(rank),
            target,
            metric,
            request.dtype,
            storage=request.storage,
            rank=rank,
            rank_multiple=request.rank_multiple,
            spectrum=spectrum,
        )
        if stored.packed.num_bytes >= m * n * request.dtype.itemsize:
            return None, ""
        if allowed is None or metric.errors(target - dense(stored.packed))[1] <= allowed:
            return stored.packed, stored.reason
        rank += request.rank_multiple
    return None, ""


def _allowed_error(
    target: torch.Tensor, statistics: Statistics, relative: float | None
) -> float | None:
    """The plain output error that a relative one allows; None: any."""
    if relative is None:
        return None
    return relative**2 * Metric(gram=statistics.gram).error(target)


def _errors(
    target: torch.Tensor,
    packed: Packed,
    solver: Solver,
    statistics: Statistics,
    spectrum: torch.Tensor,
) -> dict[str, Any]:
    rank, metric = packed.rank, solver.metric(statistics)
    plain = SVD.factorize(target, Statistics(), rank).dense()
    stored, stored_output = metric.errors(target - dense(packed))
    svd, svd_output = metric.errors(target - plain)
    # Without a Gram matrix (svd needs no data) the inputs count as white.
    best = FROBENIUS if statistics.gram is not None else SVD
    optimum = best.spectrum(target, statistics)
    energy = optimum.sum().item()
    return {
        "metric": {
            "unit": solver.unit,
            "stored": stored,
            "optimum": _tail(spectrum, rank),
            "svd": svd,
            "total": spectrum.sum().item(),
            "floor": RESOLUTION * spectrum.sum().item(),
        },
        "output": {
            "inputs": "calibration" if statistics.gram is not None else "white",
            "stored": _relative(stored_output, energy),
            "optimum": _relative(_tail(optimum, rank), energy),
            "svd": _relative(svd_output, energy),
            "floor": math.sqrt(RESOLUTION),
        },
    }


def _tail(spectrum: torch.Tensor, rank: int) -> float:
    return tails(spectrum)[min(rank, len(spectrum))].item()


def _relative(error: float, energy: float) -> float:
    return math.sqrt(error / energy) if energy > 0 else 0.0
