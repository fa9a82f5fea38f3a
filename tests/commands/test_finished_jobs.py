"""A job counts as done when its output is whole and its config, data and code are unchanged."""

import shutil
from pathlib import Path

import pico
import pytest
from command_helpers import Changes, assert_one_sentence


def add_line(file: Path) -> None:
    file.write_text(file.read_text() + "\n")


@pytest.mark.parametrize("name", ["tokenizer_config.json", "LICENSE", "modeling_own.py"])
def test_another_file_of_the_checkpoint_is_another_job(
    name: str, tmp_path: Path, llama_job: Changes
) -> None:
    model = tmp_path / "model"
    shutil.copytree(llama_job["model.path"], model)
    (model / "modeling_own.py").write_text("x = 1\n")
    changes = llama_job | {"model.path": str(model), "compression.method": "svd"}
    output, _ = pico.compressed(tmp_path, changes)
    assert "already" in pico.call("compress", tmp_path / "job.yaml").err
    add_line(model / name)
    assert_one_sentence(pico.call("compress", tmp_path / "job.yaml", "-q"), 2, "--force")
    pico.compressed(tmp_path, changes, "--force")
    assert (output / name).read_bytes() == (model / name).read_bytes()
    assert len(list((tmp_path / ".lrc-work").iterdir())) == 2, "stale statistics were used"


def test_another_factory_is_another_job(
    tmp_path: Path, plain_folder: pico.PlainFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(plain_folder.path, folder)
    (folder / "pico_factories.py").rename(folder / "moved_factories.py")
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    changes = plain_folder.model("mlp") | {"model.factory": "moved_factories:mlp"}
    pico.compressed(tmp_path, changes)
    assert "already" in pico.call("compress", tmp_path / "job.yaml").err
    add_line(folder / "moved_factories.py")
    assert_one_sentence(pico.call("compress", tmp_path / "job.yaml", "-q"), 2, "--force")
    pico.compressed(tmp_path, changes, "--force")
    assert len(list((tmp_path / ".lrc-work").iterdir())) == 2, "stale statistics were used"


@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_a_damaged_output_is_not_done(damage: str, tmp_path: Path, llama_job: Changes) -> None:
    output, _ = pico.compressed(tmp_path, llama_job | {"compression.method": "svd"})
    file = output / "model.safetensors"
    data = file.read_bytes()
    file.unlink()
    if damage == "changed":
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    ended = pico.call("compress", tmp_path / "job.yaml", "-q")
    assert_one_sentence(ended, 2, "the output exists", "--force")
