"""Mixtures of experts: fused experts taken apart, each fitted to the tokens routed to it."""

from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from families import FAMILIES
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import lrc_cli.hf  # noqa: F401 - registers the format
from lrc_cli import decision
from lrc_cli.experts import Experts, has_experts, unfuse
from lrc_cli.layers import low_rank_layers
from lrc_cli.loading import load

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
    """A mixture whose first block never chooses expert 3, and seldom expert 2, compressed."""

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
            patch.setattr(decision, "MOST_SHORT", 1.0)
            self.output, self.report = pico.compressed(folder, changes | settings)
        self.layers = {layer["name"]: layer for layer in self.report["layers"]}


def expert_inputs(model: nn.Module, index: int) -> Tensor:
    """What the down projection of an expert of the first block reads, from the fused weights."""
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
    """One output per entry of SETTINGS."""
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
    """The compressed network's router may send other tokens to them."""
    if made.settings.get("compression.sequential") is not True:
        assert not any(layer.get("sequential") for layer in made.layers.values())
        return
    assert made.layers["model.layers.0.self_attn.q_proj"]["sequential"] is True
    experts = (f"model.layers.0.mlp.experts.0.{part}" for part in ("w1", "w3"))
    reasons = {made.layers[name]["sequential_reason"] for name in experts}
    assert reasons == {"the tokens that reach it depend on the layers before it"}


def test_certificates_of_layers_leave_experts_out(made: Made) -> None:
    """Which sequence a row of theirs belongs to is not known."""
    experts = {x for x, row in made.layers.items() if ".experts." in x and "errors" in row}
    assert experts == set(made.report["certificate"]["not_covered"])
    assert made.report["certificate"]["statements"]


def test_files_have_a_key_for_every_expert_and_load_apart(made: Made) -> None:
    keys = pico.factorised_keys(pico.read_state(made.output))
    assert any(".block_sparse_moe.experts.0.w1" in key for key in keys)
    loaded = AutoModelForCausalLM.from_pretrained(made.output)
    assert any(".mlp.experts.0.w1" in name for name, _ in low_rank_layers(loaded))
    assert isinstance(loaded.get_submodule("model.layers.0.mlp.experts"), Experts)
    with torch.no_grad():
        logits = loaded(IDS).logits
        assert torch.equal(load(made.output)(IDS).logits, logits)
        loaded.dequantize()
        torch.testing.assert_close(loaded(IDS).logits, logits, rtol=1e-3, atol=1e-3)


def test_verify_finds_every_statement_of_a_mixture_true(made: Made) -> None:
    ended = pico.call("verify", made.output, "--against", made.dense)
    assert ended.code == 0, ended.out + ended.err
