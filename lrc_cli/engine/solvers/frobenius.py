"""`frobenius` solves D0': min over rank(Z) <= r of ||(W - Z) X||_F^2 / T, without inverting G.

Z = U U^T W with U the leading eigenvectors of W G W^T. The error is the sum of the remaining
eigenvalues (Eckart-Young). For tall W the eigenproblem is solved on the input side (weighted.py).
"""

from lrc_cli.engine.problem import Metric, Statistics, required
from lrc_cli.engine.solver import Solver
from lrc_cli.engine.solvers.weighted import Weighted, spanned


def _metric(statistics: Statistics) -> Metric:
    return Metric(gram=required(statistics.gram, "gram"))


# A layer with fewer tokens than inputs keeps all its directions. Directions that no token excited
# are no part of the error, but other tokens may excite them.
_WEIGHTED = Weighted(metric=_metric, capped=False)

FROBENIUS = Solver(
    name="frobenius",
    unit="mean squared output error per token",
    needs=frozenset({"gram"}),
    metric=_metric,
    spectrum=_WEIGHTED.spectrum,
    factorize=_WEIGHTED.factorize,
    survey=_WEIGHTED.survey,
    spanned=spanned,
    is_sequential=True,
)
