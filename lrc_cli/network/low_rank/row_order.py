"""The order of an interpolative layer's outputs, which come as the chosen rows and the others."""

import torch
from torch import Tensor

CELL = torch.complex128
"""The widest number: a CPU gathers single ones three times as fast as rows of a few."""
MANY = 2**17
"""Numbers from which on that makes up for the calls that it takes: 64 tokens of 2048."""


def in_order(rows: Tensor, perm: Tensor, block: int, channels: int = -1) -> Tensor:
    """Blocks of outputs in the order `perm` (m / block,).

    Args:
        rows: contiguous, m channels.
        channels: the dimension that counts them, from the end.
    """
    if channels == -1 and _has_cells(rows, block):
        return _gathered(rows, perm, block)
    blocks = rows.unflatten(channels, (len(perm), block))
    return blocks.index_select(channels - 1, perm).flatten(channels - 1, channels)


def _has_cells(rows: Tensor, block: int) -> bool:
    """Whether blocks can be moved as numbers of 16 bytes, which have no gradient, and it pays."""
    # Tracers, and tensors that carry a derivative forwards, see none of this.
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
