"""The transformers plugin and `lrc_cli.load` read factorised checkpoints that are made by hand."""

import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_helpers import (
    FORMS,
    MODELS,
    Pair,
    State,
    edit_config,
    edit_tensors,
    mapped_file,
    write_pair,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

import lrc_cli.hf
from lrc_cli.errors import InputError
from lrc_cli.network import transformers_plugin
from lrc_cli.network.disk_names import module_names
from lrc_cli.network.loading import load
from lrc_cli.network.low_rank.modules import LowRankModule
from lrc_cli.network.low_rank.stored import dense_weight, stored_layers

Q_PROJ = "model.layers.0.self_attn.q_proj"
IDS = torch.arange(3, 23).view(2, 10)


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


def auto(model: str) -> Any:
    return AutoModelForMaskedLM if model == "bert" else AutoModelForCausalLM


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def assert_same_tensors(first: State, second: State) -> None:
    assert first.keys() == second.keys()
    for key in first:
        assert first[key].dtype == second[key].dtype, key
        assert torch.equal(first[key], second[key]), key


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("model", MODELS)
def test_logits_equal_those_of_the_multiplied_out_weights(
    pairs: Callable[[str, str], Pair], model: str, form: str
) -> None:
    pair = pairs(model, form)
    loaded = auto(model).from_pretrained(pair.factorised)
    dense = auto(model).from_pretrained(pair.dense)
    layers = dict(stored_layers(loaded))
    assert len(layers) == len(pair.layers) > 0
    assert all(isinstance(layer, LowRankModule) for layer in layers.values())
    torch.testing.assert_close(logits(loaded), logits(dense), rtol=1e-4, atol=1e-5)
    assert logits(dense).std() > 1e-3


@pytest.mark.parametrize("model", ["llama", "qwen2", "gpt2"])
def test_generates_the_same_text(pairs: Callable[[str, str], Pair], model: str) -> None:
    pair = pairs(model, "blocks")
    texts = [
        AutoModelForCausalLM.from_pretrained(path).generate(
            IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=8, do_sample=False
        )
        for path in (pair.factorised, pair.dense)
    ]
    assert torch.equal(texts[0], texts[1])


@pytest.mark.parametrize("form", ["factors", "blocks"])
@pytest.mark.parametrize("model", MODELS)
def test_save_pretrained_round_trip(
    pairs: Callable[[str, str], Pair], tmp_path: Path, model: str, form: str
) -> None:
    pair = pairs(model, form)
    loaded = auto(model).from_pretrained(pair.factorised)
    loaded.save_pretrained(tmp_path)
    written = load_file(pair.factorised / "model.safetensors")
    assert_same_tensors(load_file(tmp_path / "model.safetensors"), written)
    stated = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert stated == {"quant_method": "lrc", "format_version": 1, "layers": pair.layers}
    again = auto(model).from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(loaded))


def test_sharded_checkpoint_loads(llama: Pair, tmp_path: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(llama.factorised)
    loaded.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(logits(load(tmp_path)), logits(loaded))


def test_parameters_are_in_the_stored_dtype_and_not_copied(llama: Pair, tmp_path: Path) -> None:
    def halve(state: State) -> None:
        state.update({k: t.bfloat16() for k, t in state.items() if t.is_floating_point()})

    model = load(edit_tensors(llama.factorised, tmp_path / "half", halve))
    layer = model.get_submodule(Q_PROJ)
    assert layer.down.weight.dtype == layer.up.weight.dtype == torch.bfloat16
    assert layer.perm.dtype == torch.int32
    file = str((tmp_path / "half" / "model.safetensors").resolve())
    for parameter in model.parameters():
        assert mapped_file(parameter) == file


# ---------------------------------------------------------------- other classes of the family


@pytest.mark.parametrize("model", ["llama", "bert", "gpt2"])
def test_base_model_loads_from_a_checkpoint_with_a_head(
    pairs: Callable[[str, str], Pair], tmp_path: Path, model: str
) -> None:
    pair = pairs(model, "blocks")
    loaded, dense = (AutoModel.from_pretrained(p) for p in (pair.factorised, pair.dense))
    with torch.no_grad():
        states = [m(input_ids=IDS).last_hidden_state for m in (loaded, dense)]
    torch.testing.assert_close(states[0], states[1], rtol=1e-4, atol=1e-5)
    # The base model saves its keys without the prefix; the model with a head finds the keys.
    loaded.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "model.safetensors")
    stated = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["layers"]
    assert len(stated) == len(list(stored_layers(loaded)))
    assert all(f"{name}.up.weight" in keys for name in stated)
    again = AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS).last_hidden_state, states[0])
    headed = auto(model).from_pretrained(tmp_path)
    assert len(list(stored_layers(headed))) == len(stated)


