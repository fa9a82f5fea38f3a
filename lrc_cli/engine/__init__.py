"""The numerical core knows no files, no configuration and no logging.

solver = SOLVERS["curvature"]
problem, auto = SameInput(weight, statistics, solver), STORAGES["auto"]
predicted = Predicted(spectrum=problem.spectrum)
choices = Choices(auto.choices((m, n), 2, predicted, rank_multiple=8))
(pick,) = within_bytes([choices], budget)
stored = auto.pack(problem, choices.each[pick], torch.bfloat16)
"""

from lrc_cli.engine.bounds import (
    bernstein_mean_bound,
    capital,
    mean_bound,
    quantile_bound,
    quantile_order,
    sequences_needed,
)
from lrc_cli.engine.budget.allocate import (
    Infeasible,
    uniform,
    uniform_within_error,
    within_bytes,
    within_error,
    within_layer_error,
)
from lrc_cli.engine.budget.choices import (
    Choice,
    Choices,
    Predicted,
    tail_sums,
)
from lrc_cli.engine.problem import (
    Errors,
    Factors,
    Metric,
    References,
    Solution,
    SolveError,
    Statistics,
    Survey,
)
from lrc_cli.engine.solver import Given, Solver
from lrc_cli.engine.solvers.approximation import Approximation, rounded_bias
from lrc_cli.engine.solvers.curvature import CURVATURE
from lrc_cli.engine.solvers.frobenius import FROBENIUS
from lrc_cli.engine.solvers.nuclear import NUCLEAR, Shrunk, rank_of
from lrc_cli.engine.solvers.relu import RELU, Rectified, Unpolished
from lrc_cli.engine.solvers.same_input import SameInput, problems_of, survey
from lrc_cli.engine.solvers.sequential import Drift, Sequential
from lrc_cli.engine.solvers.svd import SVD
from lrc_cli.engine.storage.dense import DENSE_STORAGE
from lrc_cli.engine.storage.known import STORAGES
from lrc_cli.engine.storage.low_rank import (
    PIVOT_BLOCK,
    LowRankStorage,
    default_rank_multiple,
    pivot_block,
)
from lrc_cli.engine.storage.storage import Storage, Stored

SOLVERS: dict[str, Solver] = {
    solver.name: solver for solver in (SVD, FROBENIUS, NUCLEAR, RELU, CURVATURE)
}

__all__ = [
    "CURVATURE",
    "DENSE_STORAGE",
    "FROBENIUS",
    "NUCLEAR",
    "PIVOT_BLOCK",
    "RELU",
    "SOLVERS",
    "STORAGES",
    "SVD",
    "Approximation",
    "Choice",
    "Choices",
    "Drift",
    "Errors",
    "Factors",
    "Given",
    "Infeasible",
    "LowRankStorage",
    "Metric",
    "Predicted",
    "Rectified",
    "References",
    "SameInput",
    "Sequential",
    "Shrunk",
    "Solution",
    "SolveError",
    "Solver",
    "Statistics",
    "Storage",
    "Stored",
    "Survey",
    "Unpolished",
    "bernstein_mean_bound",
    "capital",
    "default_rank_multiple",
    "mean_bound",
    "pivot_block",
    "problems_of",
    "quantile_bound",
    "quantile_order",
    "rank_of",
    "rounded_bias",
    "sequences_needed",
    "survey",
    "tail_sums",
    "uniform",
    "uniform_within_error",
    "within_bytes",
    "within_error",
    "within_layer_error",
]
