"""PEFT's LoRA takes compressed layers by the names of recipes, from a fresh adapter to a merge."""

import copy
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hf_helpers import Form, Pair, write_pair
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

import lrc_cli.hf
from lrc_cli.errors import InputError
from lrc_cli.network.low_rank import adapters
from lrc_cli.network.low_rank.lora import LoraOnFactors
from lrc_cli.network.low_rank.modules import LowRankModule

IDS = torch.arange(3, 23).view(2, 10)


@dataclass(frozen=True, kw_only=True)
class Quarter(Form):
    """A form of so small a rank that an adapter's rank still pays."""

    def rank(self, rows: int) -> int:
        step = self.block or 1
        return rows // 4 // step * step


SMALL = {"factors": Quarter(block=0), "rows": Quarter(block=1), "blocks": Quarter(block=4)}
HALF = {"half": Form(block=8), "half-factors": Form(block=0)}
FORMS = SMALL | HALF


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Pair]:
    """Writes each (model, form) once."""
    made: dict[tuple[str, str], Pair] = {}

    def pair(model: str, form: str) -> Pair:
        if (model, form) not in made:
            directory = tmp_path_factory.mktemp(f"{model}-{form}")
            made[model, form] = write_pair(directory, model, FORMS[form])
        return made[model, form]

    return pair


@pytest.fixture
def llama(pairs: Callable[[str, str], Pair]) -> Pair:
    return pairs("llama", "blocks")


def load(directory: Path, **options: Any) -> PreTrainedModel:
    architecture = json.loads((directory / "config.json").read_text())["architectures"][0]
    auto: Any = AutoModelForMaskedLM if "Masked" in architecture else AutoModelForCausalLM
    return auto.from_pretrained(directory, **options).eval()


def logits(model: nn.Module, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, **options).logits.float()


def apart(first: torch.Tensor, second: torch.Tensor) -> float:
    return (first - second).abs().max().item()


def train(model: nn.Module) -> None:
    """Takes two steps that are large enough to be seen in the outputs."""
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert parameters
    optimizer = torch.optim.Adam(parameters, 0.05)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    model.eval()


def adapted(pair: Pair, *targets: str, **settings: Any) -> PeftModel:
    config = LoraConfig(**{"r": 2, "target_modules": list(targets), **settings})
    return get_peft_model(load(pair.factorised), config).eval()


def trained(pair: Pair, *targets: str, **settings: Any) -> PeftModel:
    model = adapted(pair, *targets, **settings)
    train(model)
    return model


