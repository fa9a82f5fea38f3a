"""Tensors between two segments stay in memory up to a limit, and beyond it in files."""

import resource
from pathlib import Path

import pytest
import torch

from lrc_cli.errors import RunError
from lrc_cli.runtime.spill import HostMemory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("limit", [None, 0, 100, 10_000])
def test_what_is_kept_comes_back_the_same(
    limit: int | None, dtype: torch.dtype, tmp_path: Path
) -> None:
    memory = HostMemory(limit, tmp_path)
    given = [torch.randn(3, 8).to(dtype) for _ in range(5)]
    kept = [memory.keep(tensor) for tensor in given]
    assert all(map(torch.equal, given, kept))
    assert limit is None or memory.held <= limit
    size = given[0].nbytes
    assert memory.held == size * (5 if limit is None else min(5, limit // size))
    assert not list(tmp_path.iterdir()), "its files have no names"


def test_the_limit_is_for_what_is_held_now(tmp_path: Path) -> None:
    memory = HostMemory(100, tmp_path)
    for _ in range(20):
        kept = memory.keep(torch.ones(5, 4))
        assert memory.held == 80
        del kept
        assert memory.held == 0


def test_a_part_of_a_tensor_does_not_keep_the_whole(tmp_path: Path) -> None:
    memory = HostMemory(None, tmp_path)
    large = torch.randn(100, 10)
    kept = memory.keep(large[:, :2])
    assert torch.equal(kept, large[:, :2]) and kept.untyped_storage().nbytes() == 100 * 2 * 4


def test_what_is_kept_may_be_written_to_and_follows_no_gradient(tmp_path: Path) -> None:
    for limit in (None, 0):
        kept = HostMemory(limit, tmp_path).keep(torch.ones(4, requires_grad=True))
        kept += 1
        assert not kept.requires_grad and kept.tolist() == [2] * 4


def test_a_missing_directory_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="activations cannot be written"):
        HostMemory(0, tmp_path / "gone").keep(torch.ones(4))


def test_more_tensors_than_files_may_be_open_are_kept(tmp_path: Path) -> None:
    memory, before = HostMemory(0, tmp_path), resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, before[1]))
    try:
        kept = [memory.keep(torch.full((4,), i, dtype=torch.bfloat16)) for i in range(150)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert [int(tensor[0]) for tensor in kept] == list(range(150))


def test_tensors_are_held_in_one_file_at_aligned_places(tmp_path: Path) -> None:
    given = {
        "weight": torch.randn(3, 5).to(torch.bfloat16),
        "perm": torch.arange(7, dtype=torch.int32),
        "bias": torch.randn(4),
        "none": torch.zeros(0, 3),
    }
    memory = HostMemory(None, tmp_path)
    held = memory.hold(given)
    assert held.keys() == given.keys() and memory.held == 0
    for name, tensor in held.items():
        assert torch.equal(tensor, given[name]) and tensor.dtype == given[name].dtype
        assert tensor.data_ptr() % 64 == 0
    assert not list(tmp_path.iterdir())