def test_classifier_loads_from_a_masked_language_model(pairs: Callable[[str, str], Pair]) -> None:
    pair = pairs("bert", "rows")
    model = AutoModelForSequenceClassification.from_pretrained(pair.factorised)
    layers = dict(stored_layers(model))
    assert set(layers) == set(pair.layers)
    dense = load_file(pair.dense / "model.safetensors")
    for name, layer in layers.items():
        torch.testing.assert_close(dense_weight(layer), dense[f"{name}.weight"])


def test_module_names_of_dense_and_factorised_keys(pairs: Callable[[str, str], Pair]) -> None:
    pair = pairs("bert", "rows")
    keys = load_file(pair.dense / "model.safetensors").keys()
    legacy = "bert.embeddings.LayerNorm.gamma"
    names = module_names(AutoModel.from_pretrained(pair.dense), [*keys, legacy])
    base = {key: key.removeprefix("bert.") for key in keys if key.startswith("bert.")}
    assert names == base | {legacy: "embeddings.LayerNorm.weight"}
    headed = AutoModelForMaskedLM.from_pretrained(pair.factorised)
    factorised = load_file(pair.factorised / "model.safetensors").keys()
    assert module_names(headed, factorised) == {key: key for key in factorised}


# ---------------------------------------------------------------- run-time behaviour


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_dequantize_gives_the_dense_model(
    pairs: Callable[[str, str], Pair], tmp_path: Path, model: str
) -> None:
    pair = pairs(model, "rows")
    loaded = AutoModelForCausalLM.from_pretrained(pair.factorised).dequantize()
    assert not list(stored_layers(loaded))
    expected = logits(AutoModelForCausalLM.from_pretrained(pair.dense))
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-5)
    if model == "gpt2":
        assert isinstance(loaded.transformer.h[0].attn.c_proj, Conv1D)
    loaded.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-5)


def test_gradients_reach_both_factors(llama: Pair) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama.factorised)
    model(input_ids=IDS, labels=IDS).loss.backward()
    dense = AutoModelForCausalLM.from_pretrained(llama.dense)
    dense(input_ids=IDS, labels=IDS).loss.backward()
    layer = model.get_submodule(Q_PROJ)
    assert layer.down.weight.grad.abs().sum() > 0
    # y = [Z x; T Z x] in row groups: T's gradient is its rows' gradient times the inner factor.
    rows = dense.get_submodule(Q_PROJ).weight.grad.unflatten(0, (-1, layer.block))
    merged = rows[layer.perm.argsort()].flatten(0, 1)[layer.rank :]
    expected = merged @ layer.down.weight.detach().T
    torch.testing.assert_close(layer.up.weight.grad, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("form", ["factors", "rows"])
def test_layer_compiles_and_exports(pairs: Callable[[str, str], Pair], form: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(pairs("qwen2", form).factorised)
    layer, x = model.get_submodule(Q_PROJ), torch.randn(2, 5, 32)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), layer(x))


def test_state_dict_keeps_the_disk_names(llama: Pair) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama.factorised)
    ends = {"weight", "up.weight", "perm"}
    keys = {key for key in model.state_dict() if key.startswith(f"{Q_PROJ}.")}
    assert keys == {f"{Q_PROJ}.{end}" for end in ends}
    before = logits(model)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert not torch.equal(logits(model), before)
    model.load_state_dict(state)
    assert torch.equal(logits(model), before)


def test_parts_are_plain_linear_layers(llama: Pair) -> None:
    layer = AutoModelForCausalLM.from_pretrained(llama.factorised).get_submodule(Q_PROJ)
    assert type(layer.down) is nn.Linear and type(layer.up) is nn.Linear
    assert layer.weight is layer.down.weight
    assert "rank=16" in repr(layer) and "block=8" in repr(layer)


