"""The weights of the next block are read from the disk while a block runs."""

import ctypes
import mmap
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from lrc_cli.checkpoint.source import open_source
from lrc_cli.execution import readahead
from lrc_cli.execution.chain import find_chain, segments_of
from lrc_cli.execution.network import make_network
from lrc_cli.execution.readahead import read_ahead
from lrc_cli.execution.walk import Walk
from lrc_cli.network.opening import open_module

MB = 1 << 20


def mapped(file: Path) -> nn.Module:
    """Returns a module whose only parameter, of 16 MB, is a view of the mapped file."""
    save_file({"weight": torch.randn(16 * MB // 4)}, file)
    with file.open("rb") as handle:
        os.fsync(handle.fileno())
    module = nn.Module()
    with safe_open(file, framework="pt") as handle:
        module.weight = nn.Parameter(handle.get_tensor("weight"), requires_grad=False)
    return module


def forget(file: Path) -> None:
    """Drops the file's pages that the system holds in memory."""
    with file.open("rb") as handle:
        os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def resident(tensor: torch.Tensor) -> float:
    """Returns the share of a mapped tensor's pages that are in memory, and touches no page."""
    start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    size = tensor.data_ptr() + tensor.nbytes - start
    pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    mincore = ctypes.CDLL(None, use_errno=True).mincore
    mincore.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p
    assert mincore(start, size, pages) == 0, os.strerror(ctypes.get_errno())
    return sum(page & 1 for page in pages) / len(pages)


def test_mapped_parameters_come_into_memory_untouched(tmp_path: Path) -> None:
    """On a file system in memory the pages never leave it."""
    file = tmp_path / "model.safetensors"
    module = mapped(file)
    forget(file)
    read_ahead(module)
    end = time.monotonic() + 30
    while resident(module.weight) < 0.99 and time.monotonic() < end:
        time.sleep(0.05)
    assert resident(module.weight) >= 0.99


def test_parameters_without_a_file_are_left_as_they_are() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 0), nn.Linear(2, 2, device="meta"))
    before = module[0].weight.clone()
    read_ahead(module)
    assert torch.equal(module[0].weight, before)


def test_a_system_without_the_call_reads_when_it_touches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    readahead._advise.cache_clear()
    read_ahead(nn.Linear(3, 3))
    readahead._advise.cache_clear()


def test_a_block_asks_for_those_beside_it_once(
    checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, _ = open_module(open_source(checkpoint("llama")), factory=None)
    network = make_network(module, device=torch.device("cpu"), dtype=None)
    batch = {"input_ids": torch.zeros(1, 4, dtype=torch.int64)}
    chain = find_chain(network, batch)
    asked: list[Any] = []
    monkeypatch.setattr("lrc_cli.execution.walk.read_ahead", asked.append)
    walk = Walk(network, chain, [batch, batch])
    for segment in segments_of(network, chain, [], batch):
        walk.advance(segment)
    blocks = [network.module.get_submodule(name) for name in chain.names]
    assert len(blocks) > 1
    wanted = []
    for i in range(len(blocks)):
        wanted += [*blocks[max(i - 1, 0) : i], *blocks[i + 1 : i + 2]]
    assert asked == wanted
