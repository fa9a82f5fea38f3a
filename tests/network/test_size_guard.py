"""A config.json that fits the files not at all is refused in seconds, by name and by key."""

import json
from pathlib import Path
from typing import Any

import pico
import pytest
from command_helpers import assert_one_sentence, damaged, edit_config
from pico import Models

import lrc_cli
from lrc_cli.errors import InputError

CASES: dict[str, tuple[dict[str, Any], str]] = {
    "layers": ({"num_hidden_layers": 10**9}, "config.json: num_hidden_layers is 1000000000"),
    "layers of 90 digits": ({"num_hidden_layers": 10**90}, "config.json: num_hidden_layers"),
    "layers below zero": ({"num_hidden_layers": -5}, "config.json: num_hidden_layers is -5"),
    "no layer": ({"num_hidden_layers": 0}, "config.json: num_hidden_layers gives 0"),
    "fewer layers": ({"num_hidden_layers": 1}, "num_hidden_layers gives 1 of model.layers"),
    "more layers": ({"num_hidden_layers": 3}, "lacks model.layers.2"),
    "layers as text": ({"num_hidden_layers": "2"}, "num_hidden_layers"),
    "layers of a text model": (
        {"text_config": {"num_hidden_layers": 10**9}},
        "config.json: text_config.num_hidden_layers is",
    ),
    "width": ({"hidden_size": 10**9}, "config.json: hidden_size asks for a tensor weight"),
    "width beyond 64 bits": ({"hidden_size": 10**30}, "cannot be loaded"),
    "width below zero": ({"hidden_size": -64}, "negative dimension"),
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
