"""Checkpoints that cannot be compressed are refused in one sentence."""

import math
import os
from collections.abc import Callable
from pathlib import Path

import pico
import pytest
import torch
from command_helpers import (
    Changes,
    assert_nothing_left,
    assert_one_sentence,
    damaged,
    edit_config,
    edit_state,
)
from pico import Models


def put_nan(state: dict[str, torch.Tensor]) -> None:
    weight = state["model.layers.1.mlp.up_proj.weight"].clone()
    weight[3, 5] = math.nan
    state["model.layers.1.mlp.up_proj.weight"] = weight


def truncate(path: Path) -> None:
    file = path / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1000)


def remove_tokenizer(path: Path) -> None:
    for file in path.glob("tokenizer*"):
        file.unlink()


DAMAGES: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "nan": (edit_state(put_nan), ["model.layers.1.mlp.up_proj.weight", "NaN"]),
    "missing-tensor": (
        edit_state(lambda state: state.pop("model.layers.1.mlp.up_proj.weight")),  # type: ignore
        ["model.layers.1.mlp.up_proj.weight"],
    ),
    "quantised": (
        edit_config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        ["bitsandbytes", "dequantise"],
    ),
    "unnamed-quantisation": (edit_config(quantization_config={"bits": 4}), ["quantised"]),
    "truncated": (truncate, ["model.safetensors"]),
    "no-tokenizer": (remove_tokenizer, ["no tokenizer", "beside the weights"]),
    "broken-tokenizer": (
        lambda path: (path / "tokenizer.json").write_text("{"),
        ["tokenizer", "restore the file"],
    ),
    "no-weights": (lambda path: (path / "model.safetensors").unlink(), ["has no weight file"]),
    "config-not-json": (lambda path: (path / "config.json").write_text("{"), ["config.json"]),
    "unknown-architecture": (
        edit_config(model_type="unheard_of", architectures=["UnheardOf"]),
        ["UnheardOf", "upgrade transformers"],
    ),
    "unknown-class": (
        edit_config(architectures=["LlamaForTelepathy"]),
        ["no class LlamaForTelepathy", "upgrade transformers", "factory"],
    ),
    "own-class": (
        edit_config(
            architectures=["OwnLlama"], auto_map={"AutoModelForCausalLM": "modeling_own.OwnLlama"}
        ),
        ["OwnLlama", "trust_remote_code"],
    ),
    "class-no-list": (
        edit_config(architectures="LlamaForCausalLM"),
        ["architectures", '["LlamaForCausalLM"]'],
    ),
    "no-heads": (
        edit_config(num_attention_heads=0, num_key_value_heads=0),
        ["num_attention_heads is 0"],
    ),
    "text-for-number": (edit_config(hidden_size="wide"), ["cannot be loaded", "hidden_size"]),
    "quantisation-no-object": (
        edit_config(quantization_config="gptq"),
        ["quantization_config is not an object"],
    ),
    "other-tokenizer": (pico.write_large_tokenizer, ["token", "96", "own tokenizer"]),
    "wrong-shape": (edit_config(intermediate_size=80), ["cannot be loaded"]),
}


@pytest.mark.parametrize("kind", list(DAMAGES))
def test_a_checkpoint_that_cannot_be_compressed(
    kind: str, tmp_path: Path, llama_job: Changes
) -> None:
    damage, pieces = DAMAGES[kind]
    model = damaged(tmp_path, Path(llama_job["model.path"]), damage)
    ended = pico.call("compress", pico.job(tmp_path, llama_job | {"model.path": str(model)}), "-q")
    assert_one_sentence(ended, 2, *pieces)
    assert_nothing_left(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path, checkpoint: Models, text: Path) -> None:
    shard = "model-00002-of-00003.safetensors"
    model = damaged(tmp_path, checkpoint("qwen2"), lambda path: (path / shard).unlink())
    changes = {"model.path": str(model), "calibration.path": str(text)}
    ended = pico.call("compress", pico.job(tmp_path, changes), "-q")
    assert_one_sentence(ended, 2, shard, "copy all shards")


def test_our_own_output_is_not_compressed_again(tmp_path: Path, llama_job: Changes) -> None:
    output, _ = pico.compressed(tmp_path, llama_job)
    changes = llama_job | {"model.path": str(output), "output.path": str(tmp_path / "twice")}
    ended = pico.call("compress", pico.job(tmp_path, changes), "-q")
    assert_one_sentence(ended, 2, "already", "lrc", "dense checkpoint")
    assert not (tmp_path / "twice").exists()


def test_numbers_too_large_for_the_output_dtype(tmp_path: Path, llama_job: Changes) -> None:
    def enlarge(state: dict[str, torch.Tensor]) -> None:
        state["model.norm.weight"] = state["model.norm.weight"] * 1e6

    model = damaged(tmp_path, Path(llama_job["model.path"]), edit_state(enlarge))
    changes = {"model.path": str(model), "output.dtype": "float16", "compression.method": "svd"}
    ended = pico.call("compress", pico.job(tmp_path, llama_job | changes), "-q")
    assert_one_sentence(ended, 1, "output.dtype: float16 cannot hold", "model.norm.weight")
    assert_nothing_left(tmp_path)
