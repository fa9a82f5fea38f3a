"""Plain truncated SVD: knows no data; the baseline every other solver is compared with.

Taken from the eigenvectors of the small one of W W^T and W^T W, three times faster than a
singular value decomposition. Singular values below about 1e-7 of the largest are lost, which is
below what float32 factors resolve.
"""

import torch
from torch import Tensor

from lrc_cli.engine.choices import tails
from lrc_cli.engine.linalg import balanced, eigenpairs, eigenvalues, is_wide
from lrc_cli.engine.problem import Factors, Metric, References, Solver, Statistics, Survey
from lrc_cli.engine.sides import rank_above_floor, side_of


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


def _factorize(
    weight: Tensor, statistics: Statistics, rank: int, vectors: Tensor | None = None
) -> Factors:
    if vectors is not None:
        vectors = vectors[:, :rank].double()
    directions = svd_directions(weight, vectors).truncated(rank)
    return balanced(directions.outer, directions.inner)


def _survey(weight: Tensor, statistics: Statistics) -> Survey:
    values, vectors = _eigenpairs(weight.double())
    spectrum = torch.nn.functional.pad(values, (0, min(weight.shape) - len(values)))
    errors = tails(spectrum)
    if statistics.gram is None:  # the inputs are white
        references, curve = References(spectrum, errors, errors.clone()), spectrum.clone()
    else:
        found = side_of(weight, Metric(gram=statistics.gram.double())).references()
        references, curve = found._replace(svd_metric=errors), _output_spectrum(weight, statistics)
    return Survey(spectrum=spectrum, output_curve=curve, vectors=vectors, references=references)


def svd_directions(weight: Tensor, vectors: Tensor | None = None) -> Factors:
    """W = U (S V^T), U (m, k) orthonormal and the rows of S V^T orthogonal, largest first; only
    directions above the numerical floor, at least one.

    Args:
        vectors: (min(m, n), j), the singular vectors of the smaller side, where they are known.
    """
    weight = weight.double()
    if vectors is None:
        _, vectors = _eigenpairs(weight)
    if is_wide(weight):
        return Factors(vectors, vectors.T @ weight)
    outer = weight @ vectors
    singular = torch.linalg.vector_norm(outer, dim=0)
    return Factors(
        outer * torch.where(singular > 0, 1 / singular, 0.0), singular[:, None] * vectors.T
    )


def _eigenpairs(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Squared singular values (j,) above the numerical floor, and the vectors (k, j) of the smaller
    side."""
    values, vectors = eigenpairs(weight @ weight.T if is_wide(weight) else weight.T @ weight)
    rank = rank_above_floor(values)
    return values[:rank], vectors[:, :rank]


SVD = Solver(
    name="svd",
    unit="squared error of the weights",
    needs=frozenset(),
    metric=_metric,
    spectrum=_spectrum,
    output_spectrum=_output_spectrum,
    factorize=_factorize,
    survey=_survey,
)
