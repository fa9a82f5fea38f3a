"""D0': min over rank(Z) <= r of ||(W - Z) X||_F^2 / T, with no inverse of the Gram matrix.

Z = U U^T W with U the leading eigenvectors of W G W^T; the error is the sum of the remaining
eigenvalues (Eckart-Young). For tall W the eigenproblem is solved on the input side: with
G = R R^T and P the leading eigenvectors of R^T W^T W R, U = orth(W R P).
"""

import torch
from torch import Tensor

from lrc_cli.engine.linalg import balanced, eigenpairs, eigenvalues, is_wide, root
from lrc_cli.engine.problem import Factors, Metric, Solver, Statistics, required


def _metric(statistics: Statistics) -> Metric:
    return Metric(gram=required(statistics.gram, "gram"))


def _spectrum(weight: Tensor, statistics: Statistics) -> Tensor:
    weight, gram = weight.double(), required(statistics.gram, "gram")
    if is_wide(weight):
        return eigenvalues(weight @ gram @ weight.T)
    outputs = weight @ root(gram)
    return eigenvalues(outputs.T @ outputs)


def _factorize(weight: Tensor, statistics: Statistics, rank: int) -> Factors:
    weight, gram = weight.double(), required(statistics.gram, "gram")
    if is_wide(weight):
        _, vectors = eigenpairs(weight @ gram @ weight.T)
        u = vectors[:, :rank]
    else:
        outputs = weight @ root(gram)
        _, p = eigenpairs(outputs.T @ outputs)
        u, _ = torch.linalg.qr(outputs @ p[:, :rank])
    return balanced(u, u.T @ weight)


FROBENIUS = Solver(
    name="frobenius",
    unit="mean squared output error per token",
    needs=frozenset({"gram"}),
    metric=_metric,
    spectrum=_spectrum,
    output_spectrum=_spectrum,
    factorize=_factorize,
)
