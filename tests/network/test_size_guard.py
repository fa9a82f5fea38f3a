"""A config.json that fits the files not at all is refused in seconds, by name and by key."""

import json
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from command_helpers import assert_one_sentence, damaged, edit_config
from pico import Models
from safetensors.torch import save_file
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

import lrc_cli
from lrc_cli.errors import InputError

CASES: dict[str, tuple[dict[str, Any], str]] = {
    "layers": ({"num_hidden_layers": 10**9}, "config.json: num_hidden_layers is 1000000000"),
    "layers of 90 digits": ({"num_hidden_layers": 10**90}, "config.json: num_hidden_layers"),
    "layers below zero": ({"num_hidden_layers": -5}, "config.json: num_hidden_layers is -5"),
    "no layer": ({"num_hidden_layers": 0}, "config.json: num_hidden_layers gives 0"),
    "fewer layers": ({"num_hidden_layers": 1}, "num_hidden_layers gives 1 of model.layers"),
    "layers as text": ({"num_hidden_layers": "2"}, "num_hidden_layers"),
    "layers of a text model": (
        {"text_config": {"num_hidden_layers": 10**9}},
        "config.json: text_config.num_hidden_layers is",
    ),
    "width": ({"hidden_size": 10**9}, "config.json: hidden_size asks for a tensor weight"),
    "width beyond 64 bits": ({"hidden_size": 10**30}, "cannot be loaded"),
    "width below zero": ({"hidden_size": -64}, "config.json: hidden_size is -64, and must"),
    "no width": ({"hidden_size": 0}, "config.json: hidden_size is 0, and must be at least 1"),
    "heads below zero": ({"num_attention_heads": -4}, "config.json: num_attention_heads is -4"),
    "no heads": ({"num_attention_heads": 0}, "config.json: num_attention_heads is 0"),
    "groups below zero": ({"num_key_value_heads": -2}, "config.json: num_key_value_heads is -2"),
    "inner width below zero": ({"intermediate_size": -9}, "config.json: intermediate_size is -9"),
    "words below zero": ({"vocab_size": -1}, "config.json: vocab_size is -1"),
    "head's width below zero": ({"head_dim": -16}, "config.json: head_dim is -16"),
    "positions below zero": (
        {"max_position_embeddings": -(10**40)},
        "config.json: max_position_embeddings is -1000",
    ),
    "width of a text model below zero": (
        {"text_config": {"hidden_size": -64}},
        "config.json: text_config.hidden_size is -64",
    ),
    "width as text": ({"hidden_size": "wide"}, "hidden_size"),
    "vocabulary": ({"vocab_size": 10**12}, "config.json: vocab_size asks for a tensor weight"),
    "a vocabulary of 2.5 GB": ({"vocab_size": 10**7}, "config.json: vocab_size asks for"),
    "inner width": ({"intermediate_size": 10**10}, "config.json: intermediate_size asks for"),
    "heads": ({"num_key_value_heads": 10**9}, "config.json: it asks for a tensor"),
    "head's width": ({"head_dim": 10**9}, "config.json: it asks for a tensor"),
    "labels": ({"num_labels": 10**9}, "config.json: num_labels is 1000000000"),
    "digits": ({"vocab_size": int("9" * 120)}, "config.json holds a number of 120 digits"),
    "half a character": ({"note": "\ud800"}, "config.json: holds \\ud800, half of a character"),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", CASES)
def test_a_config_that_asks_for_the_impossible(
    kind: str, tmp_path: Path, checkpoint: Models
) -> None:
    changes, piece = CASES[kind]
    model = damaged(tmp_path, checkpoint("llama"), edit_config(**changes))
    assert_one_sentence(pico.call("inspect", model), 2, piece, str(model))
    with pytest.raises(InputError):
        lrc_cli.load(model)


@pytest.mark.timeout(60)
def test_a_job_refuses_before_any_work(tmp_path: Path, checkpoint: Models, text: Path) -> None:
    model = damaged(tmp_path, checkpoint("llama"), edit_config(num_hidden_layers=10**9))
    job = pico.job(tmp_path, {"model.path": str(model), "calibration.path": str(text)})
    for command in ("compress", "plan"):
        assert_one_sentence(pico.call(command, job, "-q"), 2, "num_hidden_layers is 1000000000")


def test_numbers_that_say_nothing_of_sizes_do_not_matter(
    tmp_path: Path, checkpoint: Models
) -> None:
    changes = {"max_position_embeddings": 10**12, "own_number": 10**50, "seed_of_layers": -1}
    model = damaged(tmp_path, checkpoint("llama"), edit_config(**changes))
    assert json.loads((model / "config.json").read_text())["own_number"] == 10**50
    assert pico.call("inspect", model).code == 0


def deepseek(directory: Path, extra: int) -> Path:
    """Writes two layers of DeepSeek-V3, and a prediction layer with the number `extra`."""
    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        first_k_dense_replace=1,
    )
    DeepseekV3ForCausalLM(config).save_pretrained(directory)
    state = pico.read_state(directory / "model.safetensors")
    state[f"model.layers.{extra}.eh_proj.weight"] = torch.ones(32, 64)
    state[f"model.layers.{extra}.input_layernorm.weight"] = torch.ones(32)
    save_file(state, directory / "model.safetensors", {"format": "pt"})
    return directory


def test_more_layers_than_the_files_hold_are_named(tmp_path: Path, checkpoint: Models) -> None:
    model = damaged(tmp_path, checkpoint("llama"), edit_config(num_hidden_layers=3))
    assert "lack model.layers.2" in pico.call("inspect", model).out
    with pytest.raises(InputError, match=r"lacks model\.layers\.2"):
        lrc_cli.load(model)


def test_layers_that_a_class_passes_over_are_no_fault(tmp_path: Path) -> None:
    model = deepseek(tmp_path / "model", 61)
    ended = pico.call("inspect", model)
    assert ended.code == 0, ended.err
    assert len(lrc_cli.load(model).model.layers) == 2


def test_layers_that_a_class_does_not_pass_over_are_refused(tmp_path: Path) -> None:
    model = deepseek(tmp_path / "model", 2)
    assert_one_sentence(pico.call("inspect", model), 2, "files hold model.layers.2.", "remove the")


def test_a_config_cut_to_fewer_layers_says_the_way_out(tmp_path: Path, checkpoint: Models) -> None:
    model = damaged(tmp_path, checkpoint("llama"), edit_config(num_hidden_layers=1))
    ended = pico.call("inspect", model)
    assert_one_sentence(ended, 2, "num_hidden_layers gives 1 of model.layers", "model.layers.1.")
    assert "restore the config.json that was saved with the weights" in ended.err
    assert "or remove the layers that are not used from the files" in ended.err
    state = pico.read_state(model / "model.safetensors")
    kept = {key: x for key, x in state.items() if ".layers.1." not in key}
    save_file(kept, model / "model.safetensors", {"format": "pt"})
    assert pico.call("inspect", model).code == 0