def test_offloaded_layers_run(llama: Pair, tmp_path: Path) -> None:
    places = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(
        llama.factorised, device_map=places, offload_folder=tmp_path
    )
    assert model.get_submodule(Q_PROJ).up.weight.is_meta
    expected = logits(AutoModelForCausalLM.from_pretrained(llama.dense))
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="offload"):
        model.dequantize()


def test_second_registration_is_harmless(llama: Pair) -> None:
    importlib.reload(transformers_plugin)
    assert list(stored_layers(AutoModelForCausalLM.from_pretrained(llama.factorised)))


# ---------------------------------------------------------------- loud failures

WITHOUT_PLUGIN = """
import sys
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM
for path in sys.argv[1:]:
    for auto in (AutoModel, AutoModelForMaskedLM if "bert" in path else AutoModelForCausalLM):
        try:
            auto.from_pretrained(path)
        except RuntimeError as error:
            print("refused" if "mismatch" in str(error) else error)
        else:
            print("loaded", path)
"""


def test_loading_without_the_plugin_fails_for_every_layer(
    pairs: Callable[[str, str], Pair], tmp_path: Path
) -> None:
    """Two classes refuse a checkpoint for each layer, at the rank whose shapes come closest."""
    paths = []
    for model in MODELS:
        for form in ("rows-largest", "factors-largest"):
            pair = pairs(model, form)
            state, dense = (
                load_file(p / "model.safetensors") for p in (pair.factorised, pair.dense)
            )
            for name in [name for name in pair.layers if ".0." in name]:
                path = tmp_path / f"{model}-{form}-{name}"
                path.mkdir()
                shutil.copy(pair.factorised / "config.json", path)
                own = {k: t for k, t in state.items() if k.startswith(f"{name}.")}
                save_file(dense | own, path / "model.safetensors", {"format": "pt"})
                paths.append(str(path))
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_PLUGIN, *paths], capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\n")[:-1] == ["refused"] * (2 * len(paths)), done.stdout[-2000:]


def refused(path: Path, *words: str, **options: Any) -> None:
    """Sees that both ways of loading raise one sentence with these words."""
    for loader in (AutoModelForCausalLM.from_pretrained, load):
        with pytest.raises(InputError) as caught:
            loader(path, **options)
        for word in words:
            assert word in str(caught.value)
        assert "\n" not in str(caught.value)


TENSOR_DAMAGE: dict[str, tuple[Callable[[State], Any], str]] = {
    "outer factor missing": (lambda s: s.pop(f"{Q_PROJ}.up.weight"), "up.weight is missing"),
    "inner factor missing": (lambda s: s.pop(f"{Q_PROJ}.weight"), "weight is missing"),
    "permutation missing": (lambda s: s.pop(f"{Q_PROJ}.perm"), "do not make"),
    "inner factor misshapen": (
        lambda s: s.update({f"{Q_PROJ}.weight": torch.zeros(16, 31)}),
        "do not make",
    ),
    "rank m": (
        lambda s: s.update(
            {f"{Q_PROJ}.weight": torch.zeros(32, 32), f"{Q_PROJ}.up.weight": torch.zeros(0, 32)}
        ),
        "do not make",
    ),
    "permutation too long": (
        lambda s: s.update({f"{Q_PROJ}.perm": torch.zeros(5, dtype=torch.int32)}),
        "does not divide",
    ),
    "permutation is int64": (
        lambda s: s.update({f"{Q_PROJ}.perm": torch.arange(4)}),
        "int64",
    ),
    "permutation repeats": (
        lambda s: s.update({f"{Q_PROJ}.perm": torch.zeros(4, dtype=torch.int32)}),
        "not a permutation",
    ),
    "factors of a convolution": (
        lambda s: s.update({f"{Q_PROJ}.up.weight": torch.zeros(16, 16, 1, 1)}),
        "do not make",
    ),
}


@pytest.mark.parametrize("damage", TENSOR_DAMAGE)
def test_damaged_tensors_are_refused(llama: Pair, tmp_path: Path, damage: str) -> None:
    edit, cause = TENSOR_DAMAGE[damage]
    refused(edit_tensors(llama.factorised, tmp_path / "edited", edit), Q_PROJ, cause)


