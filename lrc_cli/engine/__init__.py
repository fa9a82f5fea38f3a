"""The numerical core: no files, no configuration, no logging.

solver = SOLVERS["curvature"]
choices = rank_choices(solver.spectrum(weight, statistics), m=m, n=n, itemsize=2)
(pick,) = within_bytes([choices], budget)
factors = solver.factorize(weight, statistics, int(choices.ranks[pick]))
stored = pack_best(SameInput(weight, statistics, solver), factors.rank, torch.bfloat16)
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
    DENSE,
    Choices,
    RankChoices,
    default_rank_multiple,
    rank_choices,
    tails,
)
from lrc_cli.engine.problem import (
    Errors,
    Factors,
    Metric,
    References,
    SolveError,
    Statistics,
    Survey,
)
from lrc_cli.engine.solver import Given, Solver
from lrc_cli.engine.solvers.approximation import Approximation, Solution
from lrc_cli.engine.solvers.curvature import CURVATURE
from lrc_cli.engine.solvers.frobenius import FROBENIUS
from lrc_cli.engine.solvers.nuclear import NUCLEAR, Shrunk, rank_of
from lrc_cli.engine.solvers.relu import RELU, Rectified, Unpolished
from lrc_cli.engine.solvers.same_input import SameInput, problems_of, survey
from lrc_cli.engine.solvers.sequential import Drift, Sequential
from lrc_cli.engine.solvers.svd import SVD
from lrc_cli.engine.storage.choose import pack_best
from lrc_cli.engine.storage.forms import (
    PIVOT_BLOCK,
    STORAGES,
    Packed,
    Storage,
    Stored,
    dense,
    pivot_block,
    storage_bytes,
)

SOLVERS: dict[str, Solver] = {
    solver.name: solver for solver in (SVD, FROBENIUS, NUCLEAR, RELU, CURVATURE)
}

__all__ = [
    "CURVATURE",
    "DENSE",
    "FROBENIUS",
    "NUCLEAR",
    "PIVOT_BLOCK",
    "RELU",
    "SOLVERS",
    "STORAGES",
    "SVD",
    "Approximation",
    "Choices",
    "Drift",
    "Errors",
    "Factors",
    "Given",
    "Infeasible",
    "Metric",
    "Packed",
    "RankChoices",
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
    "dense",
    "mean_bound",
    "pack_best",
    "pivot_block",
    "problems_of",
    "quantile_bound",
    "quantile_order",
    "rank_choices",
    "rank_of",
    "sequences_needed",
    "storage_bytes",
    "survey",
    "tails",
    "uniform",
    "uniform_within_error",
    "within_bytes",
    "within_error",
    "within_layer_error",
]
