"""Copies of another shape, vocabulary, head or tokenizer are refused, or compared and said."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from command_helpers import assert_one_sentence
from copies import FAST, certified, copy_of, noisy
from pico import Models, State
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from lrc_cli.certify import run
from lrc_cli.quality.certificate_record import NoCertificate


def other_llama(original: Path, target: Path, **changes: Any) -> Path:
    """Writes a pico Llama of another shape, with the original's tokenizer."""
    shutil.copytree(original, target)
    for file in target.glob("model*"):
        file.unlink()
    torch.manual_seed(1)
    settings = {**pico._DECODER, "tie_word_embeddings": True, **changes}
    model = LlamaForCausalLM(LlamaConfig(**settings))
    pico.randomise(model)
    model.to(torch.bfloat16).save_pretrained(target)
    return target


@pytest.mark.parametrize(
    ("changes", "said", "flagged"),
    [
        ({"num_hidden_layers": 1}, "num_hidden_layers: 2 in the original, 1 in", "missing"),
        ({"num_hidden_layers": 3}, "num_hidden_layers: 2 in the original, 3 in", "extra"),
        ({"num_key_value_heads": 4}, "num_key_value_heads: 2 in the original, 4 in", "shape"),
        ({"intermediate_size": 48}, "intermediate_size: 96 in the original, 48 in", "shape"),
    ],
    ids=["a layer less", "a layer more", "other heads", "narrower"],
)
def test_a_copy_of_another_shape_is_compared_with_a_sentence(
    changes: dict[str, Any],
    said: str,
    flagged: str,
    tmp_path: Path,
    checkpoint: Models,
    text: Path,
) -> None:
    original = checkpoint("llama")
    copy = other_llama(original, tmp_path / "copy", **changes)
    record = certified(original, copy, text, tmp_path / "out")
    assert any(said in line for line in record.differences), record.differences
    assert flagged in {flag.kind for flag in record.weights.flags}
    assert record.certificate.statements[0].observed
    ended = pico.call("verify", tmp_path / "out", "--against", original, "--other", copy, "-q")
    assert ended.code == 0, ended.out


def other_vocabulary(original: Path, copy: Path) -> None:
    other_llama(original, copy, vocab_size=128)


def other_tokenizer(original: Path, copy: Path) -> None:
    shutil.copytree(original, copy)
    file = copy / "tokenizer.json"
    tokens = json.loads(file.read_text())
    vocabulary = tokens["model"]["vocab"]
    vocabulary["w1"], vocabulary["w2"] = vocabulary["w2"], vocabulary["w1"]
    file.write_text(json.dumps(tokens))


def missing(original: Path, copy: Path) -> None:
    copy_of(original, copy, lambda state: state.pop("model.layers.0.mlp.up_proj.weight"))


REFUSED: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "another vocabulary": (other_vocabulary, "the same head and the same vocabulary"),
    "another tokenizer": (other_tokenizer, "'w1' is number 6 in one and 7 in the other"),
    "a missing tensor": (missing, "model.layers.0.mlp.up_proj.weight"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_compared_is_refused(
    name: str, tmp_path: Path, checkpoint: Models, text: Path
) -> None:
    make, words = REFUSED[name]
    make(checkpoint("llama"), tmp_path / "copy")
    places = ("--against", checkpoint("llama"), "--data", text, "--output", tmp_path / "out")
    ended = pico.call("certify", tmp_path / "copy", *places, *FAST)
    assert_one_sentence(ended, 2, words)
    assert not (tmp_path / "out").exists() and len(list(tmp_path.iterdir())) == 1


def test_another_head_is_refused(tmp_path: Path, checkpoint: Models, text: Path) -> None:
    places = ("--against", checkpoint("bert-mlm"), "--data", text, "--output", tmp_path / "out")
    ended = pico.call("certify", checkpoint("bert-classifier"), *places, *FAST)
    assert_one_sentence(ended, 2, "the outputs cannot be compared")


def test_a_copy_without_a_tokenizer_gets_the_originals(
    tmp_path: Path, checkpoint: Models, text: Path
) -> None:
    copy = copy_of(checkpoint("llama"), tmp_path / "copy", noisy)
    for file in copy.glob("tokenizer*"):
        file.unlink()
    record = certified(checkpoint("llama"), copy, text, tmp_path / "out")
    assert record.differences == ("The copy has no tokenizer: the original's was used for both.",)


def test_a_copy_whose_outputs_are_not_finite_gets_flags_and_no_statement(
    tmp_path: Path, checkpoint: Models, text: Path
) -> None:
    name = "model.layers.1.mlp.down_proj.weight"

    def spoil(state: State) -> None:
        state[name] = state[name].clone()
        state[name][3, 4] = float("nan")

    copy = copy_of(checkpoint("llama"), tmp_path / "copy", spoil)
    record = certified(checkpoint("llama"), copy, text, tmp_path / "out")
    assert [(flag.tensor, flag.kind) for flag in record.weights.flags] == [(name, "not finite")]
    assert isinstance(record.certificate, NoCertificate)
    assert str(record.certificate.note).startswith("none could be issued: ")
    assert "not certified" in (tmp_path / "out" / "badge.svg").read_text()
    places = ("--against", checkpoint("llama"), "--other", copy)
    ended = pico.call("verify", tmp_path / "out", *places, "-q")
    assert ended.code == 0, ended.out
    arguments = ("--against", checkpoint("llama"), "--data", text, "--output", tmp_path / "two")
    gate = ("--set", "gates.max_kl_mean=100")
    ended = pico.call("certify", copy, *arguments, *FAST, *gate)
    assert ended.code == 3 and "not certified: none could be issued" in ended.err


def test_a_copy_that_changes_meanwhile_gets_no_certificate(
    tmp_path: Path, checkpoint: Models, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = copy_of(checkpoint("llama"), tmp_path / "copy", noisy)
    before = run._measure

    def changing(*arguments: Any) -> Any:
        state = pico.read_state(copy)
        save_file(state, copy / "new.safetensors", metadata={"format": "pt"})
        os.replace(copy / "new.safetensors", copy / "model.safetensors")
        return before(*arguments)

    monkeypatch.setattr(run, "_measure", changing)
    places = ("--against", checkpoint("llama"), "--data", text, "--output", tmp_path / "out")
    ended = pico.call("certify", copy, *places, *FAST)
    assert_one_sentence(ended, 1, "was replaced while the run went on")
    assert not (tmp_path / "out").exists()


PLACES = {
    "in the copy": "copy/certificate",
    "around the copy": ".",
    "the data": "text.txt",
    "in the original": "original/x",
}


@pytest.mark.parametrize("name", PLACES)
def test_no_certificate_is_written_into_what_is_read(
    name: str, tmp_path: Path, checkpoint: Models, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    copy_of(checkpoint("llama"), tmp_path / "original")
    copy_of(checkpoint("llama"), tmp_path / "copy")
    shutil.copy(text, tmp_path / "text.txt")
    places = ("--against", "original", "--data", "text.txt", "--output", PLACES[name])
    ended = pico.call("certify", "copy", *places, *FAST, "--force")
    assert_one_sentence(ended, 2, "output.path")
