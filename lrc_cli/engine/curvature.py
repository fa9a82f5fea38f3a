"""Loss-aware: minimise 1/2 tr(F D G D^T), the K-FAC estimate of the loss increase per token.

F is damped by 1e-3 of its mean eigenvalue and handled as mean * (normalised matrix), because
gradients are tiny (F is about 1e-12). Where no gradient ever arrived (F = 0) the normalised
matrix is the identity and the scale 0: the solution is that of `frobenius`, at no cost.

Wide W: with F = L^T L, U the leading eigenvectors of A = L W G W^T L^T, outer L^-1 U and inner
U^T L W. Tall W: with G = R R^T, (P, e) the leading eigenpairs of R^T W^T F W R, outer
V = W R P and inner diag(e)^-1 V^T F W; no root of F is needed.
"""

import torch
from torch import Tensor

from lrc_cli.engine.linalg import balanced, cholesky, eigenpairs, eigenvalues, is_wide, root
from lrc_cli.engine.problem import Factors, Metric, Solver, Statistics, required

DAMPING = 1e-3
"""Added to F's eigenvalues, as a share of their mean."""


def _metric(statistics: Statistics) -> Metric:
    fisher = required(statistics.fisher, "fisher")
    mean = fisher.diagonal().mean().item()
    if mean > 0:
        normalised = fisher / mean
        normalised.diagonal().add_(DAMPING)
    else:
        normalised = torch.eye(len(fisher), dtype=fisher.dtype, device=fisher.device)
    gram = required(statistics.gram, "gram")
    return Metric(gram=gram, fisher=normalised, scale=0.5 * mean)


def _wide(weight: Tensor, metric: Metric) -> tuple[Tensor, Tensor, Tensor]:
    """A = L W G W^T L^T (m, m), L W and the upper triangular L of F = L^T L."""
    assert metric.gram is not None and metric.fisher is not None
    left = cholesky(metric.fisher).T
    side = left @ weight
    return side @ metric.gram @ side.T, side, left


def _tall(weight: Tensor, metric: Metric) -> tuple[Tensor, Tensor, Tensor]:
    """A = R^T W^T F W R (n, n), W R and F W, for G = R R^T."""
    assert metric.gram is not None and metric.fisher is not None
    right = root(metric.gram)
    side, weighted = weight @ right, metric.fisher @ weight
    return side.T @ weighted @ right, side, weighted


def _spectrum(weight: Tensor, statistics: Statistics) -> Tensor:
    metric, weight = _metric(statistics), weight.double()
    matrix, _, _ = _wide(weight, metric) if is_wide(weight) else _tall(weight, metric)
    return metric.scale * eigenvalues(matrix)


def _output_spectrum(weight: Tensor, statistics: Statistics) -> Tensor:
    """Wide: D = L^-1 (I - U U^T) L W leaves e_i |L^-1 u_i|^2; tall: D R = W R (I - P P^T)
    leaves |W R p_i|^2. Both sums run over the directions that were not kept."""
    metric, weight = _metric(statistics), weight.double()
    if is_wide(weight):
        matrix, _, left = _wide(weight, metric)
        e, u = eigenpairs(matrix)
        return e * torch.linalg.solve_triangular(left, u, upper=True).square().sum(dim=0)
    matrix, side, _ = _tall(weight, metric)
    e, p = eigenpairs(matrix)
    return torch.where(e > 0, (side @ p).square().sum(dim=0), 0.0)


def _factorize(weight: Tensor, statistics: Statistics, rank: int) -> Factors:
    metric, weight = _metric(statistics), weight.double()
    if is_wide(weight):
        matrix, side, left = _wide(weight, metric)
        e, u = _leading(matrix, rank)
        return balanced(torch.linalg.solve_triangular(left, u, upper=True), u.T @ side)
    matrix, side, weighted = _tall(weight, metric)
    e, p = _leading(matrix, rank)
    outer = side @ p
    return balanced(outer, torch.where(e > 0, 1 / e, 0.0)[:, None] * (outer.T @ weighted))


def _leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """At most `rank` eigenpairs, at least one, none below the numerical floor if another is
    above: there the error is zero already and 1 / e is noise or infinite."""
    values, vectors = eigenpairs(matrix)
    rank = min(rank, max(int((values > 0).sum()), 1))
    return values[:rank], vectors[:, :rank]


CURVATURE = Solver(
    name="curvature",
    unit="estimated increase of the loss per token",
    needs=frozenset({"gram", "fisher"}),
    metric=_metric,
    spectrum=_spectrum,
    output_spectrum=_output_spectrum,
    factorize=_factorize,
)
