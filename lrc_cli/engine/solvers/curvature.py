"""`curvature` minimises 1/2 tr(F D G D^T), the K-FAC estimate of the loss increase per token.

F is damped by 1e-3 of its mean eigenvalue and handled as mean * (normalised matrix), because
gradients are tiny (F is about 1e-12). Where no gradient ever arrived (F = 0) the normalised matrix
is the identity and the scale 0: the solution is `frobenius`'s, at no cost.

The eigenproblem is in weighted.py.
"""

import torch

from lrc_cli.engine.problem import Metric, Statistics, required
from lrc_cli.engine.solver import Solver
from lrc_cli.engine.solvers.weighted import Weighted, spanned

DAMPING = 1e-3
"""The share of F's mean eigenvalue that is added to its eigenvalues."""


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


# Beyond the numerical floor the error is zero already, and the directions are noise.
_WEIGHTED = Weighted(metric=_metric, capped=True)

CURVATURE = Solver(
    name="curvature",
    unit="estimated increase of the loss per token",
    needs=frozenset({"gram", "fisher"}),
    metric=_metric,
    spectrum=_WEIGHTED.spectrum,
    factorize=_WEIGHTED.factorize,
    survey=_WEIGHTED.survey,
    spanned=spanned,
    is_sequential=True,
    predicts_loss=True,
)
