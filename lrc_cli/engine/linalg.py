"""Symmetric eigenproblems and plain SVD are solved here in float64, ordered and cleaned."""

import torch
from torch import Tensor

from lrc_cli.engine.problem import Factors, SolveError

LinAlgError = torch.linalg.LinAlgError  # type: ignore[attr-defined]  # torch's stubs omit it


def is_wide(matrix: Tensor) -> bool:
    """Whether the eigenproblem on side m of a matrix (m, n) is no larger than the other one."""
    return matrix.shape[0] <= matrix.shape[1]


def eigenvalues(matrix: Tensor) -> Tensor:
    """The eigenvalues (k,) of a positive semidefinite (k, k), descending, 0 below the floor."""
    try:
        values = torch.linalg.eigvalsh(matrix)
    except LinAlgError as error:
        raise SolveError("the eigenvalues did not converge") from error
    return _cleaned(values.flip(0))


def eigenpairs(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The eigenvalues (k,), as `eigenvalues` gives them, and the eigenvectors (k, k) as columns."""
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except LinAlgError as error:
        raise SolveError("the eigenvectors did not converge") from error
    return _cleaned(values.flip(0)), vectors.flip(1)


def _cleaned(values: Tensor) -> Tensor:
    """The descending values, with each value at or below k * eps * the largest set to 0."""
    if not torch.isfinite(values).all():
        raise SolveError("the eigenvalues are not finite")
    floor = len(values) * torch.finfo(values.dtype).eps * values[0].clamp(min=0.0)
    return torch.where(values > floor, values, 0.0)


def root(gram: Tensor) -> Tensor:
    """A root R (n, n) with G = R R^T. A singular G has no Cholesky factor, but has such a root."""
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(gram)
    if info.item() == 0 and bool(torch.isfinite(factor).all()):
        return factor
    values, vectors = eigenpairs(gram)
    return vectors * values.sqrt()


def cholesky(matrix: Tensor, name: str = "curvature") -> Tensor:
    """The lower triangular C with C C^T = matrix. Raises SolveError if not positive definite."""
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(matrix)
    if info.item() != 0 or not torch.isfinite(factor).all():
        raise SolveError(f"the {name} matrix is not positive definite")
    return factor


def balanced(outer: Tensor, inner: Tensor) -> Factors:
    """Factors of the same product with |outer[:, i]| = |inner[i]|: neither leaves fp16's range."""
    outer_norms = torch.linalg.vector_norm(outer, dim=0)
    inner_norms = torch.linalg.vector_norm(inner, dim=1)
    ratio = torch.sqrt(inner_norms / outer_norms)
    scale = torch.where((outer_norms > 0) & (inner_norms > 0), ratio, 1.0)
    return Factors(outer * scale, inner / scale[:, None])


def rank_above_floor(values: Tensor) -> int:
    """The number of eigenvalues above the numerical floor, at least 1."""
    return max(int((values > 0).sum()), 1)


def truncated_svd(weight: Tensor, rank: int) -> Factors:
    """Returns the best matrix of a rank where no data is known."""
    directions = svd_directions(weight).truncated(rank)
    return balanced(directions.outer, directions.inner)


def svd_directions(weight: Tensor, vectors: Tensor | None = None) -> Factors:
    """Returns W = U (S V^T), U (m, k) orthonormal and the rows of S V^T orthogonal, largest first.

    Only directions above the numerical floor are kept, at least one.

    Args:
        vectors: (min(m, n), j), the singular vectors of the smaller side, where they are known.
    """
    weight = weight.double()
    if vectors is None:
        _, vectors = singular_pairs(weight)
    if is_wide(weight):
        return Factors(vectors, vectors.T @ weight)
    outer = weight @ vectors
    singular = torch.linalg.vector_norm(outer, dim=0)
    return Factors(
        outer * torch.where(singular > 0, 1 / singular, 0.0), singular[:, None] * vectors.T
    )


def singular_pairs(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Returns squared singular values (j,) above the numerical floor, and the vectors (k, j).

    The vectors are the singular vectors of the smaller side.
    """
    values, vectors = eigenpairs(weight @ weight.T if is_wide(weight) else weight.T @ weight)
    rank = rank_above_floor(values)
    return values[:rank], vectors[:, :rank]