EVERY = [f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down")]

CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "two factors": ("llama", "factors", {"target_modules": ["q_proj", "v_proj"]}),
    "chosen rows": ("llama", "rows", {"target_modules": ["q_proj", "v_proj"]}),
    "row groups": ("llama", "blocks", {"target_modules": ["q_proj", "v_proj"]}),
    "becomes dense": ("llama", "half", {"target_modules": ["q_proj", "v_proj"]}),
    "two factors become dense": ("llama", "half-factors", {"target_modules": ["q_proj"]}),
    "usual names unsaid": ("llama", "blocks", {"target_modules": None}),
    "every layer": (
        "llama",
        "blocks",
        {"target_modules": [f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down")]},
    ),
    "every layer becomes dense": (
        "llama",
        "half",
        {
            "target_modules": [f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down")],
            "r": 8,
        },
    ),
    "pattern": ("llama", "blocks", {"target_modules": r".*layers\.1\.self_attn\.(q|o)_proj"}),
    "all-linear": ("llama", "blocks", {"target_modules": "all-linear"}),
    "parts": ("llama", "blocks", {"target_modules": ["up", "down"]}),
    "one layer of two": (
        "llama",
        "blocks",
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    ),
    "rank 1": ("llama", "blocks", {"target_modules": ["q_proj"], "r": 1}),
    "rank above the layer's": ("llama", "blocks", {"target_modules": ["q_proj"], "r": 40}),
    "rank of its own": (
        "llama",
        "blocks",
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 3}},
    ),
    "alpha": ("llama", "blocks", {"target_modules": ["q_proj"], "lora_alpha": 17}),
    "rank-stabilised": ("llama", "blocks", {"target_modules": ["q_proj"], "use_rslora": True}),
    "dropout": ("llama", "blocks", {"target_modules": ["q_proj"], "lora_dropout": 0.3}),
    "gaussian": (
        "llama",
        "blocks",
        {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
    ),
    "biases of qwen2": ("qwen2", "blocks", {"target_modules": ["q_proj", "v_proj"]}),
    "biases trained": (
        "qwen2",
        "blocks",
        {"target_modules": ["q_proj", "v_proj"], "lora_bias": True},
    ),
    "biases trained, dense": (
        "qwen2",
        "half",
        {"target_modules": ["q_proj", "v_proj"], "lora_bias": True},
    ),
    "own biases trained": ("qwen2", "blocks", {"target_modules": ["q_proj"], "bias": "all"}),
    "Conv1D of gpt2": ("gpt2", "blocks", {"target_modules": ["c_attn", "c_fc"]}),
    "Conv1D, fan_in_fan_out": (
        "gpt2",
        "factors",
        {"target_modules": ["c_attn"], "fan_in_fan_out": True},
    ),
    "Conv1D becomes dense": ("gpt2", "half", {"target_modules": ["c_attn", "c_proj"]}),
    "encoder": ("bert", "blocks", {"target_modules": ["query", "value"]}),
    "a whole layer beside": (
        "llama",
        "blocks",
        {"target_modules": ["q_proj"], "modules_to_save": ["v_proj"]},
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_lives_from_fresh_to_merged(
    case: str, pairs: Callable[[str, str], Pair], tmp_path: Path
) -> None:
    name, form, settings = CASES[case]
    pair = pairs(name, form)
    want = logits(load(pair.factorised))
    model = get_peft_model(load(pair.factorised), LoraConfig(**{"r": 2, **settings})).eval()
    assert apart(logits(model), want) < 1e-6
    train(model)
    after = logits(model)
    assert apart(after, want) > 1e-3
    if settings.get("bias", "none") == "none":
        with model.disable_adapter():
            assert apart(logits(model), want) < 1e-6

    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(pair.factorised), tmp_path / "adapter").eval()
    assert apart(logits(again), after) < 1e-6

    merged = model.merge_and_unload()
    assert apart(logits(merged), after) < 1e-4
    merged.save_pretrained(tmp_path / "merged")
    assert apart(logits(load(tmp_path / "merged")), after) < 1e-4


def layer(model: nn.Module, name: str = "q_proj") -> Any:
    return next(part for key, part in model.named_modules() if key.endswith(name))


def table(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())["quantization_config"]["layers"]


def test_merging_adds_the_ranks_as_two_factors_and_the_table_follows(
    llama: Pair, tmp_path: Path
) -> None:
    merged = trained(llama, "q_proj").merge_and_unload()
    assert isinstance(layer(merged), LowRankModule)
    merged.save_pretrained(tmp_path)
    name = "model.layers.0.self_attn.q_proj"
    assert table(tmp_path)[name] == {"storage": "factors", "rank": 8 + 2, "block": None}
    other = name.replace("q_proj", "v_proj")
    assert table(tmp_path)[other] == table(llama.factorised)[other]


def test_merged_factors_are_the_old_factors_and_the_adapters(llama: Pair) -> None:
    model = trained(llama, "q_proj")
    part = layer(model)
    inner, outer = part.lora_A["default"].weight, part.lora_B["default"].weight
    before = part.base_layer
    merged = layer(model.merge_and_unload())
    assert torch.equal(merged.weight[:8], before.weight)
    assert torch.equal(merged.weight[8:], inner)
    assert torch.equal(merged.up.weight[:, 8:], outer * part.scaling["default"])
    want = before.matrix(torch.float64) + (outer.double() @ inner.double()) * 4
    torch.testing.assert_close(merged.matrix(torch.float64), want, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("model", "kind"), [("llama", nn.Linear), ("gpt2", Conv1D)], ids=["Linear", "Conv1D"]
)
def test_a_rank_that_no_longer_pays_makes_a_dense_layer(
    model: str, kind: type[nn.Module], pairs: Callable[[str, str], Pair], tmp_path: Path
) -> None:
    target = "c_attn" if model == "gpt2" else "q_proj"
    merged = trained(pairs(model, "half"), target).merge_and_unload()
    assert type(layer(merged, target)) is kind
    merged.save_pretrained(tmp_path)
    assert not any(name.endswith(target) for name in table(tmp_path))
    assert type(layer(load(tmp_path), target)) is kind


def test_a_model_without_any_factorised_layer_is_saved_as_a_dense_model(
    pairs: Callable[[str, str], Pair], tmp_path: Path
) -> None:
    merged = trained(pairs("llama", "half"), *EVERY, r=8).merge_and_unload()
    merged.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert not any(".up." in key for key in load_file(tmp_path / "model.safetensors"))
    merged.save_pretrained(tmp_path)  # and again


@pytest.mark.parametrize("form", ["blocks", "half"])
def test_adapters_are_merged_in_place_and_taken_out_again(
    form: str, pairs: Callable[[str, str], Pair]
) -> None:
    model = trained(pairs("llama", form), "q_proj", "v_proj")
    before, state = logits(model), {k: v.clone() for k, v in model.state_dict().items()}
    model.merge_adapter()
    assert apart(logits(model), before) < 1e-4
    model.unmerge_adapter()
    assert apart(logits(model), before) == 0
    after = model.state_dict()
    assert state.keys() == after.keys()
    assert all(torch.equal(state[key], after[key]) for key in state)
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()


def test_disabling_a_merged_adapter_takes_it_out(llama: Pair) -> None:
    model = trained(llama, "q_proj")
    model.merge_adapter()
    with model.disable_adapter():
        assert apart(logits(model), logits(load(llama.factorised))) < 1e-6


def two_adapters(pair: Pair) -> PeftModel:
    model = trained(pair, "q_proj")
    model.add_adapter("second", LoraConfig(r=3, target_modules=["q_proj", "v_proj"]))
    model.set_adapter("second")
    train(model)
    return model


def test_two_adapters_are_merged_together_and_one_after_the_other(llama: Pair) -> None:
    model = two_adapters(llama)
    model.base_model.set_adapter(["default", "second"])
    want = logits(model)
    together = copy.deepcopy(model).merge_and_unload()
    assert layer(together).rank == 8 + 2 + 3
    assert apart(logits(together), want) < 1e-4
    model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="additionally merging"):
        model.merge_adapter(["second"])
    assert apart(logits(model), want) < 1e-4
    model.unmerge_adapter()
    assert apart(logits(model), want) == 0


def test_every_sequence_of_a_batch_can_have_its_own_adapter(llama: Pair) -> None:
    model = two_adapters(llama)
    model.set_adapter("default")
    first = logits(model)[0]
    mixed = logits(model, adapter_names=["default", "__base__"])
    assert apart(mixed[0], first) < 1e-5
    assert apart(mixed[1], logits(load(llama.factorised))[1]) < 1e-5


def test_an_adapter_that_was_deleted_leaves_the_layer_as_it_was(llama: Pair) -> None:
    model = two_adapters(llama)
    model.set_adapter("default")
    want = logits(model)
    model.delete_adapter("second")
    assert apart(logits(model), want) == 0
    assert layer(model.merge_and_unload()).rank == 8 + 2


def test_unloading_gives_the_compressed_model_back(llama: Pair, tmp_path: Path) -> None:
    model = trained(llama, "q_proj").unload()
    model.save_pretrained(tmp_path)
    want, found = (load_file(x / "model.safetensors") for x in (llama.factorised, tmp_path))
    assert want.keys() == found.keys()
    assert all(torch.equal(want[key], found[key]) for key in want)
    assert table(tmp_path) == table(llama.factorised)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_merged_layer_has_the_dtype_of_the_layer(
    dtype: torch.dtype, llama: Pair, tmp_path: Path
) -> None:
    model = get_peft_model(
        load(llama.factorised, dtype=dtype), LoraConfig(r=2, target_modules=["q_proj"])
    )
    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, LoraOnFactors):
                part.lora_B["default"].weight.fill_(0.05)
    want = logits(model.eval())
    merged = model.merge_and_unload()
    assert layer(merged).weight.dtype == layer(merged).up.weight.dtype == dtype
    assert apart(logits(merged), want) < 0.05
    merged.save_pretrained(tmp_path)
    assert layer(load(tmp_path)).weight.dtype == dtype


def test_a_model_that_was_multiplied_out_under_its_adapter_still_merges(llama: Pair) -> None:
    model = trained(llama, "q_proj")
    want = logits(model)
    model.base_model.model.dequantize()
    assert apart(logits(model), want) < 1e-4
    assert apart(logits(model.merge_and_unload()), want) < 1e-4


def test_transformers_own_adapters_are_added_saved_and_loaded(llama: Pair, tmp_path: Path) -> None:
    model = load(llama.factorised)
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "v_proj"]), "mine")
    train(model)
    want = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    again = load(llama.factorised)
    again.load_adapter(str(tmp_path / "adapter"))
    assert apart(logits(again.eval()), want) < 1e-6
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert apart(logits(whole), want) < 1e-6


