"""These tests compare the pass by segments with one pass of the whole network."""

import gc
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from families import FAMILIES
from moments_helpers import assert_close, by_autograd, measured, opened, padded_tokens
from pico import Models
from torch import Tensor, nn

from lrc_cli.execution.chain import Chain, segments_of
from lrc_cli.execution.losses import Loss
from lrc_cli.execution.network import Network, make_network
from lrc_cli.execution.segments import find_segments
from lrc_cli.job.statistics.moments import GramSum
from lrc_cli.job.work import STATISTICS, WorkDirectory
from lrc_cli.network.keys import Keys
from lrc_cli.network.layer import Layer

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("llama", "next_token"),
        ("llama", "output"),
        ("bert-mlm", "masked_token"),
        ("bert-classifier", "sampled"),
        ("bert", "output"),
    ],
)
def test_streamed_moments_equal_those_of_the_whole_network(
    name: str, kind: str, checkpoint: Models
) -> None:
    """The case has padding, several probes, a smaller last micro-batch, layers in head and tail."""
    module, layers = opened(checkpoint(name), exclude=())
    network = make_network(module, device=CPU, dtype=torch.float32)
    loss = Loss(kind=kind, mask_token=pico.SPECIAL.index("[MASK]"))
    inputs = padded_tokens(rows=7, length=9)
    expected = by_autograd(network, layers, inputs, loss, 3)
    found = measured(network, layers, inputs, loss, 3)
    assert_close(found[0], expected[0], 1e-6)
    assert_close(found[1], expected[1], 1e-5)


def test_gradients_come_whatever_the_caller_has_set(checkpoint: Models) -> None:
    module, layers = opened(checkpoint("llama"), exclude=())
    network = make_network(module, device=CPU, dtype=torch.float32)
    inputs = padded_tokens(rows=3, length=9)
    expected = measured(network, layers, inputs, Loss(kind="next_token"), 3)
    with torch.no_grad():
        found = measured(network, layers, inputs, Loss(kind="next_token"), 3)
    assert expected[1] and found[1].keys() == expected[1].keys()
    assert_close(found[1], expected[1], 1e-9)


@pytest.mark.parametrize(("name", "kind"), [("mixtral", "next_token"), ("resnet", "output")])
def test_experts_and_convolutions_are_measured_block_by_block(
    name: str, kind: str, tmp_path: Path
) -> None:
    """Experts that the first sequence misses are measured too."""
    family = FAMILIES[name]
    model = family.build()
    pico.randomise(model)
    model.save_pretrained(tmp_path)
    module, layers = opened(tmp_path, exclude=())
    network = make_network(module, device=CPU, dtype=torch.float32)
    inputs = {key: tensor[:7].clone() for key, tensor in family.inputs.items()}
    if name == "mixtral":
        inputs["input_ids"][0] = 7  # a sequence of one repeated token makes one choice of experts
    first = {key: tensor[:1] for key, tensor in inputs.items()}
    (reached,) = segments_of(network, Chain(), layers, first)
    assert (len(reached.layers) < len(layers)) == (name == "mixtral")
    assert find_segments(network, layers, {x.name for x in layers}, first).reason == ""
    loss = Loss(kind=kind)
    expected = by_autograd(network, layers, inputs, loss, 3)
    found = measured(network, layers, inputs, loss, 3)
    assert_close(found[0], expected[0], 1e-6)
    assert_close(found[1], expected[1], 1e-5)