CONFIG_DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], Any], tuple[str, ...]]] = {
    "newer version": (lambda c: c.update(format_version=2), ("version 2", "pip install --upgrade")),
    "version is no number": (lambda c: c.update(format_version="1"), ("format_version '1'",)),
    "table states another rank": (
        lambda c: c["layers"][Q_PROJ].update(rank=8),
        (Q_PROJ, "rank 8", "16"),
    ),
    "table states another block": (
        lambda c: c["layers"][Q_PROJ].update(block=16),
        (Q_PROJ, "block 16", "8"),
    ),
    "table states another storage": (
        lambda c: c["layers"][Q_PROJ].update(storage="factors"),
        (Q_PROJ, "storage factors"),
    ),
    "table lacks a layer": (lambda c: c["layers"].pop(Q_PROJ), (Q_PROJ, "does not say so")),
}


@pytest.mark.parametrize("damage", CONFIG_DAMAGE)
def test_contradicting_config_is_refused(llama: Pair, tmp_path: Path, damage: str) -> None:
    edit, words = CONFIG_DAMAGE[damage]
    refused(edit_config(llama.factorised, tmp_path / "edited", edit), *words)


def test_table_may_be_absent(llama: Pair, tmp_path: Path) -> None:
    path = edit_config(llama.factorised, tmp_path / "edited", lambda c: c.pop("layers"))
    assert len(list(stored_layers(load(path)))) == len(llama.layers)


def test_dense_weights_under_our_config_are_refused(llama: Pair, tmp_path: Path) -> None:
    path = edit_config(llama.factorised, tmp_path / "edited", lambda c: c.update(layers={}))
    shutil.copy(llama.dense / "model.safetensors", path)
    refused(path, "no factorised layer")


def test_missing_bias_is_refused(pairs: Callable[[str, str], Pair], tmp_path: Path) -> None:
    pair = pairs("qwen2", "rows")
    path = edit_tensors(pair.factorised, tmp_path / "edited", lambda s: s.pop(f"{Q_PROJ}.bias"))
    refused(path, Q_PROJ, "bias missing")


def test_new_bias_is_loaded(llama: Pair, tmp_path: Path) -> None:
    """A layer that was fitted with a free bias gains a bias that its class does not have."""
    bias = torch.randn(32)
    path = edit_tensors(
        llama.factorised, tmp_path / "edited", lambda s: s.update({f"{Q_PROJ}.bias": bias})
    )
    layer = load(path).get_submodule(Q_PROJ)
    assert torch.equal(layer(torch.zeros(1, 32))[0], bias)


def test_dense_checkpoint_is_not_factorised_on_the_fly(llama: Pair) -> None:
    with pytest.raises(ValueError, match="pre-quantized"):
        AutoModelForCausalLM.from_pretrained(
            llama.dense, quantization_config=lrc_cli.hf.LrcConfig()
        )


# ---------------------------------------------------------------- lrc_cli.load


def test_load_picks_the_class_that_the_config_names(pairs: Callable[[str, str], Pair]) -> None:
    pair = pairs("bert", "factors")
    for path in (pair.factorised, pair.dense):
        model = load(path, dtype="float64")
        assert type(model).__name__ == "BertForMaskedLM"
        assert not model.training
        assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_load_refuses_a_dense_checkpoint_with_a_missing_tensor(llama: Pair, tmp_path: Path) -> None:
    path = edit_tensors(llama.dense, tmp_path / "edited", lambda s: s.pop(f"{Q_PROJ}.weight"))
    with pytest.raises(InputError, match=f"lacks {Q_PROJ}.weight"):
        load(path)


def test_load_explains_what_transformers_refuses(llama: Pair, tmp_path: Path) -> None:
    path = edit_tensors(
        llama.dense, tmp_path / "shape", lambda s: s.update({f"{Q_PROJ}.weight": torch.ones(3, 3)})
    )
    with pytest.raises(InputError, match="cannot be loaded by transformers"):
        load(path)
    (path / "config.json").write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        load(path)
    with pytest.raises(InputError, match="does not exist"):
        load(tmp_path / "nowhere")
    with pytest.raises(InputError, match="not a device"):
        load(llama.dense, device="toaster")
    with pytest.raises(InputError, match="not a floating dtype"):
        load(llama.dense, dtype="int8")
