"""Commands refuse in one sentence; these helpers check it, on checkpoints with something wrong."""

import hashlib
import json
import os
import shutil
import stat
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


def seen(root: Path) -> dict[str, Any]:
    """Everything below a folder: kinds, modes, contents, targets of links; no link is followed."""
    found: dict[str, Any] = {}
    for path in sorted(root.rglob("*")):
        mode = path.lstat().st_mode
        content = ""
        if stat.S_ISREG(mode):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        elif stat.S_ISLNK(mode):
            content = os.readlink(path)
        found[path.relative_to(root).as_posix()] = (mode, content)
    return found


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
