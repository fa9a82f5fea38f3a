"""A tail that runs on a few positions at a time gives what it gives on all of them."""

import copy
from typing import Any

import pytest
import torch
from families import FAMILIES, Family
from moments_helpers import measured, sequences
from torch import Tensor, nn

from lrc_cli.data.padding import masks_of
from lrc_cli.execution import tail as tails
from lrc_cli.execution.chain import TAIL, Chain, Segment, find_chain
from lrc_cli.execution.losses import Loss
from lrc_cli.execution.network import Network, make_network
from lrc_cli.execution.outputs import floating_outputs
from lrc_cli.execution.tail import EVERYTHING, WHOLE_TAIL, Part, Tail
from lrc_cli.execution.walk import Walk
from lrc_cli.network.keys import Keys
from lrc_cli.network.layer import Layer
from lrc_cli.quality.compare import compare
from lrc_cli.quality.held_out import measure

POSITION = 4 * 64
"""The bytes of the logits of a position, over the vocabulary of the pico models."""
FEW = (5, 30)
"""How many positions run at once: of sequences of 12 tokens less than one, and more."""
DECODERS = ("llama-tied", "gemma2", "gemma3-tied", "gpt2", "gpt-neox", "bloom", "opt", "mixtral")
HEADED = (*DECODERS, "bert-masked", "bart-headed", "marian", "whisper-headed")
POOLED = ("bert-classifier", "roberta", "vit", "clip", "resnet", "convnext")


def network_of(name: str) -> Network:
    module = FAMILIES[name].build()
    return make_network(module, device=torch.device("cpu"), dtype=torch.float32)


def inputs_of(family: Family, rows: int = 4) -> dict[str, Tensor]:
    """Returns a few sequences of unequal lengths, where the family takes a mask for them."""
    inputs = {name: tensor[:rows] for name, tensor in family.inputs.items()}
    if set(inputs) == {"input_ids"}:
        lengths = torch.tensor([12, 7, 12, 3])[:rows, None]
        inputs["attention_mask"] = (torch.arange(12)[None] < lengths).long()
    return inputs


def linear_layers(network: Network, *ends: str) -> list[Layer]:
    return [
        Layer(
            name=path,
            kind="Linear",
            shape=tuple(part.weight.shape),
            dtype=part.weight.dtype,
            keys=Keys(f"{path}.weight"),
            unit="",
        )
        for path, part in network.module.named_modules()
        if isinstance(part, nn.Linear) and path.endswith(ends)
    ]


def changed(network: Network) -> Network:
    """Returns the network with other weights in its linear layers."""
    module = copy.deepcopy(network.module)
    torch.manual_seed(1)
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.Linear):
                part.weight += 0.02 * torch.randn_like(part.weight)
    return make_network(module, device=torch.device("cpu"), dtype=torch.float32)


def assert_alike(found: Tensor, wanted: Tensor) -> None:
    assert found.shape == wanted.shape
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.fixture
def positions(monkeypatch: pytest.MonkeyPatch) -> Any:
    def at_once(number: int | None) -> None:
        number = 10**9 if number is None else number
        monkeypatch.setattr(tails, "OUTPUT_BYTES", number * POSITION)

    return at_once


def outputs_of(walk: Walk, chain: Chain, index: int) -> tuple[list[Part], list[Tensor]]:
    """Returns the parts of the tail's run, and the first output of each."""
    parts = walk.parts(Segment(name=TAIL, layers=[]), index)
    with torch.no_grad():
        for name in chain.segments:
            segment = Segment(name=name, layers=[])
            if name != TAIL:
                walk.pass_on(segment, index, walk.run(segment, index))
                continue
            outputs = [floating_outputs(walk.run(segment, index, part=part)) for part in parts]
    return parts, [first for first, *_ in outputs]


