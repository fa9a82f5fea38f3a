"""The rows of an interpolative decomposition are chosen here, in row groups of neighbours.

For a basis Q (m, r) of the range of Z and a set J of r rows, Z = P [I; T] Z_J holds exactly
with T = Q_R Q_J^-1. Rounding T and Z_J costs in proportion to T, so J is chosen for a small
||T||_F: a greedy start, then swaps that enlarge |det Q_J| while ||T||_F falls (maximum volume,
which Goreinov et al. 2010 have for single rows). `block` is the number of rows in a row group.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_SWAPS = 20
"""The number of swaps that are tried per layer; 0 to 5 are usual for row groups of 8."""

LARGEST = 1e3
"""A larger entry of T means that no well-conditioned set of row groups was found."""


@dataclass(frozen=True, kw_only=True)
class Pivots:
    """The chosen rows and the coefficients of the other rows."""

    order: Tensor
    """The row groups (m / block,) int64, the r / block chosen groups first."""

    coefficients: Tensor
    """T (m - r, r), in the dtype of the basis: other row i is T[i] @ (the chosen rows)."""


def select(basis: Tensor, block: int) -> Pivots | None:
    """Pivots for orthonormal columns `basis` (m, r), r < m, float64 or float32; `block` divides m.

    The result is None where every choice of whole row groups is badly conditioned (zero rows spread
    over all groups, say). Groups of one row always succeed.
    """
    basis = basis.contiguous()  # QR's is column-major, which makes thin products slow
    chosen = _partial_pivoting(basis) if block == 1 else _greedy(basis, block)
    if chosen is None:
        return None
    pivots = _improved(basis, chosen, block)
    bounded = pivots.coefficients.abs().amax() <= LARGEST
    return pivots if block == 1 or bounded else None


def _partial_pivoting(basis: Tensor) -> Tensor:
    """The rows (r,) int64 that LU with partial pivoting moves to the top."""
    packed, exchanges = torch.linalg.lu_factor(basis)
    permutation, _, _ = torch.lu_unpack(packed, exchanges, unpack_data=False)
    return permutation.argmax(dim=0)[: basis.shape[1]]


def _greedy(basis: Tensor, block: int) -> Tensor | None:
    """The chosen row groups (r / block,) int64; None where all determinants vanish.

    Each step takes the group whose rows, less their projection on the rows chosen so far, have the
    largest Gram determinant. This is the Cholesky factor of Q Q^T (m, m), of rank r, with row
    groups as pivots. Neither Q Q^T nor the remainder is formed. Both arrays lie by columns, which
    makes the thin products fast.
    """
    num_blocks, rank = len(basis) // block, basis.shape[1]
    rows, columns = basis.view(num_blocks, block, rank), basis.T.contiguous()
    left = rows @ rows.mT
    factor = basis.new_empty(rank, len(basis))
    chosen: list[int] = []
    for start in range(0, rank, block):
        sign, volume = torch.linalg.slogdet(left)
        volume = torch.where(sign > 0, volume, -torch.inf)
        volume[chosen] = -torch.inf
        best = int(volume.argmax())
        corner, info = torch.linalg.cholesky_ex(left[best])
        if not volume[best].isfinite() or info.item() != 0:
            return None
        chosen.append(best)
        own, done = slice(best * block, (best + 1) * block), factor[:start]
        remainder = columns[:, own].T @ columns - done[:, own].T @ done
        new = torch.linalg.solve_triangular(corner, remainder, upper=False)
        factor[start : start + block] = new
        seen = new.view(block, num_blocks, block).transpose(0, 1)
        left = left - seen.mT @ seen
    return torch.tensor(chosen, device=basis.device)


def _improved(basis: Tensor, chosen: Tensor, block: int) -> Pivots:
    """Swap outside group i for chosen group j with the largest |det T_ij| while T shrinks."""
    pivots = _solved(basis, chosen, block)
    for _ in range(MAX_SWAPS):
        volumes = _block_volumes(pivots.coefficients, block)
        outside, inside = divmod(int(volumes.argmax()), volumes.shape[1])
        if volumes[outside, inside] <= 1:
            break
        swapped = pivots.order[: len(chosen)].clone()
        swapped[inside] = pivots.order[len(chosen) + outside]
        candidate = _solved(basis, swapped, block)
        if not candidate.coefficients.norm() < pivots.coefficients.norm():
            break
        pivots = candidate
    return pivots


def _solved(basis: Tensor, chosen: Tensor, block: int) -> Pivots:
    """Pivots of the given row groups, both parts in ascending order (contiguous reads)."""
    num_blocks = len(basis) // block
    is_chosen = torch.zeros(num_blocks, dtype=torch.bool, device=basis.device)
    is_chosen[chosen] = True
    order = torch.cat([is_chosen.nonzero()[:, 0], (~is_chosen).nonzero()[:, 0]])
    rows = basis.view(num_blocks, block, -1)[order].reshape(basis.shape)
    rank = basis.shape[1]
    coefficients, info = torch.linalg.solve_ex(rows[:rank], rows[rank:], left=False)
    if info.item() != 0:
        coefficients = torch.full_like(coefficients, torch.inf)
    return Pivots(order=order, coefficients=coefficients)


def _block_volumes(coefficients: Tensor, block: int) -> Tensor:
    """The volumes |det T_ij| of pairs of row groups: ((m - r) / block, r / block)."""
    if block == 1:
        return coefficients.abs()
    outside, inside = (size // block for size in coefficients.shape)
    blocks = coefficients.view(outside, block, inside, block).transpose(1, 2)
    return torch.linalg.det(blocks).abs().nan_to_num(nan=0.0)
