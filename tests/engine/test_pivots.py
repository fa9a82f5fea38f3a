"""An interpolative decomposition keeps rows, which are chosen here."""

import pytest
import torch
from engine_helpers import DEVICES
from pytest import MonkeyPatch
from torch import Tensor

from lrc_cli.engine.storage import pivots
from lrc_cli.engine.storage.pivots import select


def basis_of(rows: Tensor) -> Tensor:
    return torch.linalg.qr(rows.double())[0]


def scaled(num_rows: int, rank: int, spread: float, seed: int) -> Tensor:
    """Returns an orthonormal basis whose rows differ by orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(0, spread, num_rows)[torch.randperm(num_rows, generator=generator)]
    return basis_of(torch.randn(num_rows, rank, generator=generator) * sizes[:, None])


def largest_volumes(basis: Tensor, block: int) -> list[int]:
    """Returns the same row groups from the definition.

    Each candidate's rows lose their projection on the rows chosen so far; the volume comes from a
    singular value decomposition.
    """
    blocks, chosen = basis.view(-1, block, basis.shape[1]), list[int]()
    while len(chosen) * block < basis.shape[1]:
        span = torch.linalg.qr(blocks[chosen].flatten(0, 1).T)[0] if chosen else basis[:0].T
        volumes = []
        for number, rows in enumerate(blocks):
            left = rows - rows @ span @ span.T
            volumes.append(0.0 if number in chosen else torch.linalg.svdvals(left).prod().item())
        chosen.append(max(range(len(volumes)), key=volumes.__getitem__))
    return chosen


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("spread", [0, -2])
@pytest.mark.parametrize(("num_rows", "rank", "block"), [(48, 24, 4), (64, 8, 8), (40, 36, 2)])
def test_the_start_is_greedy_by_volume(
    num_rows: int, rank: int, block: int, spread: float, device: str, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.setattr(pivots, "MAX_SWAPS", 0)
    basis = scaled(num_rows, rank, spread, seed=rank)
    found = select(basis.to(device), block)
    assert found is not None
    assert found.order[: rank // block].tolist() == sorted(largest_volumes(basis, block))


def test_no_set_of_blocks_is_taken_where_all_are_singular() -> None:
    """Every second row is zero, so no row group of two has two independent rows."""
    basis = torch.zeros(24, 6, dtype=torch.float64)
    basis[::2] = basis_of(torch.randn(12, 6, generator=torch.Generator().manual_seed(0)))
    assert select(basis, 2) is None
    single = select(basis, 1)
    assert single is not None and single.coefficients.abs().max() < 1e3


def test_nearly_dependent_rows_do_not_spoil_the_choice() -> None:
    """Row groups that repeat others up to 1e-9 are left out, however they are rounded."""
    generator = torch.Generator().manual_seed(1)
    first = torch.randn(16, 16, generator=generator).double()
    second = first + 1e-9 * torch.randn(16, 16, generator=generator).double()
    basis = basis_of(torch.cat([first, second]))
    found = select(basis, 4)
    assert found is not None
    assert {int(block) % 4 for block in found.order[:4]} == {0, 1, 2, 3}
    assert found.coefficients.abs().max() < 10
