"""Plain truncated SVD: knows no data; the baseline every other solver is compared with."""

import torch
from torch import Tensor

from lrc_cli.engine.linalg import LinAlgError, balanced
from lrc_cli.engine.problem import Factors, Metric, SolveError, Solver, Statistics


def _metric(statistics: Statistics) -> Metric:
    return Metric()


def _spectrum(weight: Tensor, statistics: Statistics) -> Tensor:
    try:
        s = torch.linalg.svdvals(weight.double())
    except LinAlgError as error:
        raise SolveError("the singular values did not converge") from error
    return _floored(s).square()


def _output_spectrum(weight: Tensor, statistics: Statistics) -> Tensor:
    """s_i^2 v_i^T G v_i: D = sum of s_i u_i v_i^T over i >= r with orthonormal u_i, so the
    output errors of the directions add up. Without a Gram matrix: the weight error (G = I)."""
    _, s, vt = _svd(weight)
    if statistics.gram is None:
        return s.square()
    return s.square() * torch.sum(vt @ statistics.gram.double() * vt, dim=1).clamp(min=0.0)


def _factorize(weight: Tensor, statistics: Statistics, rank: int) -> Factors:
    u, s, vt = _svd(weight)
    rank = min(rank, max(int((s > 0).sum()), 1))
    return balanced(u[:, :rank], s[:rank, None] * vt[:rank])


def _svd(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    try:
        u, s, vt = torch.linalg.svd(weight.double(), full_matrices=False)
    except LinAlgError as error:
        raise SolveError("the singular value decomposition did not converge") from error
    return u, _floored(s), vt


def _floored(s: Tensor) -> Tensor:
    if not torch.isfinite(s).all():
        raise SolveError("the singular values are not finite")
    return torch.where(s > len(s) * torch.finfo(s.dtype).eps * s[0], s, 0.0)


SVD = Solver(
    name="svd",
    unit="squared error of the weights",
    needs=frozenset(),
    metric=_metric,
    spectrum=_spectrum,
    output_spectrum=_output_spectrum,
    factorize=_factorize,
)
