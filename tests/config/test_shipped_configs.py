"""Every file of configs/: read by the real schema, and run on a pico model of its kind."""

from pathlib import Path

import jsonschema
import media_helpers
import pico
import pytest
import yaml
from families import FAMILIES
from pico import Models

from lrc_cli.config import json_schema, load_config

FOLDER = Path(__file__).resolve().parents[2] / "configs"
CONFIGS = sorted(FOLDER.glob("*.yaml"))
KINDS = {"decoder", "encoder", "experts", "plain", "speech", "vision"}
TEXTS = {"decoder": "llama", "encoder": "bert"}


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_a_config_is_short_commented_and_what_the_schema_says(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    lines = text.splitlines()
    assert lines[0].startswith("# ") and len(lines) <= 35
    assert max(map(len, lines)) <= 120
    assert sum("#" in line for line in lines[1:]) >= 2
    load_config(file)
    jsonschema.Draft202012Validator(json_schema()).validate(yaml.safe_load(text))


def test_every_kind_of_model_has_one() -> None:
    assert {file.stem for file in CONFIGS} >= KINDS


def run(kind: str, model: Path, data: Path, output: Path, *settings: str) -> set[str]:
    """Compress by a shipped config on other files and few sequences; the factorised layers."""
    few = ["model.path", model], ["calibration.path", data], ["calibration.num_sequences", 8]
    changes = [f"{key}={value}" for key, value in few]
    changes += ["evaluation.0.num_sequences=2", f"evaluation.0.path={data}", *settings]
    if kind == "plain":
        changes = [change for change in changes if "evaluation" not in change]
    options = [option for change in changes for option in ("--set", change)]
    ended = pico.call("compress", FOLDER / f"{kind}.yaml", "--output", output, *options)
    assert ended.code == 0, ended.err
    return set(pico.factorised_keys(pico.read_state(output)))


@pytest.mark.parametrize("kind", TEXTS)
def test_configs_of_text_models_run(
    kind: str, checkpoint: Models, text: Path, tmp_path: Path
) -> None:
    settings = ["calibration.sequence_length=32"]
    if kind == "decoder":
        settings += ["certification.sequence_length=16", "certification.num_sequences=8"]
        settings += ["gates.max_perplexity_increase=1e6"]
    else:
        settings += ["evaluation.1.num_sequences=2", f"evaluation.1.path={text}"]
    assert run(kind, checkpoint(TEXTS[kind]), text, tmp_path / "out", *settings)


def test_the_config_of_experts_leaves_attention_alone(text: Path, tmp_path: Path) -> None:
    model = FAMILIES["mixtral"].build()
    model.resize_token_embeddings(len(pico.VOCABULARY))
    pico.randomise(model)
    model.save_pretrained(tmp_path / "model")
    pico.write_tokenizer(tmp_path / "model")
    settings = ["calibration.sequence_length=32", "calibration.num_sequences=32"]
    layers = run("experts", tmp_path / "model", text, tmp_path / "out", *settings)
    assert layers and all(".experts." in layer for layer in layers)


def test_the_config_of_speech_runs(tmp_path: Path) -> None:
    model = media_helpers.write_model(tmp_path / "model", "whisper")
    data = media_helpers.write_recordings(tmp_path / "data", transcripts=True)
    layers = run("speech", model, data, tmp_path / "out")
    assert any("encoder" in layer for layer in layers)


def test_the_config_of_images_runs(tmp_path: Path) -> None:
    model = media_helpers.write_model(tmp_path / "model", "vit")
    data = media_helpers.write_images(tmp_path / "data")
    assert run("vision", model, data, tmp_path / "out", "evaluation.0.num_sequences=2")


def test_the_config_of_a_plain_module_runs(
    plain_folder: pico.PlainFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(plain_folder.path)
    settings = ["model.factory=pico_factories:mlp", "compression.size=0.6"]
    model, data = (plain_folder.path / f"{name}.safetensors" for name in ("mlp", "rows"))
    assert run("plain", model, data, tmp_path / "out", *settings)
