"""Squares and products that would leave float32's range are taken in float64."""

import torch
from torch import Tensor

SMALLEST, LARGEST = 2.0**-50, 2.0**55
"""Squares of the largest entry of a column between these keep their digits in float32."""


def fits(matrix: Tensor) -> bool:
    """Returns whether squares of a matrix's columns (t, n) keep their digits in float32."""
    if not matrix.numel():
        return True
    largest = matrix.abs().amax(dim=0)
    return bool(((largest == 0) | ((largest > SMALLEST) & (largest < LARGEST))).all())


def narrowed(matrix: Tensor) -> Tensor:
    """Returns a matrix (t, n) in float32 where it `fits`, else in float64."""
    return matrix.float() if fits(matrix) else matrix.double()


def product(rows: Tensor, matrix: Tensor) -> Tensor:
    """Returns rows (t, n) times a matrix (m, n)^T, in float64 where either does not fit float32."""
    rows, matrix = narrowed(rows), narrowed(matrix)
    dtype = torch.promote_types(rows.dtype, matrix.dtype)
    return rows.to(dtype) @ matrix.to(dtype).T


def energy(rows: Tensor) -> float:
    """Returns ||rows||_F^2 of rows (t, m): squares in float32 where they fit, summed in float64."""
    return torch.linalg.vector_norm(narrowed(rows), dim=1).double().square().sum().item()