@pytest.mark.parametrize("name", HEADED)
@pytest.mark.parametrize("number", [1, *FEW])
def test_a_head_is_cut_and_gives_the_same_logits(name: str, number: int, positions: Any) -> None:
    network, inputs = network_of(name), inputs_of(FAMILIES[name])
    positions(number)
    chain = find_chain(network, {key: x[:1] for key, x in inputs.items()})
    assert chain.tail.position_bytes == POSITION
    with torch.no_grad():
        whole = network(inputs).logits
    parts, outputs = outputs_of(Walk(network, chain, [inputs]), chain, 0)
    assert len(parts) > 1
    found = torch.full_like(whole, torch.nan)
    for part, logits in zip(parts, outputs, strict=True):
        assert logits[..., 0].numel() <= max(number, 1)
        part.of(found).copy_(logits)
    torch.testing.assert_close(found, whole)


@pytest.mark.parametrize("name", HEADED)
def test_what_fits_runs_whole(name: str, positions: Any) -> None:
    network, inputs = network_of(name), inputs_of(FAMILIES[name])
    positions(None)
    chain = find_chain(network, {key: x[:1] for key, x in inputs.items()})
    assert chain.names and chain.tail == WHOLE_TAIL
    assert chain.tail.parts(inputs) == [EVERYTHING]


@pytest.mark.parametrize("name", POOLED)
def test_outputs_without_an_entry_for_every_token_stay_whole(name: str, positions: Any) -> None:
    network, inputs = network_of(name), inputs_of(FAMILIES[name])
    positions(1)
    assert find_chain(network, {key: x[:1] for key, x in inputs.items()}).tail == WHOLE_TAIL


