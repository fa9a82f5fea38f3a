"""These tests run `lrc eval`: the report's figures again, other data, wrong options."""

import json
import shutil
from pathlib import Path

import pico
import pytest
import torch
from command_helpers import Changes, assert_one_sentence
from pico import Models
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM


def test_eval_repeats_the_reports_figures(tmp_path: Path, llama_job: Changes) -> None:
    output, report = pico.compressed(tmp_path, llama_job)
    found = json.loads(pico.call("eval", output, "--json", "-q").out)
    (row,), (told,) = found["quality"], report["quality"]
    assert row["text"] == told["text"] and row["sha256"] == told["sha256"]
    for key in ("perplexity_before", "perplexity_after", "kl", "top1_agreement"):
        assert row[key] == pytest.approx(told[key], rel=1e-4)
    assert found["bytes"] == report["size"]["checkpoint_bytes"]
    assert min(found["seconds_per_sequence"].values()) > 0
    people = pico.call("eval", output, "-q")
    assert people.code == 0 and "perplexity" in people.out and "top-1 agreement" in people.out


def test_eval_on_other_data_against_another_checkpoint(
    tmp_path: Path, llama_job: Changes, text: Path
) -> None:
    output, _ = pico.compressed(tmp_path, llama_job)
    moved = tmp_path / "moved"
    shutil.copytree(llama_job["model.path"], moved)
    options = ["--num-sequences", 3, "--sequence-length", 16, "--json", "-q"]
    ended = pico.call(
        "eval", output, "--against", moved, "--data", text, "--part", "0.9:1", *options
    )
    found = json.loads(ended.out)
    (row,) = found["quality"]
    assert found["against"] == str(moved) and row["num_sequences"] == 3
    assert row["num_scored"] == 3 * 15
    words = text.read_text().split()
    blocks = torch.tensor([pico.VOCABULARY.index(word) for word in words[5400:]]).split(16)
    model = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32).eval()
    with torch.no_grad():
        losses = {model(input_ids=b[None], labels=b[None]).loss.item() for b in blocks}
    assert min(losses) <= row["loss_after"] <= max(losses)
    both = pico.call("eval", output, "--data", text, "--data", text, "--part", "0:0.5", *options)
    rows = json.loads(both.out)["quality"]
    assert [r["num_sequences"] for r in rows] == [3, 3]
    assert [r["text"] for r in rows] == [f"{text} 0:0.5", str(text)]
    assert rows[0]["sha256"] != rows[1]["sha256"]


def test_eval_takes_the_dtype_of_the_run(tmp_path: Path, llama_job: Changes) -> None:
    changes = {"runtime.dtype": "bfloat16", "compression.method": "svd"}
    output, report = pico.compressed(tmp_path, llama_job | changes)
    found = json.loads(pico.call("eval", output, "--json", "-q").out)
    assert found["activation_dtype"] == "bfloat16"
    loss = found["quality"][0]["loss_after"]
    assert loss == pytest.approx(report["quality"][0]["loss_after"], rel=1e-4)


def test_eval_of_a_dense_copy_is_lossless(tmp_path: Path, llama_job: Changes) -> None:
    output, _ = pico.compressed(tmp_path, llama_job | {"compression.size": 1.0})
    (row,) = json.loads(pico.call("eval", output, "--json", "-q").out)["quality"]
    assert row["perplexity_after"] == row["perplexity_before"]
    assert row["kl"] == pytest.approx(0, abs=1e-6) and row["top1_agreement"] == 1


def test_eval_of_an_encoder_and_of_a_plain_module(
    tmp_path: Path,
    checkpoint: Models,
    text: Path,
    plain_folder: pico.PlainFolder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, changes, options in (
        ("bert", {"model.path": str(checkpoint("bert")), "calibration.path": str(text)}, []),
        ("mlp", plain_folder.model("mlp"), ["--factory", "pico_factories:mlp"]),
    ):
        monkeypatch.chdir(plain_folder.path)
        folder = tmp_path / name
        folder.mkdir()
        output, report = pico.compressed(folder, changes)
        if options:
            told = pico.call("eval", output, "-q")
            assert_one_sentence(told, 2, "give --factory pico_factories:mlp")
        ended = pico.call("eval", output, "--json", "-q", *options)
        (row,) = json.loads(ended.out)["quality"]
        told = report["quality"][0]["relative_output_error"]
        assert row["relative_output_error"] == pytest.approx(told, rel=1e-3) and told > 0


def test_eval_says_which_inputs_the_network_does_not_use(
    tmp_path: Path, llama_job: Changes
) -> None:
    output, _ = pico.compressed(tmp_path, llama_job | {"compression.method": "svd"})
    ids = torch.randint(5, 40, (6, 16), generator=torch.Generator().manual_seed(0))
    said = "the network takes the input 'speaker' and does not use it"
    for extra, is_said in ({"speaker": torch.ones(6, 2)}, True), ({}, False):
        save_file({"input_ids": ids, **extra}, tmp_path / "data.safetensors")
        ended = pico.call("eval", output, "--data", tmp_path / "data.safetensors")
        assert ended.code == 0 and (said in ended.err) == is_said, ended.err


@pytest.mark.parametrize(
    ("options", "piece"),
    [
        (["--part", "0:1"], "more --part than --data"),
        (["--data", "{text}", "--part", "0.5"], "not A:B"),
        (["--data", "{text}", "--part", "0.5:0.2"], "0 <= A < B <= 1"),
        (["--data", "absent.txt"], "no such file"),
        (["--against", "absent"], "absent"),
        (["--data", "{text}", "--sequence-length", "65"], "64 positions"),
    ],
)
def test_eval_with_wrong_options(
    options: list[str], piece: str, tmp_path: Path, llama_job: Changes, text: Path
) -> None:
    output, _ = pico.compressed(tmp_path, llama_job | {"compression.method": "svd"})
    filled = [option.replace("{text}", str(text)) for option in options]
    assert_one_sentence(pico.call("eval", output, "-q", *filled), 2, piece)


@pytest.mark.parametrize("command", ["eval", "verify"])
def test_what_lrc_did_not_write(command: str, tmp_path: Path, checkpoint: Models) -> None:
    (tmp_path / "file").write_text("x")
    finished = "the directory that `lrc compress` printed"
    for place, pieces in (
        (
            checkpoint("llama"),
            ["is not a finished output of lrc: it has no manifest.json", finished],
        ),
        (tmp_path, ["is not a finished output of lrc: it has no manifest.json", finished]),
        (tmp_path / "absent", ["absent does not exist", "check the path"]),
        (tmp_path / "file", ["is not a directory", "give the directory that lrc wrote"]),
    ):
        assert_one_sentence(pico.call(command, place, "-q"), 2, f"error: {place} ", *pieces)
