"""These tests show which chains are found, and that a walk through segments changes nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import hf_helpers
import pytest
import torch
from pico import Models
from safetensors.torch import save_file
from torch import Tensor, nn

from lrc_cli.checkpoint.source import open_source
from lrc_cli.config import Compression
from lrc_cli.data.draw import Batch
from lrc_cli.execution.chain import (
    HEAD,
    TAIL,
    WHOLE,
    Chain,
    Segment,
    StopForward,
    find_chain,
    segments_of,
)
from lrc_cli.execution.hooks import hooked
from lrc_cli.execution.network import Network, make_network
from lrc_cli.execution.outputs import floating_outputs
from lrc_cli.execution.walk import Walk
from lrc_cli.network.candidates.find import find_layers
from lrc_cli.network.layer import Layer
from lrc_cli.network.opening import open_module

NAMES = ["llama", "qwen2", "gpt2", "bert", "bert-mlm", "bert-classifier"]
PREFIXES = {"llama": "model.layers", "qwen2": "model.layers", "gpt2": "transformer.h"}
PREFIXES |= {"bert": "encoder.layer"}
PREFIXES |= dict.fromkeys(["bert-mlm", "bert-classifier"], "bert.encoder.layer")


class Opened:
    """A network with its layers, data and segments."""

    def __init__(self, path: Path, batches: list[Batch], factory: str | None = None) -> None:
        source = open_source(path)
        module, source = open_module(source, factory=factory)
        self.layers, _ = find_layers(module, source, Compression(size=0.5, exclude=()))
        device = torch.device("cpu")
        self.network: Network = make_network(module, device=device, dtype=torch.float32)
        self.batches = batches
        self.chain: Chain = find_chain(self.network, batches[0])
        self.segments = segments_of(self.network, self.chain, self.layers, batches[0])

    def walk(self) -> Walk:
        return Walk(self.network, self.chain, self.batches)


@pytest.fixture(scope="module")
def opened(checkpoint: Models, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Opened]:
    found: dict[str, Opened] = {}

    def open_(name: str) -> Opened:
        if name not in found:
            path = tmp_path_factory.mktemp(name)
            if name == "gpt2":
                torch.manual_seed(0)
                hf_helpers.MODELS["gpt2"]().save_pretrained(path)
            else:
                path = checkpoint(name)
            found[name] = Opened(path, tokens(masked="bert" in name))
        return found[name]

    return open_


def tokens(*, masked: bool) -> list[Batch]:
    """Returns three micro-batches of random ids, the last micro-batch smaller, padded if masked."""
    generator = torch.Generator().manual_seed(3)
    batches: list[Batch] = []
    for size in (3, 3, 2):
        batch = {"input_ids": torch.randint(5, 60, (size, 12), generator=generator)}
        if masked:
            lengths = torch.randint(4, 13, (size, 1), generator=generator)
            batch["attention_mask"] = (torch.arange(12)[None] < lengths).long()
        batches.append(batch)
    return batches


@pytest.mark.parametrize("name", NAMES)
def test_the_blocks_of_a_transformer_are_a_chain(name: str, opened: Any) -> None:
    given = opened(name)
    assert given.chain.names == tuple(f"{PREFIXES[name]}.{i}" for i in range(2))
    names = [segment.name for segment in given.segments]
    assert names == [HEAD, *given.chain.names, TAIL]


@pytest.mark.parametrize("name", NAMES)
def test_every_layer_is_in_the_segment_in_which_it_runs(name: str, opened: Any) -> None:
    given = opened(name)
    placed = {x.name: s.name for s in given.segments for x in s.layers}
    assert sorted(placed) == sorted(layer.name for layer in given.layers)
    for layer, segment in placed.items():
        blocks = [block for block in given.chain.names if layer.startswith(f"{block}.")]
        assert segment == (blocks[0] if blocks else TAIL)
    walk, ran = given.walk(), []
    for segment in given.segments:
        with hooked(given.network, given.layers, lambda x, *_: ran.append(x.name)):
            walk.run(segment, 0)
        assert ran == [layer.name for layer in segment.layers], "in the order in which they run"
        walk.advance(segment)
        ran.clear()


@pytest.mark.parametrize("name", NAMES)
def test_a_walk_computes_what_the_network_computes(name: str, opened: Any) -> None:
    """Every layer's input and the outputs are the same, bit by bit."""
    given = opened(name)
    whole = inputs(given, lambda index: given.network(given.batches[index]))
    walk, outputs, parts = given.walk(), [], {}
    for segment in given.segments:
        seen = inputs(given, lambda index, s=segment: walk.run(s, index), segment)
        parts |= {key: tensor for key, tensor in seen.items() if key not in parts}
        outputs = [walk.run(segment, index) for index in range(len(given.batches))]
        for index, output in enumerate(outputs):
            walk.pass_on(segment, index, output)
    assert set(parts) == set(whole)
    assert all(torch.equal(parts[key], whole[key]) for key in whole)
    with torch.no_grad():
        for batch, output in zip(given.batches, outputs, strict=True):
            expected = floating_outputs(given.network(batch))
            assert expected and len(expected) == len(floating_outputs(output))
            assert all(map(torch.equal, expected, floating_outputs(output)))


def inputs(
    given: Opened, run: Callable[[int], Any], segment: Segment | None = None
) -> dict[tuple[str, int], Tensor]:
    """Returns what the layers read, by layer and micro-batch."""
    seen: dict[tuple[str, int], Tensor] = {}
    layers: list[Layer] = given.layers if segment is None else segment.layers
    for index in range(len(given.batches)):

        def look(layer: Layer, x: Tensor, _: Tensor, index: int = index) -> None:
            seen[layer.name, index] = x.clone()

        with torch.no_grad(), hooked(given.network, layers, look):
            run(index)
    return seen