class Odd(nn.Module):
    """Blocks between a table and a head, with something in between that a test asks for."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.embed = nn.Embedding(64, 16)
        self.places = nn.Parameter(torch.randn(12, 16))
        self.blocks = nn.ModuleList([nn.Linear(16, 16) for _ in range(2)])
        self.mixing = nn.Conv1d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 64)

    def forward(self, input_ids: Tensor) -> Tensor:
        embedded = x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        if self.kind == "centred":
            x = x - 0.1 * x.mean(dim=1, keepdim=True)
        if self.kind == "convolved":
            x = x + 0.01 * self.mixing(x.mT).mT
        if self.kind == "placed":
            x = x + 0.01 * self.places[: x.shape[1]]
        if self.kind == "all places":
            x = x + self.places
        if self.kind == "last only":
            x = x[:, -1:]
        if self.kind == "reversed":
            x = x.flip(1)
        if self.kind == "whole inputs":
            assert input_ids.shape[1] == 12
        if self.kind == "skipped":
            x = x + embedded
        y = self.head(x)
        return y.mT if self.kind == "turned" else y


@pytest.mark.parametrize("kind", ["plain", "whole inputs", "skipped"])
def test_a_tail_that_takes_each_position_by_itself_is_cut(kind: str, positions: Any) -> None:
    network = make_network(Odd(kind), device=torch.device("cpu"), dtype=torch.float32)
    inputs = {"input_ids": FAMILIES["llama"].inputs["input_ids"][:4]}
    positions(5)
    chain = find_chain(network, {"input_ids": inputs["input_ids"][:1]})
    assert chain.tail == Tail(position_bytes=POSITION, cuts_inputs=kind != "whole inputs")
    with torch.no_grad():
        whole = network(inputs)
    parts, outputs = outputs_of(Walk(network, chain, [inputs]), chain, 0)
    for part, output in zip(parts, outputs, strict=True):
        torch.testing.assert_close(output, part.of(whole))


@pytest.mark.parametrize(
    "kind",
    ["centred", "convolved", "placed", "all places", "last only", "reversed", "turned"],
)
def test_a_tail_that_mixes_positions_runs_whole(kind: str, positions: Any) -> None:
    network = make_network(Odd(kind), device=torch.device("cpu"), dtype=torch.float32)
    positions(5)
    chain = find_chain(network, {"input_ids": FAMILIES["llama"].inputs["input_ids"][:1]})
    assert chain.names and chain.tail == WHOLE_TAIL


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert-masked"])
@pytest.mark.parametrize("kind", ["next_token", "masked_token"])
@pytest.mark.parametrize("number", FEW)
def test_statistics_are_the_same(name: str, kind: str, number: int, positions: Any) -> None:
    """The head is measured, too, so its rows of padding must be told apart part by part."""
    network, inputs = network_of(name), inputs_of(FAMILIES[name])
    tied = FAMILIES[name].settings["tie_word_embeddings"]
    layers = linear_layers(network, "o_proj", "dense", *([] if tied else ["lm_head"]))
    layers = layers or linear_layers(network, "lm_head")
    loss, found = Loss(kind=kind, mask_token=3), []
    for at_once in (None, number):
        positions(at_once)
        found.append(measured(network, layers, inputs, loss, 3))
    for whole, cut in zip(*found, strict=True):
        assert set(whole) == set(cut) and whole
        for layer, matrix in whole.items():
            assert_alike(cut[layer], matrix)


@pytest.mark.parametrize("kind", ["sampled", "output"])
def test_drawn_labels_and_probes_are_as_many(kind: str, positions: Any) -> None:
    """They are drawn part by part, so they are others; their mean is the same."""
    network, inputs = network_of("llama"), inputs_of(FAMILIES["llama"])
    layers, found = linear_layers(network, "lm_head"), []
    for at_once in (None, 5):
        positions(at_once)
        grams, fishers = measured(network, layers, inputs, Loss(kind=kind), 3)
        found.append((grams["lm_head"], fishers["lm_head"].trace()))
    (whole, first), (cut, second) = found
    assert_alike(cut, whole)
    torch.testing.assert_close(second, first, rtol=0.1, atol=0)


@pytest.mark.parametrize("name", [*HEADED, "bert", "bert-classifier"])
@pytest.mark.parametrize("number", FEW)
def test_scores_and_certified_values_are_the_same(name: str, number: int, positions: Any) -> None:
    before, inputs = network_of(name), inputs_of(FAMILIES[name])
    after = changed(before)
    given = sequences(inputs)
    kind = "masked_token" if name == "bert-masked" else "next_token"
    loss = Loss(kind=kind if name in HEADED else "output", mask_token=3)
    layers = linear_layers(before, "lm_head", "o_proj", "dense", "fc2", "out_proj")
    found = []
    for at_once in (None, number):
        positions(at_once)
        scores = compare(before, after, given, loss=loss, seed=0)
        values = measure(before, after, given, layers, loss=loss, seed=0)
        numbers = {k: x for k, x in scores.to_json().items() if isinstance(x, int | float)}
        found.append((numbers, values))
    (whole, values), (cut, cut_values) = found
    assert cut == pytest.approx(whole, rel=1e-4, abs=1e-6)
    assert set(cut_values.values) == set(values.values) and values.values
    for quantity, numbers in values.values.items():
        assert cut_values.values[quantity] == pytest.approx(numbers, rel=1e-4, abs=1e-6)
    assert set(cut_values.layers) == set(values.layers)
    assert bool(values.layers) is bool(layers)
    for layer, errors in values.layers.items():
        for what in ("energy", "deployed", "inherited", "new", "same_input"):
            assert_alike(getattr(cut_values.layers[layer], what), getattr(errors, what))


def test_a_part_has_the_inputs_and_masks_of_its_own_tokens() -> None:
    ids, mask = torch.arange(24).view(2, 12), torch.ones(2, 12, dtype=torch.long)
    batch = {
        "input_ids": torch.zeros(2, 7),
        "decoder_input_ids": ids,
        "attention_mask": mask[:, :7],
    }
    part = Part(rows=slice(1, 2), tokens=slice(3, 10))
    assert part.cut(batch)["decoder_input_ids"].tolist() == [list(range(15, 22))]
    assert masks_of(part.cut(batch)) == (), (
        "the encoder's mask says nothing of the decoder's tokens"
    )
    whole = Tail(position_bytes=1, cuts_inputs=False).inputs(batch, part)
    assert {name: tuple(x.shape) for name, x in whole.items()} == {
        "input_ids": (1, 7),
        "attention_mask": (1, 7),
        "decoder_input_ids": (1, 12),
    }
