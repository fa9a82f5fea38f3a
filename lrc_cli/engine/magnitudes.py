"""Numbers whose squares leave float32's range are squared here, with the help of powers of two.

float32 holds 1e-45 to 3e38, so squares of numbers below 1e-19 lose digits and vanish below 1e-23,
and squares of numbers above 1e19 are infinite. A product with a power of two rounds nothing: what
fits without it has the same bits with it. Where all numbers fit, nothing is done.
"""

import torch
from torch import Tensor

SMALLEST, LARGEST = 2.0**-50, 2.0**55
"""Products of float32 numbers of this size, and sums of 2^17 such products, keep all digits: the
largest of them are 2^-100 and 2^127, and terms that underflow are below their rounding."""


def column_scales(rows: Tensor) -> Tensor | None:
    """Returns powers of two that bring the largest entry of every column to 0.5..1.

    Columns of zeros, and columns with entries that are not finite, have the scale 1.

    Args:
        rows: (t, n), any floating dtype.

    Returns:
        (n,) float64; None where products of the rows keep all digits as they are.
    """
    if not rows.numel():
        return None
    sizes = rows.abs().amax(dim=0)
    if bool(((sizes == 0) | ((sizes >= SMALLEST) & (sizes <= LARGEST))).all()):
        return None
    # Apple's GPUs have no float64, so the CPU holds their scales.
    wide = sizes.to("cpu" if rows.device.type == "mps" else rows.device, torch.float64)
    _, exponents = torch.frexp(wide)
    scales = torch.ldexp(torch.ones_like(wide), exponents)
    return torch.where(wide.isfinite() & (wide > 0), scales, 1.0)


def divided(rows: Tensor, scales: Tensor) -> Tensor:
    """Returns rows (t, n) over the scales of their columns; bfloat16 as it is, else in float32."""
    dtype = rows.dtype if rows.dtype == torch.bfloat16 else torch.float32
    return (rows.to(scales.device, torch.float64) / scales).to(rows.device, dtype)


def norms(rows: Tensor) -> Tensor:
    """Returns the 2-norms of rows (..., n) of any floating dtype, (...) float64.

    A norm is taken in float32, as long as the squares fit; else in float64.
    """
    found = torch.linalg.vector_norm(rows.float(), dim=-1).double()
    # A norm of 0 may come of squares that vanished.
    holds = (found >= SMALLEST) & (found <= LARGEST)
    if bool(holds.all()):
        return found
    return torch.where(holds, found, torch.linalg.vector_norm(rows.double(), dim=-1))


def largest(matrix: Tensor) -> float:
    """Returns the largest size of an entry, without a copy of the matrix; 0 where there is none."""
    if not matrix.numel():
        return 0.0
    low, high = torch.aminmax(matrix)
    return max(-float(low), float(high))


def fits(size: float) -> bool:
    """Returns whether squares of numbers of this size keep their digits in float32."""
    return size == 0 or SMALLEST <= size <= LARGEST
