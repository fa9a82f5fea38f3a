"""These tests run every example at the end of a command's help as it stands.

The folder has files with the names that the examples use.
"""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pico
import pytest
import yaml

from lrc_cli.cli import lrc

HEADING = "Examples:"


def examples(command: click.Command, name: str) -> list[str]:
    """Returns the lines after the heading in a command's help."""
    context = click.Context(command, info_name=name)
    _, _, end = command.get_help(context).partition(HEADING)
    return [line.strip() for line in end.splitlines() if line.strip()]


ALL = {name: examples(command, name) for name, command in {"lrc": lrc, **lrc.commands}.items()}
LINES = sorted({line for lines in ALL.values() for line in lines})


@pytest.mark.parametrize("name", ALL)
def test_every_help_ends_with_one_to_three_examples_of_its_command(name: str) -> None:
    start = "lrc " if name == "lrc" else f"lrc {name}"
    assert 1 <= len(ALL[name]) <= 3 and all(line.startswith(start) for line in ALL[name])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes a checkpoint, a text, a config and its output, named as in the examples."""
    root = tmp_path_factory.mktemp("examples")
    (root / "models").mkdir()
    pico.write_model(root / "models" / "llama", "llama")
    (root / "text.txt").write_text(pico.words(6000))
    changes = {
        "model.path": "models/llama",
        "calibration.path": "text.txt",
        "output.path": "out/llama",
        "runtime.work_dir": "work",
    }
    pico.job(root, changes).rename(root / "lrc.yaml")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        ended = pico.call("compress", "lrc.yaml", "-q")
    assert ended.code == 0, ended.err
    certify = {
        "original": {"path": "models/llama"},
        "other": {"path": "out/llama"},
        "data": {"path": "text.txt", "sequence_length": 32},
    }
    (root / "certify.yaml").write_text(yaml.safe_dump(certify))
    return root


@pytest.mark.parametrize("line", LINES)
def test_an_example_runs_as_it_stands(
    line: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    if line.startswith("lrc compress"):
        shutil.rmtree(tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    program, *arguments = shlex.split(line)
    ended = pico.call(*arguments)
    assert program == "lrc" and ended.code == 0, ended.err
    assert ended.out


HELPS = """
import sys
from lrc_cli.cli import lrc, run_command
for name in ([], *([name] for name in lrc.commands)):
    sys.argv = ["lrc", *name, "--help"]
    assert run_command(lrc) == 0
    heavy = {"torch", "transformers", "numpy", "safetensors"} & set(sys.modules)
    assert not heavy, (name, heavy)
"""


def test_no_help_imports_anything_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", HELPS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(HEADING) == len(ALL)
