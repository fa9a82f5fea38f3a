"""These tests run `lrc inspect`, which accounts for every byte, for people and as JSON."""

import json

import pico
import pytest
from command_helpers import assert_one_sentence
from pico import Models


def test_inspect_accounts_for_every_byte(checkpoint: Models) -> None:
    path = checkpoint("llama")
    found = json.loads(pico.call("inspect", path, "--json").out)
    state = pico.read_state(path)
    assert found["architecture"] == "LlamaForCausalLM" and len(found["layers"]) == 14
    assert found["bytes"] == sum(tensor.nbytes for tensor in state.values())
    assert found["bytes"] == found["compressible_bytes"] + sum(s["bytes"] for s in found["skipped"])
    for layer in found["layers"]:
        assert layer["shape"] == list(state[f"{layer['name']}.weight"].shape)
        assert layer["dtype"] == "bfloat16"
    reasons = {entry["name"]: entry["reason"] for entry in found["skipped"]}
    assert "embeddings is false" in reasons["model.embed_tokens.weight"]
    assert reasons["model.norm.weight"] == "a vector"


def test_inspect_for_people(checkpoint: Models) -> None:
    ended = pico.call("inspect", checkpoint("qwen2"))
    assert ended.code == 0 and ended.err == ""
    assert "Qwen2ForCausalLM" in ended.out and "3 file(s)" in ended.out
    assert "2 x q_proj" in ended.out and "64 x 64" in ended.out
    assert "left out by include and exclude" in ended.out  # lm_head


def test_inspect_of_a_plain_module(
    plain_folder: pico.PlainFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(plain_folder.path)
    found = pico.call("inspect", "mlp.safetensors", "--factory", "pico_factories:mlp", "--json")
    assert [layer["name"] for layer in json.loads(found.out)["layers"]] == ["0", "2", "4"]
    assert_one_sentence(pico.call("inspect", "mlp.safetensors"), 2, "give --factory")
    assert_one_sentence(pico.call("inspect", "absent"), 2, "absent")
