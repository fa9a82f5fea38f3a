"""Row groups of outputs come in the order of the permutation, bit by bit, for any way to move."""

import pytest
import torch
from torch import Tensor

from lrc_cli.network.low_rank.row_order import MANY, in_order

WIDTH = 256


def made(dtype: torch.dtype, block: int, *, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns rows, a permutation of their row groups, and the rows in the permutation's order."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, num_rows // 2, WIDTH, generator=generator).to(dtype)
    rows[0, 0, 0], rows[0, 0, 1] = torch.nan, -torch.inf
    perm = torch.randperm(WIDTH // block, generator=generator).to(torch.int32)
    numbers = (perm.long()[:, None] * block + torch.arange(block)).flatten()
    return rows, perm, rows[..., numbers]


@pytest.mark.parametrize("block", [1, 4, 8, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("num_rows", [2, 2 * MANY // WIDTH])
def test_every_bit_is_moved(dtype: torch.dtype, block: int, num_rows: int) -> None:
    rows, perm, wanted = made(dtype, block, num_rows=num_rows)
    found = in_order(rows, perm, block)
    assert found.dtype == dtype and found.shape == wanted.shape
    assert torch.equal(found.view(torch.uint8), wanted.contiguous().view(torch.uint8))
    channels_first = in_order(rows.mT.contiguous(), perm, block, channels=-2)
    assert torch.equal(channels_first.mT.contiguous().view(torch.uint8), found.view(torch.uint8))


def test_gradients_go_back_through_the_order() -> None:
    rows, perm, _ = made(torch.float32, 8, num_rows=2 * MANY // WIDTH)
    rows = torch.zeros_like(rows).requires_grad_()
    weights = torch.arange(rows.numel()).view(rows.shape).float()
    (in_order(rows, perm, 8) * weights).sum().backward()
    assert rows.grad is not None
    assert torch.equal(in_order(rows.grad, perm, 8), weights)


def test_derivatives_go_forwards_through_the_order() -> None:
    rows, perm, _ = made(torch.float32, 8, num_rows=2 * MANY // WIDTH)
    rows, tangent = torch.zeros_like(rows), torch.randn_like(rows.nan_to_num())
    _, found = torch.func.jvp(lambda x: in_order(x, perm, 8), (rows,), (tangent,))
    assert torch.equal(found, in_order(tangent, perm, 8))


def test_a_trace_goes_through_the_order() -> None:
    rows, perm, _ = made(torch.float32, 8, num_rows=2 * MANY // WIDTH)
    rows = torch.ones_like(rows)
    traced = torch.jit.trace(lambda x: in_order(x, perm, 8), (rows,))
    assert torch.equal(traced(rows), rows)