@pytest.mark.parametrize("name", NAMES)
def test_a_segment_can_stop_early_and_run_again(name: str, opened: Any) -> None:
    given = opened(name)

    def stop(*_: Any) -> None:
        raise StopForward

    walk, outputs = given.walk(), []
    for segment in given.segments:
        for layer in segment.layers:
            with hooked(given.network, [layer], stop):
                assert walk.run(segment, 1) is None
        outputs = [walk.run(segment, index) for index in range(3)]
        walk.advance(segment)
    with torch.no_grad():
        expected = floating_outputs(given.network(given.batches[1]))
    assert all(map(torch.equal, expected, floating_outputs(outputs[1])))
    assert not any("forward" in vars(part) for part in blocks_of(given)), "patches are left behind"


def blocks_of(given: Opened) -> list[nn.Module]:
    return [given.network.module.get_submodule(name) for name in given.chain.names]


FACTORIES = '''
import torch
from torch import nn


class Blocks(nn.Module):
    """Blocks in a list; `way` says how they are wired."""

    def __init__(self, way):
        super().__init__()
        self.way, self.first = way, nn.Linear(8, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.last = nn.Linear(8, 4)

    def forward(self, x):
        x = start = torch.tanh(self.first(x))
        seen = []
        for block in reversed(self.blocks) if self.way == "backwards" else self.blocks:
            x = block(x)
            if self.way == "between":
                x = torch.tanh(x)
            seen.append(x)
        if self.way == "collected":
            x = sum(seen)
        if self.way == "skipped":
            x = x + start
        if self.way == "twice":
            x = self.blocks[0](x)
        return self.last(x)


def chain():
    return Blocks("chain")


def skipped():
    return Blocks("skipped")


def between():
    return Blocks("between")


def collected():
    return Blocks("collected")


def backwards():
    return Blocks("backwards")


def twice():
    return Blocks("twice")


def mlp():
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
'''


@pytest.fixture
def plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Opened]:
    (tmp_path / "block_factories.py").write_text(FACTORIES)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)

    def open_(name: str) -> Opened:
        namespace: dict[str, Any] = {}
        exec(FACTORIES, namespace)
        torch.manual_seed(0)
        save_file(namespace[name]().state_dict(), tmp_path / f"{name}.safetensors")
        data = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(2))
        batches = [{"x": rows} for rows in data]
        return Opened(tmp_path / f"{name}.safetensors", batches, f"block_factories:{name}")

    return open_


@pytest.mark.parametrize("name", ["chain", "skipped"])
def test_a_plain_list_of_blocks_is_a_chain(name: str, plain: Callable[[str], Opened]) -> None:
    """The head's output may go round the blocks: the tail computes it again."""
    given = plain(name)
    assert given.chain.names == ("blocks.0", "blocks.1", "blocks.2")
    found = {segment.name: [x.name for x in segment.layers] for segment in given.segments}
    assert found == {
        HEAD: ["first"],
        "blocks.0": ["blocks.0"],
        "blocks.1": ["blocks.1"],
        "blocks.2": ["blocks.2"],
        TAIL: ["last"],
    }
    check_walk(given)


@pytest.mark.parametrize("name", ["between", "collected", "backwards", "twice", "mlp"])
def test_a_network_without_a_chain_runs_whole(name: str, plain: Callable[[str], Opened]) -> None:
    given = plain(name)
    assert given.chain.names == ()
    (segment,) = given.segments
    assert segment.name == WHOLE and {x.name for x in segment.layers} == {
        x.name for x in given.layers
    }
    check_walk(given)


def check_walk(given: Opened) -> None:
    walk, outputs = given.walk(), []
    for segment in given.segments:
        outputs = [walk.run(segment, index) for index in range(3)]
        walk.advance(segment)
    with torch.no_grad():
        for batch, output in zip(given.batches, outputs, strict=True):
            assert torch.equal(output, given.network(batch))


def test_two_networks_of_one_structure_share_the_chain(opened: Any, checkpoint: Models) -> None:
    """The dense and the compressed network share a chain: each keeps separate hidden states."""
    given = opened("qwen2")
    other = Opened(checkpoint("qwen2"), given.batches).network
    with torch.no_grad():
        part = other.module.get_submodule("model.layers.0.self_attn.o_proj")
        part.weight = nn.Parameter(torch.zeros_like(part.weight), requires_grad=False)
    walks, outputs = [given.walk(), Walk(other, given.chain, given.batches)], []
    for segment in given.segments:
        outputs = [walk.run(segment, 0).logits if segment.name == TAIL else None for walk in walks]
        for walk in walks:
            walk.advance(segment)
    with torch.no_grad():
        for output, network in zip(outputs, (given.network, other), strict=True):
            assert torch.equal(output, network(given.batches[0]).logits)
    assert not torch.equal(*outputs)


def test_what_blocks_are_given_beside_hidden_states_is_kept_as_these_are(opened: Any) -> None:
    """Masks and positions of every micro-batch count towards runtime.memory_limit too."""
    given, kept = opened("bert"), list[tuple[int, ...]]()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tuple(tensor.shape))
        return tensor.detach().clone()

    walk = Walk(given.network, given.chain, given.batches, keep)
    for segment in given.segments:
        outputs = [walk.run(segment, index) for index in range(3)]
        walk.advance(segment)
    hidden = [shape for shape in kept if len(shape) == 3]
    assert len(hidden) == 3 * (len(given.segments) - 1)
    assert len(kept) > len(hidden), "the masks of padded sequences"
    with torch.no_grad():
        for batch, output in zip(given.batches, outputs, strict=True):
            for a, b in zip(*map(floating_outputs, (output, given.network(batch))), strict=True):
                torch.testing.assert_close(a, b)
