"""Fused experts are taken apart, and each expert is fitted to the tokens routed to the expert."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from families import FAMILIES
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import lrc_cli.hf  # noqa: F401 - registers the format
from lrc_cli.checkpoint.source import open_source
from lrc_cli.job.factors import decide_sequential
from lrc_cli.network.experts import Experts, has_experts, unfuse
from lrc_cli.network.fused_experts import put_together, take_apart
from lrc_cli.network.loading import load
from lrc_cli.network.low_rank.stored import stored_layers

IDS = torch.randint(4, 64, (48, 12), generator=torch.Generator().manual_seed(4))
MIXTURES = ("mixtral", "qwen3-moe")
EXPERT = "model.layers.0.mlp.experts.{}.w2"


def mixture(name: str) -> PreTrainedModel:
    model = FAMILIES[name].build()
    pico.randomise(model)
    return model


@pytest.mark.parametrize("name", MIXTURES)
def test_a_list_of_experts_computes_what_the_fused_ones_do(name: str) -> None:
    fused, apart = mixture(name), mixture(name)
    unfuse(apart)
    assert has_experts(apart) and not has_experts(fused)
    with torch.no_grad():
        first, second = fused(IDS).logits, apart(IDS).logits
    torch.testing.assert_close(second, first, rtol=1e-4, atol=1e-4)
    assert sum(p.numel() for p in apart.parameters()) == sum(p.numel() for p in fused.parameters())


def test_gradients_pass_a_list_of_experts() -> None:
    fused, apart = mixture("mixtral"), mixture("mixtral")
    unfuse(apart)
    for model in (fused, apart):
        model(IDS).logits.square().mean().backward()
    whole = fused.model.layers[0].mlp.experts.down_proj.grad
    for index, expert in enumerate(apart.model.layers[0].mlp.experts):
        torch.testing.assert_close(expert.w2.weight.grad, whole[index], rtol=1e-3, atol=1e-6)


def test_other_models_are_left_alone() -> None:
    for name in ("llama", "bert"):
        model = FAMILIES[name].build()
        kinds = [type(part) for part in model.modules()]
        unfuse(model)
        assert [type(part) for part in model.modules()] == kinds


class Made:
    """A compressed mixture whose first block never chooses expert 3, and seldom expert 2."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.dense, self.settings = folder / "dense", settings
        model = mixture("mixtral")
        first = model.model.layers[0]
        with torch.no_grad():
            # A channel that is the same for every token is a bias to the first router.
            model.model.embed_tokens.weight[:, 0] = 2.0
            first.self_attn.o_proj.weight[0] = 0.0
            first.mlp.gate.weight[:, 0] = torch.tensor([1.0, 1.0, 0.3, -5.0])
        model.save_pretrained(self.dense)
        data, held_out = folder / "ids.safetensors", folder / "held-out.safetensors"
        save_file({"input_ids": IDS}, data)
        save_file({"input_ids": IDS.flip(0, 1)[:8].contiguous()}, held_out)
        changes = {
            "model.path": str(self.dense),
            "calibration.path": str(data),
            "calibration.num_sequences": len(IDS),
            "certification.path": str(held_out),
            "certification.num_sequences": 8,
            "evaluation": None,
            "compression.allocation": "relative",
            "compression.rank_multiple": 1,
        }
        with pytest.MonkeyPatch.context() as patch:
            # So few tokens would rule sequential fitting out altogether.
            patch.setattr(decide_sequential, "MOST_WITH_FEW_TOKENS", 1.0)
            self.output, self.report = pico.compressed(folder, changes | settings)
        self.layers = {layer["name"]: layer for layer in self.report["layers"]}


def expert_inputs(model: nn.Module, index: int) -> Tensor:
    """Returns the inputs of the down projection of the first block's expert, from fused weights."""
    block = model.get_submodule("model.layers.0.mlp")
    seen: dict[str, Tensor] = {}
    handle = block.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    with torch.no_grad():
        model(IDS)
    handle.remove()
    tokens = seen["x"].reshape(-1, 32)
    with torch.no_grad():
        _, _, chosen = block.gate(tokens)
        own = tokens[(chosen == index).any(-1)]
        gate, up = (own @ block.experts.gate_up_proj[index].T).chunk(2, dim=-1)
        return nn.functional.silu(gate) * up


