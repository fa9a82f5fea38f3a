"""D1 and D2: how well a low-rank layer is recovered from noisy outputs (docs/theory.md).

The model: what is fitted, Y (m, T), is M X + E for some matrix M (m, n), the inputs X (n, T) and
noise E (m, T). Nothing here looks at what a run does: these bounds explain why fitting to data
works, they certify nothing.
"""

import math

import torch
from torch import Tensor

from lrc_cli.engine.linalg import LinAlgError
from lrc_cli.engine.problem import SolveError


def visible_noise(noise: Tensor, inputs: Tensor) -> float:
    """||E P||_2, P the projector on the row space of X: the noise that a fit to X can follow.

    Args:
        noise: E (m, T).
        inputs: X (n, T), of any rank.

    Raises:
        SolveError: a singular value decomposition did not converge.
    """
    rows = row_basis(inputs)
    if rows.shape[1] == 0:
        return 0.0
    return _singular_values(noise.double() @ rows)[0].item()


def row_basis(inputs: Tensor) -> Tensor:
    """Orthonormal columns (T, k) float64 that span the row space of X (n, T); k = rank X.

    Directions below max(n, T) * eps of the largest singular value count as not there.

    Raises:
        SolveError: the singular value decomposition did not converge.
    """
    try:
        _, values, rows = torch.linalg.svd(inputs.double(), full_matrices=False)
    except LinAlgError as error:
        raise SolveError("the singular values did not converge") from error
    floor = max(inputs.shape) * torch.finfo(torch.float64).eps * values[:1].sum()
    return rows[values > floor].T


def tail_norm(outputs: Tensor, rank: int) -> float:
    """tail_r(B): the Frobenius distance from B (m, T) to the nearest matrix of rank `rank`.

    Raises:
        SolveError: the singular value decomposition did not converge.
    """
    return torch.linalg.vector_norm(_singular_values(outputs.double())[rank:]).item()


def recovery_bound(visible: float, rank: int, tail: float) -> float:
    """D1: 2 sqrt(2 r) ||E P||_2 + tail_r(M X), which ||(M^ - M) X||_F never exceeds.

    M^ is any minimiser of ||Y - Z X||_F over rank(Z) <= r. Deterministic: holds for every E.

    Args:
        visible: ||E P||_2, or an upper bound of it.
        rank: r.
        tail: tail_r(M X); 0 where M has a rank of at most r.
    """
    return 2 * math.sqrt(2 * rank) * visible + tail


def gaussian_noise_bound(size: float, *, num_outputs: int, input_rank: int, delta: float) -> float:
    """D2: s (sqrt k + sqrt m + sqrt(2 ln(1/delta))), exceeded by ||E P||_2 with at most delta.

    For independent Gaussian entries of E that do not depend on X (Davidson & Szarek 2001,
    theorem II.13).

    Args:
        size: s, the standard deviation of an entry.
        num_outputs: m.
        input_rank: k, the rank of X.
        delta: allowed probability of failure.

    Raises:
        ValueError: delta is not between 0 and 1.
    """
    if not 0.0 < delta < 1.0:
        raise ValueError(f"{delta} is not between 0 and 1")
    spread = math.sqrt(2 * math.log(1 / delta))
    return size * (math.sqrt(input_rank) + math.sqrt(num_outputs) + spread)


def surviving_noise(rank: int, *, num_outputs: int, input_rank: int, num_tokens: int) -> float:
    """The share r (k + m - r) / (T m) of the noise's energy in a recovered M of exact rank r.

    To first order in the noise this is the dimension of the tangent space of the matrices of rank r
    over the dimension of all noise. It is an estimate, not a bound.
    """
    return rank * (input_rank + num_outputs - rank) / (num_tokens * num_outputs)


def _singular_values(matrix: Tensor) -> Tensor:
    try:
        return torch.linalg.svdvals(matrix)
    except LinAlgError as error:
        raise SolveError("the singular values did not converge") from error
