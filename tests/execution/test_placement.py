"""These tests show on the meta device which parameters are copied: placement only, no numbers."""

import operator
from typing import Any

import torch
from torch import Tensor, nn

from lrc_cli.execution.network import make_network
from lrc_cli.execution.placement import Placement, block_names

META = torch.device("meta")


class Tied(nn.Module):
    """Blocks between an embedding and a head that share their table; a scale shared by all."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 4)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.small = nn.ModuleList([nn.Linear(4, 1)])
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.table.weight
        self.blocks[2].bias = self.blocks[1].bias
        self.register_buffer("shift", torch.ones(4))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids) + self.shift
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_the_blocks_are_the_largest_list() -> None:
    assert block_names(Tied()) == ("blocks.0", "blocks.1", "blocks.2")
    assert block_names(nn.Sequential(nn.Linear(2, 2))) == ()


def test_one_block_at_a_time_is_copied_to_the_device() -> None:
    module = Tied()
    originals = {name: p for name, p in module.named_parameters()}
    network = make_network(module, device=META, dtype=None)
    there: list[set[str]] = []

    def look(*_: Any) -> None:
        there.append({n for n, p in module.named_parameters() if p.is_meta and "blocks" in n})

    for block in module.blocks:
        block.register_forward_hook(look)
    output = network({"ids": torch.tensor([[0, 1, 2]])})
    assert output.is_meta and output.shape == (1, 3, 6)
    # blocks.1 and blocks.2 share a bias, which is copied with each block.
    assert there == [
        {"blocks.0.weight", "blocks.0.bias"},
        {"blocks.1.weight", "blocks.1.bias"},
        {"blocks.2.weight", "blocks.2.bias"},
    ]
    assert module.head.weight is module.table.weight and module.table.weight.is_meta
    assert module.shift.is_meta
    network.placement.occupy("head")
    assert module.blocks[2].weight.is_meta
    network.placement.occupy("blocks.0.weight")  # a part stands for its block
    assert module.blocks[0].weight.is_meta
    for name, parameter in module.named_parameters():
        if name.startswith(("blocks.1", "blocks.2")):
            assert parameter is originals[name]


def test_blocks_that_hand_their_input_on_stay_where_they_are() -> None:
    module = Tied()
    network = make_network(module, device=META, dtype=None)
    for block in module.blocks:
        vars(block)["forward"] = lambda x: x
    network({"ids": torch.tensor([[0]])})
    assert not any(p.is_meta for p in module.blocks.parameters())


def test_a_new_part_of_a_block_comes_and_goes_with_it() -> None:
    module = Tied()
    network = make_network(module, device=META, dtype=None)
    network.placement.occupy("blocks.1")
    new = nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False))
    weights = list(new.parameters())
    network.placement.adopt(new.requires_grad_(False), "blocks.1.projection")
    module.blocks[1] = new
    for name, is_there in (("blocks.1", True), ("blocks.0", False)):
        network.placement.occupy(name)
        assert all(p.is_meta == is_there for p in new.parameters())
    assert all(map(operator.is_, new.parameters(), weights))


def test_on_a_cpu_nothing_is_copied() -> None:
    module = Tied()
    originals = [p.data_ptr() for p in module.parameters()]
    placement = Placement(module, torch.device("cpu"))
    placement.occupy("blocks.1")
    module(torch.tensor([[0, 1]]))
    assert [p.data_ptr() for p in module.parameters()] == originals
    assert not any(block._forward_pre_hooks for block in module.blocks)
