"""Token embeddings, and heads that share a table, go from statistics to files and back."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
import transformers
from families import FAMILIES, Family
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

import lrc_cli
import lrc_cli.hf
from lrc_cli.errors import InputError
from lrc_cli.network.embeddings import merge_tables
from lrc_cli.network.low_rank.modules import LowRankLayer
from lrc_cli.network.low_rank.stored import dense_weight
from lrc_cli.network.low_rank.tied import Tied, TiedHead

LLAMA, QWEN, BERT = "llama", "qwen2", "bert-mlm"
"""Models of tests/support/pico.py; the heads of the first and the last are tied."""
ARCHITECTURES = {
    LLAMA: "LlamaForCausalLM",
    QWEN: "Qwen2ForCausalLM",
    BERT: "BertForMaskedLM",
}
TABLES = {
    LLAMA: "model.embed_tokens",
    QWEN: "model.embed_tokens",
    BERT: "bert.embeddings.word_embeddings",
}
HEADS = {LLAMA: "lm_head", BERT: "cls.predictions.decoder"}
SETTINGS: dict[str, dict[str, Any]] = {
    "curvature": {"certification.num_sequences": 8},
    "sequential": {
        "compression.method": "frobenius",
        "compression.storage": "factors",
        "compression.sequential": True,
        "calibration.num_sequences": 60,
    },
}
CASES = [*((name, x) for name in (LLAMA, QWEN) for x in SETTINGS), (BERT, "curvature")]


@dataclass(frozen=True, kw_only=True)
class Made:
    """A model's dense checkpoint, the compressed checkpoint and its report."""

    name: str
    settings: str
    dense: Path
    output: Path
    report: dict[str, Any]

    @property
    def is_tied(self) -> bool:
        """Whether the model's head has the embedding's table."""
        return self.name in HEADS

    def load(self, path: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """Loads a checkpoint as the model's class."""
        kind = getattr(transformers, ARCHITECTURES[self.name])
        model: PreTrainedModel = kind.from_pretrained(path, dtype=dtype)
        return model.eval()

    def row(self, name: str) -> dict[str, Any]:
        """Returns the report's row of a layer."""
        return next(row for row in self.report["layers"] if row["name"] == name)


@pytest.fixture(scope="module", params=CASES, ids=", ".join)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Makes an output for each entry of CASES, with all layers compressed."""
    name, settings = request.param
    folder = tmp_path_factory.mktemp("embeddings")
    dense = pico.write_model(folder / "dense", name)
    (folder / "text.txt").write_text(pico.words(6000))
    changes = {
        "model.path": str(dense),
        "calibration.path": str(folder / "text.txt"),
        "compression.embeddings": True,
        "compression.allocation": "uniform",
        "compression.rank_multiple": 1,
    }
    output, report = pico.compressed(folder, changes | SETTINGS[settings])
    return Made(name=name, settings=settings, dense=dense, output=output, report=report)


IDS = torch.randint(5, 96, (3, 20), generator=torch.Generator().manual_seed(7))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


def test_one_pair_of_factors_serves_embedding_and_head(made: Made) -> None:
    table = TABLES[made.name]
    row = made.row(HEADS.get(made.name, table))
    assert row["storage"] == ("factors" if made.settings == "sequential" else "interpolative")
    assert row["tied_to"] == (table if made.is_tied else None)
    keys = pico.factorised_keys(pico.read_state(made.output))
    assert table in keys and not any("head" in key or "decoder" in key for key in keys)
    assert row["bytes_after"] < row["bytes_before"]


def test_computes_what_its_factors_multiplied_out_do(made: Made, tmp_path: Path) -> None:
    state = pico.rebuilt(pico.read_state(made.output))
    weight = f"{TABLES[made.name]}.weight"
    if not made.is_tied:  # an untied table is stored as the weight of a layer on one-hot rows
        state[weight] = state[weight].T.contiguous()
    (tmp_path / "config.json").write_bytes((made.dense / "config.json").read_bytes())
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    got, wanted = logits(made.load(made.output)), logits(made.load(tmp_path))
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max().item())
    before = logits(made.load(made.dense))
    assert (before - got).norm() > 1e-3 * before.norm()
    assert torch.equal(logits(lrc_cli.load(made.output, dtype=torch.float32)), got)


def test_loads_without_a_head_too(made: Made) -> None:
    whole, body = (
        made.load(made.output),
        AutoModel.from_pretrained(made.output, dtype=torch.float32),
    )
    table = whole.get_input_embeddings()
    assert isinstance(table, LowRankLayer) and table.num_embeddings == 96
    with torch.no_grad():
        assert torch.equal(body.get_input_embeddings()(IDS), table(IDS))


def test_saves_the_same_tensors_again(made: Made, tmp_path: Path) -> None:
    _, dtype, _ = pico.MODELS[made.name]
    model = made.load(made.output, dtype)
    model.save_pretrained(tmp_path)
    first, second = pico.read_state(made.output), pico.read_state(tmp_path)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert torch.equal(logits(made.load(tmp_path, dtype)), logits(model))


def test_can_be_multiplied_out(made: Made) -> None:
    model = made.load(made.output)
    before = logits(model)
    table = dense_weight(model.get_input_embeddings())
    model.dequantize()
    torch.testing.assert_close(logits(model), before, rtol=1e-3, atol=1e-3)
    dense = model.get_input_embeddings()
    assert type(dense) is nn.Embedding
    assert torch.equal(dense.weight, table if made.is_tied else table.T)
    if made.is_tied:
        assert model.get_output_embeddings().weight is dense.weight


def test_trains_one_pair_of_factors(made: Made) -> None:
    model = made.load(made.output)
    logits_now = model(IDS).logits
    logits_now.square().mean().backward()
    table = model.get_input_embeddings()
    assert all(p.grad is not None and p.grad.any() for p in table.parameters())
    heads = [part for part in model.modules() if isinstance(part, TiedHead)]
    assert len(heads) == made.is_tied


def test_verify_finds_every_statement_true(made: Made) -> None:
    for against in ((), ("--against", made.dense)):
        ended = pico.call("verify", made.output, *against)
        assert ended.code == 0, ended.out + ended.err
        assert "go by another name" not in ended.out


def test_loading_without_the_plugin_fails(made: Made) -> None:
    code = (
        "import sys, transformers\n"
        "try: getattr(transformers, sys.argv[1]).from_pretrained(sys.argv[2])\n"
        "except RuntimeError as error: print('mismatch' in str(error))\n"
    )
    arguments = [sys.executable, "-c", code, ARCHITECTURES[made.name], str(made.output)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


def test_embeddings_are_left_alone_unless_asked_for(tmp_path: Path) -> None:
    ended = pico.call("inspect", pico.write_model(tmp_path / "dense", LLAMA))
    assert "an embedding, and compression.embeddings is false" in ended.out


MANY = ("t5", "t5-headed", "bart-headed", "marian", "gemma3-tied")
"""Families whose table has several embeddings, or an embedding that scales its rows."""


@dataclass(frozen=True, kw_only=True)
class Shared:
    """A family's dense checkpoint and the compressed checkpoint."""

    family: Family
    dense: Path
    output: Path
    report: dict[str, Any]

    def load(self, architecture: str = "") -> PreTrainedModel:
        """Loads the compressed checkpoint as its class, or as another class."""
        kind = getattr(transformers, architecture or self.family.architecture)
        model: PreTrainedModel = kind.from_pretrained(self.output)
        return model.eval()

    def outputs(self, model: nn.Module) -> Tensor:
        """Returns the first floating-point output."""
        with torch.no_grad():
            found = model(**{name: x[:2] for name, x in self.family.inputs.items()})
        return next(x for x in found.values() if isinstance(x, Tensor) and x.is_floating_point())


@pytest.fixture(scope="module", params=MANY)
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Shared:
    """Makes an output for each entry of MANY, by the default method, which needs gradients."""
    folder, family = tmp_path_factory.mktemp("shared"), FAMILIES[request.param]
    model = family.build()
    pico.randomise(model)
    model.save_pretrained(folder / "dense")
    save_file(
        {name: x.contiguous() for name, x in family.inputs.items()}, folder / "data.safetensors"
    )
    changes = {
        "model.path": str(folder / "dense"),
        "calibration.path": str(folder / "data.safetensors"),
        "calibration.num_sequences": 16,
        "evaluation": None,
        "compression.embeddings": True,
        "compression.allocation": "uniform",
        "compression.rank_multiple": 1,
    }
    output, report = pico.compressed(folder, changes)
    return Shared(family=family, dense=folder / "dense", output=output, report=report)


def test_a_table_is_factorised_once_for_all_that_use_it(shared: Shared) -> None:
    keys = pico.factorised_keys(pico.read_state(shared.output))
    assert len([key for key in keys if "shared" in key or "embed_tokens" in key]) == 1
    model = shared.load()
    before = shared.outputs(model)
    users = [part for part in model.modules() if isinstance(part, Tied)]
    assert len({part.table for part in users}) == 1
    model.dequantize()
    assert not any(isinstance(part, Tied | LowRankLayer) for part in model.modules())
    scale = before.abs().max().item()
    torch.testing.assert_close(shared.outputs(model), before, rtol=1e-3, atol=1e-4 * scale)
    table = model.get_input_embeddings().weight
    owners = [x for x in model.modules() if getattr(x, "weight", None) is table]
    assert len(owners) == 1 + len(users)


def test_verify_finds_every_statement_of_a_shared_table_true(shared: Shared) -> None:
    ended = pico.call("verify", shared.output, "--against", shared.dense)
    assert ended.code == 0, ended.out + ended.err


def test_a_body_loads_from_a_headed_checkpoint_and_not_the_reverse(shared: Shared) -> None:
    bodies = {"bart-headed": "BartModel", "t5-headed": "T5EncoderModel"}
    names = {FAMILIES[name].architecture: body for name, body in bodies.items()}
    if shared.family.architecture in names:
        shared.load(names[shared.family.architecture])
    if shared.family.architecture == "T5Model":
        cause = "Linear would use the table of an embedding that was compressed without it; load"
        with pytest.raises(InputError, match=cause):
            shared.load("T5ForConditionalGeneration")


@pytest.mark.parametrize("same", [True, False])
def test_a_head_that_is_stored_beside_its_table(same: bool, tmp_path: Path) -> None:
    """transformers ties the two, as config.json says, only where they are equal."""
    pico.write_model(tmp_path / "dense", LLAMA)
    file = tmp_path / "dense" / "model.safetensors"
    state, head, table = pico.read_state(file), "lm_head.weight", f"{TABLES[LLAMA]}.weight"
    state[head] = state[table].clone() if same else state[table].flip(0).contiguous()
    save_file(state, file, {"format": "pt"})
    (tmp_path / "text.txt").write_text(pico.words(6000))
    changes = {
        "model.path": str(tmp_path / "dense"),
        "calibration.path": str(tmp_path / "text.txt"),
        "compression.embeddings": True,
        "compression.exclude": [],
        "compression.allocation": "uniform",
        "compression.rank_multiple": 1,
    }
    output, report = pico.compressed(tmp_path, changes)
    assert report["copies"] == ({head: table} if same else {})
    written = pico.read_state(output)
    assert (head in written) is (not same)
    rows = {row["name"]: row for row in report["layers"]}
    assert rows["lm_head"]["tied_to"] == (TABLES[LLAMA] if same else None)
    ended = pico.call("verify", output, "--against", tmp_path / "dense")
    assert ended.code == 0, ended.out + ended.err
    dense = pico.rebuilt(written)
    if not same:
        dense[table] = dense[table].T.contiguous()
    (tmp_path / "config.json").write_bytes((tmp_path / "dense" / "config.json").read_bytes())
    save_file(dense, tmp_path / "model.safetensors", {"format": "pt"})
    kind = transformers.LlamaForCausalLM
    got = logits(kind.from_pretrained(output, dtype=torch.float32))
    wanted = logits(kind.from_pretrained(tmp_path, dtype=torch.float32))
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max().item())


class Shifted(nn.Embedding):
    """An embedding that adds a number to its rows."""

    embed_scale = 1.0
    shift = 0.0

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + self.shift


def test_only_embeddings_that_do_the_same_become_one_module() -> None:
    parts = nn.ModuleList([nn.Embedding(8, 4), nn.Embedding(8, 4), nn.Embedding(8, 4)])
    parts.extend([Shifted(8, 4), Shifted(8, 4)])
    for part in parts:
        part.weight = parts[0].weight
    parts[2].register_forward_hook(lambda *_: None)
    parts[4].shift = 1.0
    wanted = [part(torch.arange(8)) for part in parts]
    merge_tables(parts)
    assert parts[1] is parts[0] and len({id(part) for part in parts}) == 4
    for part, output in zip(parts, wanted, strict=True):
        assert torch.equal(part(torch.arange(8)), output)
