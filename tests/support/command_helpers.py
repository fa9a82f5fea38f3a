"""Commands refuse in one sentence; these helpers check it, on checkpoints with something wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pico
import torch
from safetensors.torch import save_file

Changes = dict[str, Any]


def assert_one_sentence(ended: pico.Ended, code: int, *pieces: str) -> None:
    """Standard error has one line with cause and remedy, and standard output nothing."""
    assert ended.code == code, ended.err
    assert ended.out == ""
    assert ended.err.startswith("error: ") and ended.err.count("\n") == 1, ended.err
    assert "; " in ended.err, "no remedy"
    for piece in pieces:
        assert piece in ended.err


def assert_nothing_left(directory: Path) -> None:
    """No output, whole or unfinished, lies in the directory of a job."""
    names = {path.name for path in directory.iterdir()}
    assert not names & {"out", "out.partial", "out.lrc-old"}


def damaged(directory: Path, source: Path, damage: Callable[[Path], None]) -> Path:
    """Returns a copy of a checkpoint with something wrong."""
    shutil.copytree(source, directory / "model")
    damage(directory / "model")
    return directory / "model"


def edit_config(**changes: Any) -> Callable[[Path], None]:
    """Returns a damage: other keys of config.json."""

    def edit(path: Path) -> None:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | changes))

    return edit


def edit_state(edit: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    """Returns a damage: other tensors, in one file."""

    def write(path: Path) -> None:
        state = pico.read_state(path)
        edit(state)
        save_file(state, path / "model.safetensors", {"format": "pt"})

    return write
