"""The pure numerical core: no files, no configuration, no logging.

solver = SOLVERS["curvature"]
choices = rank_choices(solver.spectrum(weight, statistics), m=m, n=n, itemsize=2)
(pick,) = within_bytes([choices], budget)
factors = solver.factorize(weight, statistics, int(choices.ranks[pick]))
stored = pack_best(SameInput(weight, statistics, solver), factors.rank, torch.bfloat16)
"""

from lrc_cli.engine.allocate import (
    Infeasible,
    uniform,
    uniform_within_error,
    within_bytes,
    within_error,
    within_layer_error,
)
from lrc_cli.engine.approximation import Approximation, Errors, SameInput, Solution
from lrc_cli.engine.best import pack_best
from lrc_cli.engine.choices import (
    DENSE,
    Choices,
    RankChoices,
    default_rank_multiple,
    rank_choices,
    tails,
)
from lrc_cli.engine.curvature import CURVATURE
from lrc_cli.engine.frobenius import FROBENIUS
from lrc_cli.engine.problem import Factors, Metric, SolveError, Solver, Statistics
from lrc_cli.engine.storage import (
    PIVOT_BLOCK,
    STORAGES,
    Packed,
    Storage,
    Stored,
    dense,
    pivot_block,
    storage_bytes,
)
from lrc_cli.engine.svd import SVD

SOLVERS: dict[str, Solver] = {solver.name: solver for solver in (SVD, FROBENIUS, CURVATURE)}

__all__ = [
    "CURVATURE",
    "DENSE",
    "FROBENIUS",
    "PIVOT_BLOCK",
    "SOLVERS",
    "STORAGES",
    "SVD",
    "Approximation",
    "Choices",
    "Errors",
    "Factors",
    "Infeasible",
    "Metric",
    "Packed",
    "RankChoices",
    "SameInput",
    "Solution",
    "SolveError",
    "Solver",
    "Statistics",
    "Storage",
    "Stored",
    "default_rank_multiple",
    "dense",
    "pack_best",
    "pivot_block",
    "rank_choices",
    "storage_bytes",
    "tails",
    "uniform",
    "uniform_within_error",
    "within_bytes",
    "within_error",
    "within_layer_error",
]