def test_a_module_of_another_library_takes_adapters(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    tensors = {"0.weight": torch.randn(4, 16), "0.up.weight": torch.randn(16, 4)}
    save_file(tensors | {"0.bias": torch.randn(16)}, file, {"format": "pt"})
    net = lrc_cli.load(tmp_path, factory=lambda: nn.Sequential(nn.Linear(16, 16)))
    x = torch.randn(3, 16)
    want = net(x)
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["0"]))
    assert isinstance(layer(model, ".0"), LoraOnFactors)
    assert apart(model(x), want) == 0
    nn.init.ones_(layer(model, ".0").lora_B["default"].weight)
    after = model(x)
    merged = model.merge_and_unload()
    assert merged[0].rank == 6
    assert apart(merged(x), after) < 1e-4


REFUSED: dict[str, dict[str, Any]] = {
    "use_dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_niter_4": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "olora"},
    "mica": {"init_lora_weights": "mica"},
    "eva": {"init_lora_weights": "eva"},
    "alora_invocation_tokens": {"alora_invocation_tokens": [1]},
}


@pytest.mark.parametrize("word", REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_what_needs_the_dense_weight_is_refused_in_one_sentence(word: str, llama: Pair) -> None:
    with pytest.raises(InputError) as refused:
        adapted(llama, "q_proj", **REFUSED[word])
    assert word in str(refused.value) or word.rpartition("_")[0] in str(refused.value)
    assert 'target_modules=["up", "down"]' in str(refused.value)
    assert "self_attn.q_proj" in str(refused.value)


@pytest.fixture
def tied(tmp_path: Path) -> Pair:
    """A model whose head and embedding share factors."""
    pair, name = write_pair(tmp_path, "llama", SMALL["factors"]), "model.embed_tokens"
    file, config_file = pair.factorised / "model.safetensors", pair.factorised / "config.json"
    state = load_file(file)
    state[f"{name}.up.weight"] = torch.randn(64, 6) / 3
    state[f"{name}.weight"] = torch.randn(6, 32) / 3
    save_file(state, file, {"format": "pt"})
    config = json.loads(config_file.read_text())
    config["quantization_config"]["layers"][name] = {"storage": "factors", "rank": 6}
    config_file.write_text(json.dumps(config))
    return pair


def test_all_linear_leaves_the_factors_of_a_tied_embedding_alone(
    tied: Pair, tmp_path: Path
) -> None:
    model = trained(tied, target_modules="all-linear")
    names = [name for name, _ in model.named_parameters() if "lora_" in name]
    assert names and not any("embed_tokens" in name for name in names)
    want = logits(model)
    merged = model.merge_and_unload()
    assert apart(logits(merged), want) < 1e-4
    merged.save_pretrained(tmp_path / "merged")
    assert apart(logits(load(tmp_path / "merged")), want) < 1e-4


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_a_compressed_embedding_and_its_head_are_refused_by_name(target: str, tied: Pair) -> None:
    with pytest.raises(InputError, match=f"layer .*{target} is compressed"):
        adapted(tied, target)


@pytest.mark.parametrize("targets", [["q_proj"], ["up", "down"]], ids=["layer", "parts"])
def test_a_model_inside_its_adapters_is_not_saved_under_names_that_nobody_reads(
    targets: list[str], llama: Pair, tmp_path: Path
) -> None:
    model = trained(llama, *targets)
    with pytest.raises(InputError, match="merge_and_unload"):
        model.base_model.model.save_pretrained(tmp_path)


@pytest.mark.parametrize("targets", [["q_proj", "up"], r".*self_attn\..*"], ids=["list", "pattern"])
def test_a_layer_and_its_parts_are_not_both_named(targets: Any, llama: Pair) -> None:
    with pytest.raises(InputError, match=r"names layer .*q_proj and its parts"):
        adapted(llama, target_modules=targets)


OTHERS = [peft.IA3Config, peft.LoHaConfig, peft.LoKrConfig, peft.OFTConfig, peft.VeraConfig]


@pytest.mark.parametrize("kind", OTHERS, ids=lambda kind: kind.__name__)
def test_other_adapters_are_refused_by_peft(kind: Any, llama: Pair) -> None:
    config = kind(target_modules=["q_proj"], task_type="CAUSAL_LM")
    if kind is peft.IA3Config:
        config.feedforward_modules = set()
    with pytest.raises((TypeError, ValueError), match=r"not supported|compatible"):
        get_peft_model(load(llama.factorised), config)


@pytest.mark.filterwarnings("ignore")
def test_a_trained_bias_is_not_merged_into_a_layer_without_one(llama: Pair) -> None:
    model = trained(llama, "q_proj", lora_bias=True)
    with pytest.raises(InputError, match="lora_bias"):
        model.merge_and_unload()


def test_a_safe_merge_refuses_what_is_not_finite(llama: Pair) -> None:
    model = trained(llama, "q_proj")
    want = logits(copy.deepcopy(model).merge_and_unload(safe_merge=True))
    assert apart(logits(model), want) < 1e-4
    layer(model).lora_B["default"].weight.data[0, 0] = torch.nan
    with pytest.raises(InputError, match="not finite"):
        model.merge_and_unload(safe_merge=True)
    assert isinstance(layer(model), LoraOnFactors)


def test_a_process_without_a_peft_that_works_loads_all_the_same(
    monkeypatch: pytest.MonkeyPatch, llama: Pair
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    adapters.register_lora.__wrapped__()
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "lrc_cli.network.low_rank.lora", None)  # raises ImportError
    adapters.register_lora.__wrapped__()
    assert isinstance(layer(load(llama.factorised)), LowRankModule)


def test_a_model_of_mixed_adapters_merges(llama: Pair) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(load(llama.factorised), config, mixed=True).eval()
    adapted = logits(model)
    merged = model.merge_and_unload()
    assert not any(isinstance(module, LoraOnFactors) for module in merged.modules())
    assert apart(logits(merged), adapted) < 1e-4
