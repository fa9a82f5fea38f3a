"""`svd` is plain truncated SVD, which knows no data and is every other solver's baseline.

The solution is taken from the eigenvectors of W W^T or W^T W, whichever is smaller, three times
faster than a singular value decomposition. Singular values below about 1e-7 of the largest are
lost, which is below what float32 factors resolve.
"""

import torch
from torch import Tensor

from lrc_cli.engine.budget.choices import tail_sums
from lrc_cli.engine.linalg import (
    balanced,
    eigenvalues,
    is_wide,
    singular_pairs,
    svd_directions,
    truncated_svd,
)
from lrc_cli.engine.problem import Errors, Factors, Metric, References, Statistics, Survey
from lrc_cli.engine.solver import Solver
from lrc_cli.engine.solvers.weighted import eigenproblem_of


def _metric(statistics: Statistics) -> Metric:
    return Metric()


def _spectrum(weight: Tensor, statistics: Statistics) -> Tensor:
    weight = weight.double()
    return eigenvalues(weight @ weight.T if is_wide(weight) else weight.T @ weight)


def _factorize(weight: Tensor, statistics: Statistics, rank: int) -> Factors:
    return truncated_svd(weight, rank)


def _spanned(weight: Tensor, metric: Metric, vectors: Tensor) -> Factors:
    directions = svd_directions(weight, vectors.double())
    return balanced(directions.outer, directions.inner)


def _survey(weight: Tensor, statistics: Statistics) -> Survey:
    weight = weight.double()
    values, vectors = singular_pairs(weight)
    spectrum = torch.nn.functional.pad(values, (0, min(weight.shape) - len(values)))
    errors, total = tail_sums(spectrum), weight.square().sum().item()
    if statistics.gram is None:  # the inputs are white
        references = References(spectrum, errors, errors.clone())
        zero, curve = Errors(total, total), spectrum.clone()
        return Survey(
            spectrum=spectrum, output_curve=curve, vectors=vectors, references=references, zero=zero
        )
    # D = sum of u_i (s_i v_i)^T over i >= r with orthonormal u_i, so the output errors add up.
    rows = svd_directions(weight, vectors).inner
    curve = torch.sum((rows @ statistics.gram.double()) * rows, dim=1).clamp(min=0.0)
    found = eigenproblem_of(weight, Metric(gram=statistics.gram.double())).references()
    return Survey(
        spectrum=spectrum,
        output_curve=curve,
        vectors=vectors,
        references=found._replace(svd_metric=errors),
    )


SVD = Solver(
    name="svd",
    unit="squared error of the weights",
    needs=frozenset(),
    metric=_metric,
    spectrum=_spectrum,
    factorize=_factorize,
    survey=_survey,
    spanned=_spanned,
    no_center="svd looks at no data",
    no_layer_error="svd looks at no data",
)
