"""Least squares after rounding: the second factor is fitted against the stored first one."""

import torch
from torch import Tensor

from lrc_cli.engine.problem import Metric


def refitted(start: Tensor, target: Tensor, rows: Tensor, metric: Metric, unit: float) -> Tensor:
    """Coefficients (k, r) for which coefficients @ rows (r, n) is closest to target (k, n).

    Solves for the correction to `start` only, min over C of ||(target - start rows - C rows)
    R||_F^2 + ridge, so that directions in which G is singular leave `start` as it is. The
    ridge, unit^2 times the diagonal, is what rounding the entries to relative `unit` costs:
    below it a smaller residual is not worth larger entries. Returns `start` where even that
    system is singular.
    """
    weighted = metric.times_gram(rows)
    normal = weighted @ rows.T
    ridge = normal.diagonal() * max(unit**2, 1e-12)
    floor = normal.diagonal().mean() * 1e-14
    factor, info = torch.linalg.cholesky_ex(normal + torch.diag(ridge + floor))
    if info.item() != 0:
        return start
    residual = (target - start @ rows) @ weighted.T
    return start + torch.cholesky_solve(residual.T, factor).T


def conditional_target(
    target: Tensor, error: Tensor, chosen: Tensor, others: Tensor, metric: Metric
) -> Tensor:
    """What the rows that are not chosen should aim at, given the error of the chosen ones.

    W_R + F_RR^-1 F_RJ E_J with E_J = W_J - Z_J = `error` (r, n), truncation and rounding together:
    curvature lets the others make up for it. (m - r, n); W_R itself where F is the identity.
    """
    if metric.fisher is None:
        return target[others]
    factor, info = torch.linalg.cholesky_ex(metric.fisher[others][:, others])
    if info.item() != 0:
        return target[others]
    coupled = metric.fisher[others][:, chosen] @ error
    return target[others] + torch.cholesky_solve(coupled, factor)
