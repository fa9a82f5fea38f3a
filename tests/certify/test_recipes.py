"""The recipes of docs/certify.md for CI accept a good copy and refuse a bad one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from copies import copy_of, noisy
from pico import Models

ROOT = Path(__file__).resolve().parents[2]


def block(language: str) -> str:
    """Returns the block of code of a language that stands under the heading on CI."""
    _, _, text = (ROOT / "docs" / "certify.md").read_text("utf-8").partition("## In CI\n")
    found = re.search(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert found, language
    return found[1]


@pytest.fixture
def folder(tmp_path: Path, checkpoint: Models, text: Path) -> Path:
    """Returns a folder with two checkpoints, a text, the recipes, and lrc on the way to it."""
    copy_of(checkpoint("llama"), tmp_path / "original")
    copy_of(checkpoint("llama"), tmp_path / "copy", noisy)
    (tmp_path / "text.txt").write_text(text.read_text())
    program = tmp_path / "bin" / "lrc"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m lrc_cli "$@"\n')
    program.chmod(0o755)
    (tmp_path / "Makefile").write_text(block("make"))
    (step,) = (
        step["run"]
        for step in yaml.safe_load(block("yaml"))["jobs"]["certify"]["steps"]
        if "lrc certify" in step.get("run", "")
    )
    (tmp_path / "step.sh").write_text(step)
    return tmp_path


def write_config(folder: Path, limit: float) -> None:
    data = {"path": "text.txt", "num_sequences": 24, "sequence_length": 16}
    values = {
        "original": {"path": "original"},
        "other": {"path": "copy"},
        "data": data,
        "gates": {"max_kl_mean": limit, "max_flags": 0},
    }
    (folder / "certify.yaml").write_text(yaml.safe_dump(values))


@pytest.mark.parametrize("command", [["bash", "-e", "step.sh"], ["make", "faithful"]])
def test_a_recipe_accepts_and_refuses(command: list[str], folder: Path) -> None:
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )

    write_config(folder, 5.0)
    accepted = run()
    assert accepted.returncode == 0, accepted.stderr
    assert "0 fails" in accepted.stdout and (folder / "certify.xml").is_file()
    write_config(folder, 1e-9)
    refused = run()
    assert refused.returncode != 0 and "gates.max_kl_mean: 1e-09 is missed" in refused.stderr
    assert "0 fails" not in refused.stdout
