"""This module puts outputs of interpolative layers in order, which begin with the chosen rows."""

import torch
from torch import Tensor

CELL = torch.complex128
"""The widest dtype: a CPU gathers single numbers three times as fast as rows of a few numbers."""
MANY = 2**17
"""The number of outputs from which gathering pays for its calls: 64 tokens of 2048 channels."""


def in_order(rows: Tensor, perm: Tensor, block: int, channels: int = -1) -> Tensor:
    """Returns outputs whose row groups are put in the order `perm`.

    Args:
        rows: the outputs, contiguous, with m channels.
        perm: (m / block,), the row group for each place.
        block: the rows of a row group.
        channels: the dimension that counts the channels, from the end.
    """
    if channels == -1 and _has_cells(rows, block):
        return _gathered(rows, perm, block)
    blocks = rows.unflatten(channels, (len(perm), block))
    return blocks.index_select(channels - 1, perm).flatten(channels - 1, channels)


def _has_cells(rows: Tensor, block: int) -> bool:
    """Returns whether row groups can move as 16-byte numbers without a gradient, and this pays."""
    # Tracers and forward derivatives do not follow a view as other numbers.
    plain = type(rows) is Tensor and not torch.jit.is_tracing()  # type: ignore[attr-defined]
    if not plain or torch.autograd.forward_ad._current_level >= 0:
        return False
    return (
        rows.numel() >= MANY
        and rows.device.type == "cpu"
        and not rows.requires_grad
        and block * rows.itemsize % CELL.itemsize == 0
        and not torch.compiler.is_compiling()
    )


def _gathered(rows: Tensor, perm: Tensor, block: int) -> Tensor:
    cells = rows.view(CELL)
    each = block * rows.itemsize // CELL.itemsize
    places = (perm.long()[:, None] * each + torch.arange(each, device=rows.device)).flatten()
    return cells.gather(-1, places.expand(cells.shape)).view(rows.dtype)
