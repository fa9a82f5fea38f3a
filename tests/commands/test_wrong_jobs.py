"""Jobs and data that do not fit the network are refused in one sentence."""

from pathlib import Path

import pico
import pytest
import torch
from command_helpers import Changes, assert_nothing_left, assert_one_sentence
from safetensors.torch import save_file

BAD: dict[str, tuple[Changes, list[str]]] = {
    "no-model": ({"model.path": "absent/model"}, ["absent/model", "check the path"]),
    "no-text": ({"calibration.path": "absent.txt"}, ["absent.txt", "no such file"]),
    "too-few": ({"calibration.num_sequences": 5000}, ["5000 were asked for", "fewer"]),
    "too-long": (
        {"calibration.sequence_length": 65, "evaluation": []},
        ["sequence_length 65", "64 positions", "64 or less"],
    ),
    "no-layer": ({"compression.include": ["*.nothing"]}, ["no layer is selected", "lrc inspect"]),
    "unused-pattern": (
        {"compression.layers": {"*.q_prj": {"rank": 4}}},
        ["*.q_prj", "matches no selected layer"],
    ),
    "mixed-units": (
        {"compression.layers": {"*.q_proj": {"method": "svd"}}},
        ["allocation", "relative or uniform"],
    ),
    "loss-of-another-method": (
        {
            "compression.max_loss_increase": 0.1,
            "compression.allocation": "uniform",
            "compression.layers": {"*.q_proj": {"method": "frobenius"}},
        },
        ["max_loss_increase", "q_proj has frobenius"],
    ),
    "error-without-data": (
        {"compression.max_layer_error": 0.5, "compression.method": "svd"},
        ["max_layer_error: svd looks at no data", "use frobenius or curvature"],
    ),
    "root": ({"output.path": "/"}, ["output.path", "'/'"]),
    "here": ({"output.path": "."}, ["exists", "another output.path"]),
    "no-factory": ({"model.factory": "absent_module:build"}, ["absent_module:build"]),
}


@pytest.mark.parametrize("kind", list(BAD))
def test_jobs_that_cannot_be_done(kind: str, tmp_path: Path, llama_job: Changes) -> None:
    changes, pieces = BAD[kind]
    ended = pico.call("compress", pico.job(tmp_path, llama_job | changes), "-q")
    assert_one_sentence(ended, 2, *pieces)
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"compression.size": 0.01},
        {"compression.size": 0.01, "compression.allocation": "uniform"},
        {"compression.size": 0.1, "compression.size_of": "checkpoint"},
        {"compression.layers": {"*.q_proj": {"rank": 64}}},
    ],
)
def test_a_target_that_cannot_be_reached(
    changes: Changes, tmp_path: Path, llama_job: Changes
) -> None:
    ended = pico.call("compress", pico.job(tmp_path, llama_job | changes), "-q")
    assert_one_sentence(ended, 2)
    assert "compression." in ended.err
    assert_nothing_left(tmp_path)


def test_an_empty_text(tmp_path: Path, llama_job: Changes) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    changes = llama_job | {"calibration.path": str(tmp_path / "empty.txt")}
    ended = pico.call("compress", pico.job(tmp_path, changes), "-q")
    assert_one_sentence(ended, 2, "the text is empty", "empty.txt")


def test_tensors_the_model_does_not_take(
    tmp_path: Path, plain_folder: pico.PlainFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(plain_folder.path)
    rows = str(plain_folder.path / "rows.safetensors")
    changes = plain_folder.model("attention") | {"calibration.path": rows}
    ended = pico.call("compress", pico.job(tmp_path, changes), "-q")
    assert_one_sentence(ended, 2, "calibration: the model needs the input 'attention_mask'")
    changes = plain_folder.model("mlp") | {"model.factory": None}
    ended = pico.call("compress", pico.job(tmp_path, changes), "-q")
    assert_one_sentence(ended, 2, "model.factory")


IDS = torch.arange(5, 69).reshape(8, 8)


@pytest.mark.parametrize(
    ("tensors", "pieces"),
    [
        ({"input_ids": IDS.float()}, ["torch.float32", "integers of shape (sequences, tokens)"]),
        ({"input_ids": IDS[0]}, ["shape (8,)", "(sequences, tokens)"]),
        ({"input_ids": IDS - 6}, ["token -1 is negative"]),
        ({"input_ids": IDS + 40}, ["token 108 is not one of the 96"]),
        ({"input_ids": IDS, "attention_mask": torch.ones(8, 7)}, ["(8, 7)", "(8, 8)"]),
        ({"inputs_embeds": torch.ones(8, 3, 5)}, ["fails on inputs_embeds (1, 3, 5)", "check"]),
    ],
)
def test_model_inputs_that_the_network_cannot_take(
    tensors: dict[str, torch.Tensor], pieces: list[str], tmp_path: Path, llama_job: Changes
) -> None:
    save_file(tensors, tmp_path / "data.safetensors")
    changes = llama_job | {"calibration.path": str(tmp_path / "data.safetensors")}
    config = pico.job(tmp_path, changes | {"calibration.num_sequences": 8, "evaluation": []})
    assert_one_sentence(pico.call("compress", config, "-q"), 2, "calibration: ", *pieces)
    assert_nothing_left(tmp_path)


def test_a_forward_that_does_not_fit_the_data(
    tmp_path: Path, plain_folder: pico.PlainFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(plain_folder.path)
    save_file({"x": torch.ones(50, 7)}, tmp_path / "narrow.safetensors")
    data = {"calibration.path": str(tmp_path / "narrow.safetensors")}
    ended = pico.call("compress", pico.job(tmp_path, plain_folder.model("mlp") | data), "-q")
    assert_one_sentence(ended, 2, "calibration: the network fails on x (1, 7): RuntimeError")