SETTINGS: dict[str, dict[str, Any]] = {
    "frobenius": {"compression.method": "frobenius", "compression.sequential": False},
    "curvature": {},
    "sequential": {"compression.sequential": True},
}


@pytest.fixture(scope="module", params=SETTINGS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Makes an output for each entry of SETTINGS."""
    return Made(tmp_path_factory.mktemp("mixture"), SETTINGS[request.param])


def test_each_expert_is_fitted_to_the_tokens_routed_to_it(made: Made) -> None:
    fused = AutoModelForCausalLM.from_pretrained(made.dense)
    state = pico.rebuilt(pico.read_state(made.output))
    counts = []
    for index in range(4):
        row, x = made.layers[EXPERT.format(index)], expert_inputs(fused, index)
        counts.append(len(x))
        if not len(x):
            assert (row["storage"], row["reason"]) == ("dense", "no calibration input reached it")
            continue
        weight = fused.model.layers[0].mlp.experts.down_proj[index].detach()
        z = state[f"model.layers.0.block_sparse_moe.experts.{index}.w2.weight"]
        error = ((x @ (weight - z).T).norm() / (x @ weight.T).norm()).item()
        assert row["errors"]["output"]["stored"] == pytest.approx(error, rel=2e-3, abs=1e-3)
        few = f"fitted to {len(x)} tokens, fewer than its 48 inputs" in row["reason"]
        assert few == (len(x) < 48)
    assert min(counts) == 0 < sorted(counts)[1] < 48 < max(counts)


def test_experts_are_never_fitted_to_pairs_of_tokens(made: Made) -> None:
    """The compressed network's router may send other tokens to the experts."""
    if made.settings.get("compression.sequential") is not True:
        assert not any(layer.get("sequential") for layer in made.layers.values())
        return
    assert made.layers["model.layers.0.self_attn.q_proj"]["sequential"] is True
    experts = (f"model.layers.0.mlp.experts.0.{part}" for part in ("w1", "w3"))
    reasons = {made.layers[name]["sequential_reason"] for name in experts}
    assert reasons == {"the tokens that reach it depend on the layers before it"}


def test_certificates_of_layers_leave_experts_out(made: Made) -> None:
    """Nobody knows to which sequence a row of an expert belongs."""
    experts = {x for x, row in made.layers.items() if ".experts." in x and "errors" in row}
    assert experts == set(made.report["certificate"]["not_covered"])
    assert made.report["certificate"]["statements"]


def test_files_have_a_key_for_every_expert_and_load_apart(made: Made) -> None:
    keys = pico.factorised_keys(pico.read_state(made.output))
    assert any(".block_sparse_moe.experts.0.w1" in key for key in keys)
    loaded = AutoModelForCausalLM.from_pretrained(made.output)
    assert any(".mlp.experts.0.w1" in name for name, _ in stored_layers(loaded))
    assert isinstance(loaded.get_submodule("model.layers.0.mlp.experts"), Experts)
    with torch.no_grad():
        logits = loaded(IDS).logits
        assert torch.equal(load(made.output)(IDS).logits, logits)
        loaded.dequantize()
        torch.testing.assert_close(loaded(IDS).logits, logits, rtol=1e-3, atol=1e-3)


def test_verify_finds_every_statement_of_a_mixture_true(made: Made) -> None:
    ended = pico.call("verify", made.output, "--against", made.dense)
    assert ended.code == 0, ended.out + ended.err


STORED = ("gpt-oss", "granite-moe", "llama4")
"""Families whose checkpoints hold the experts of a layer as one tensor. The first family's tensors
are interleaved, transposed and have biases. The second family's have another name. The third
family's are transposed, and their module has no attributes and gives all tokens to all experts."""


def read_fused(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Returns the model, taken apart as the model's checkpoint asks for."""
    model.save_pretrained(folder)
    take_apart(model, open_source(folder).tensors)
    return model


@pytest.mark.parametrize("name", STORED)
def test_experts_stored_as_one_tensor_are_taken_apart_and_put_together(
    name: str, tmp_path: Path
) -> None:
    fused, apart = mixture(name), read_fused(mixture(name), tmp_path)
    kinds = [type(part) for part in fused.modules()]
    assert has_experts(apart) and not has_experts(fused)
    with torch.no_grad():
        first, second = fused(IDS).logits, apart(IDS).logits
        torch.testing.assert_close(second, first, rtol=1e-4, atol=1e-4)
        put_together(apart)
        assert [type(part) for part in apart.modules()] == kinds
        assert torch.equal(apart(IDS).logits, first)


def test_what_only_looks_like_experts_is_left_alone(tmp_path: Path) -> None:
    model = mixture("llama4")
    for layer in model.model.layers:
        layer.feed_forward.experts.forward = lambda hidden: hidden.tanh()
    assert not has_experts(read_fused(model, tmp_path))


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A family's dense checkpoint, and an output of which some experts stay dense."""

    name: str
    dense: Path
    output: Path
    report: dict[str, Any]


@pytest.fixture(scope="module", params=STORED)
def kept(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kept:
    """Makes an output without the first block's last expert and the second block's experts."""
    folder = tmp_path_factory.mktemp("stored")
    mixture(request.param).save_pretrained(folder / "dense")
    save_file({"input_ids": IDS}, folder / "ids.safetensors")
    changes = {
        "model.path": str(folder / "dense"),
        "calibration.path": str(folder / "ids.safetensors"),
        "calibration.num_sequences": len(IDS),
        "evaluation": None,
        "compression.size": 0.7,
        "compression.size_of": "checkpoint",
        "compression.exclude": ["lm_head", "*layers.0.*.experts.3.*", "*layers.1.*.experts.*"],
        "compression.rank_multiple": 1,
    }
    output, report = pico.compressed(folder, changes)
    return Kept(name=request.param, dense=folder / "dense", output=output, report=report)


def test_experts_of_which_none_is_factorised_stay_one_tensor(kept: Kept) -> None:
    dense, state = pico.read_state(kept.dense), pico.read_state(kept.output)
    fused = [key for key, entry in kept.report["fused"].items() if entry["part"].endswith("weight")]
    assert len(fused) == 4
    for key in fused:
        if ".1." in key:
            assert torch.equal(state[key], dense[key])
        else:
            entry = kept.report["fused"][key]
            keys = [f"{entry['experts']}.{i}.{entry['part']}" for i in range(4)]
            assert state[key].tolist() == [*(len(state[x]) for x in keys[:3]), 0]
            last = dense[key][3]
            assert torch.equal(state[keys[3]], last.T if entry["is_transposed"] else last)
    assert kept.report["target"]["met"]


def test_verify_finds_every_statement_of_stored_experts_true(kept: Kept) -> None:
    ended = pico.call("verify", kept.output, "--against", kept.dense)
    assert ended.code == 0, ended.out + ended.err


def test_verify_reads_the_marks(kept: Kept, tmp_path: Path) -> None:
    state = pico.read_state(kept.output)
    shutil.copytree(kept.output, tmp_path / "out")
    for key in kept.report["fused"].keys() & state.keys():
        if state[key].dtype == torch.int32:
            state[key] += 1
    file = tmp_path / "out" / "model.safetensors"
    with safe_open(file, "pt") as handle:
        metadata = handle.metadata()
    save_file(state, file, metadata)
    ended = pico.call("verify", tmp_path / "out")
    assert ended.code == 3 and "has the ranks of its experts" in ended.out


def test_multiplied_out_they_are_an_ordinary_checkpoint(kept: Kept, tmp_path: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(kept.output)
    with torch.no_grad():
        logits = loaded(IDS).logits
        assert torch.equal(load(kept.output)(IDS).logits, logits)
        loaded.dequantize()
        assert not has_experts(loaded)
        torch.testing.assert_close(loaded(IDS).logits, logits, rtol=1e-3, atol=1e-3)
        loaded.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        torch.testing.assert_close(again(IDS).logits, logits, rtol=1e-3, atol=1e-3)
    assert pico.read_state(tmp_path).keys() == pico.read_state(kept.dense).keys()
