"""Plain truncated SVD: knows no data; the baseline every other solver is compared with.

Taken from the eigenvectors of the small one of W W^T and W^T W, three times faster than a
singular value decomposition. Singular values below about 1e-7 of the largest are lost, which is
below what float32 factors resolve.
"""

import torch
from torch import Tensor

from lrc_cli.engine.linalg import balanced, eigenpairs, eigenvalues, is_wide
from lrc_cli.engine.problem import Factors, Metric, Solver, Statistics


def _metric(statistics: Statistics) -> Metric:
    return Metric()


def _spectrum(weight: Tensor, statistics: Statistics) -> Tensor:
    weight = weight.double()
    return eigenvalues(weight @ weight.T if is_wide(weight) else weight.T @ weight)


def _output_spectrum(weight: Tensor, statistics: Statistics) -> Tensor:
    """u_i^T W G W^T u_i = s_i^2 v_i^T G v_i: D = sum of s_i u_i v_i^T over i >= r with orthonormal
    u_i, so the output errors of the directions add up. Without a Gram matrix: s_i^2 (G = I)."""
    directions = svd_directions(weight)
    gram = statistics.gram
    outputs = directions.inner if gram is None else directions.inner @ gram.double()
    return torch.sum(outputs * directions.inner, dim=1).clamp(min=0.0)


def _factorize(weight: Tensor, statistics: Statistics, rank: int) -> Factors:
    directions = svd_directions(weight).truncated(rank)
    return balanced(directions.outer, directions.inner)


def svd_directions(weight: Tensor) -> Factors:
    """W = U (S V^T), U (m, k) orthonormal and the rows of S V^T orthogonal, largest first; only
    directions above the numerical floor, at least one."""
    weight = weight.double()
    if is_wide(weight):
        values, u = eigenpairs(weight @ weight.T)
        u = u[:, : _rank(values)]
        return Factors(u, u.T @ weight)
    values, v = eigenpairs(weight.T @ weight)
    v, singular = v[:, : _rank(values)], values[: _rank(values)].sqrt()
    return Factors(weight @ (v * torch.where(singular > 0, 1 / singular, 0.0)), (v * singular).T)


def _rank(values: Tensor) -> int:
    """How many eigenvalues are above the numerical floor, at least 1."""
    return max(int((values > 0).sum()), 1)


SVD = Solver(
    name="svd",
    unit="squared error of the weights",
    needs=frozenset(),
    metric=_metric,
    spectrum=_spectrum,
    output_spectrum=_output_spectrum,
    factorize=_factorize,
)