class Blocks(nn.Module):
    """A network of a head, three blocks and a tail; `way` adds another connection."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.first = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.last = nn.Linear(8, 4)
        self.aside = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = start = torch.tanh(self.first(x))
        if self.way == "twice":
            x = self.aside(x)
        for block in self.blocks:
            x = block(torch.relu(x) if self.way == "between" else x)
        if self.way == "twice":
            x = self.aside(x)
        if self.way == "skipped":
            x = x + start
        return torch.tanh(self.last(x))


def plain(way: str) -> tuple[Network, list[Layer]]:
    torch.manual_seed(0)
    module = Blocks(way)
    layers = [
        Layer(
            name=name,
            keys=Keys(f"{name}.weight"),
            kind="Linear",
            shape=(part.out_features, part.in_features),
            dtype=torch.float32,
            unit=name if name.startswith("blocks") else "",
        )
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear) and (name != "aside" or way == "twice")
    ]
    return make_network(module, device=CPU, dtype=None), layers


@pytest.mark.parametrize(
    ("way", "reason"),
    [
        ("chain", ""),
        ("skipped", "goes round"),
        ("twice", "aside runs in 2 of its segments"),
        ("between", "no chain"),
    ],
)
@pytest.mark.parametrize("kind", ["output", "sampled", None])
def test_plain_networks_are_cut_only_where_nothing_is_lost(
    way: str, reason: str, kind: str | None
) -> None:
    """The moments are the same for every cut. Layers of head and tail are included."""
    network, layers = plain(way)
    inputs = {"x": torch.randn(20, 5, 8, generator=torch.Generator().manual_seed(1))}
    loss = None if kind is None else Loss(kind=kind)
    graded = {layer.name for layer in layers} if loss else set()
    segmentation = find_segments(network, layers, graded, {"x": inputs["x"][:1]})
    if way != "skipped" or loss:
        assert reason in segmentation.reason and bool(segmentation.reason) == bool(reason)
    assert len(segmentation.segments) == (1 if segmentation.reason else 5)
    expected = by_autograd(network, layers, inputs, loss or Loss(kind="output"), 8)
    found = measured(network, layers, inputs, loss, 8)
    assert_close(found[0], expected[0], 1e-6)
    if loss:
        assert_close(found[1], expected[1], 1e-5)


def num_sums() -> int:
    """Returns how many sums are alive; the traces of earlier tests may hold some."""
    gc.collect()
    return sum(type(x) is GramSum for x in gc.get_objects())


def test_gram_matrices_leave_memory_with_their_block(
    tmp_path: Path, checkpoint: Models, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever a unit is stored, no more moments are alive than a single block has."""
    alive: list[int] = []
    put, before = WorkDirectory.put, num_sums()

    def counting(self: WorkDirectory, stage: str, *rest: Any) -> None:
        if stage == STATISTICS:
            alive.append(num_sums() - before)
        put(self, stage, *rest)

    monkeypatch.setattr(WorkDirectory, "put", counting)
    changes = {"model.path": str(checkpoint("llama-long")), "calibration.path": str(text)}
    pico.compressed(tmp_path, changes)
    assert alive == [4 + 7] * 12, "inputs of four groups and output gradients of seven layers"


def test_only_some_layers_measured_are_measured_the_same(checkpoint: Models) -> None:
    """Gradients are taken no further than the first layer that needs them."""
    module, layers = opened(checkpoint("llama-long"))
    network = make_network(module, device=CPU, dtype=torch.float32)
    chosen = [x for x in layers if x.unit in ("model.layers.3", "model.layers.8")]
    inputs, loss = padded_tokens(rows=5), Loss(kind="next_token")
    every, some = (measured(network, x, inputs, loss, 2) for x in (layers, chosen))
    for all_of_kind, some_of_kind in zip(every, some, strict=True):
        assert set(some_of_kind) == {layer.name for layer in chosen}
        assert_close(some_of_kind, {name: all_of_kind[name] for name in some_of_kind}, 1e-6)


def test_layers_that_read_one_tensor_share_a_leader_within_their_segment(
    checkpoint: Models,
) -> None:
    module, layers = opened(checkpoint("llama"))
    network = make_network(module, device=CPU, dtype=torch.float32)
    batch = {"input_ids": torch.ones(1, 4, dtype=torch.long)}
    segmentation = find_segments(network, layers, (), batch)
    for layer in layers:
        stem, _, leaf = layer.name.rpartition(".")
        leader = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}.get(leaf, leaf)
        assert segmentation.leaders[layer.name] == f"{stem}.{leader}"
