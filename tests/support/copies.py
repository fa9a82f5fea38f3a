"""Copies of a pico checkpoint are made here, good and bad, and certified."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pico
import torch
from pico import State
from safetensors.torch import save_file

from lrc_cli.certify.record import CopyRecord, read_record

Change = Callable[[State], None]
FAST = ("--sequence-length", "16", "--num-sequences", "24", "-q", "--set", "runtime.dtype=float32")
"""Options for few short sequences, in a dtype that does not depend on the machine."""


def copy_of(source: Path, target: Path, change: Change | None = None) -> Path:
    """Copies a transformers directory, and changes tensors of its weight file."""
    shutil.copytree(source, target)
    if change is not None:
        state = pico.read_state(source)
        change(state)
        for file in target.glob("model*"):
            file.unlink()
        save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    return target


def noisy(state: State, size: float = 0.02) -> None:
    """Adds noise to all matrices, relative to their entries."""
    chance = torch.Generator().manual_seed(3)
    for name, tensor in state.items():
        if tensor.ndim == 2:
            noise = torch.randn(tensor.shape, generator=chance) * tensor.float().std() * size
            state[name] = (tensor + noise).to(tensor.dtype)


def certified(original: Path, copy: Path, data: Path, output: Path, *options: str) -> CopyRecord:
    """Runs `lrc certify`, which must succeed, and returns its record."""
    arguments = ("--against", original, "--data", data, "--output", output, *FAST, *options)
    ended = pico.call("certify", copy, *arguments)
    assert ended.code == 0, ended.err
    assert ended.out == f"{output}\n"
    return read_record(output)
