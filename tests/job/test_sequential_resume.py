"""These tests stop runs with `compression.sequential`, which then go on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pico
import pytest
from pico import Models
from sequential_helpers import (
    MANY,
    Changes,
)

from lrc_cli.errors import RunError
from lrc_cli.job.factors.two_networks import TwoNetworks


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, checkpoint: Models, text: Path
) -> Callable[[str], tuple[Changes, Path]]:
    """Returns a model's job, and what the job writes when nothing happens."""
    found: dict[str, tuple[Changes, Path]] = {}

    def run(name: str) -> tuple[Changes, Path]:
        if name not in found:
            paths = {"model.path": str(checkpoint(name)), "calibration.path": str(text)}
            changes = paths | MANY | {"compression.size": 0.4, "compression.sequential": True}
            found[name] = changes, pico.compressed(tmp_path_factory.mktemp(name), changes)[0]
        return found[name]

    return run


@pytest.mark.parametrize(
    ("name", "moment", "units"), [("llama", 3, 0), ("llama", 10, 1), ("bert", 12, 2)]
)
def test_a_stopped_run_goes_on_to_the_same_bytes(
    name: str,
    moment: int,
    units: int,
    tmp_path: Path,
    undisturbed: Callable[[str], tuple[Changes, Path]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The run stops inside a block, inside the next block, and before the final pooler."""
    changes, expected = undisturbed(name)
    install, done = TwoNetworks.install, []

    def stopping(*arguments: Any) -> None:
        if len(done) == moment:
            raise RunError("stopped by the test")
        done.append(arguments[1].name)
        install(*arguments)

    monkeypatch.setattr(TwoNetworks, "install", stopping)
    config = pico.job(tmp_path, changes)
    ended = pico.call("compress", config, "-q")
    assert ended.code == 1 and "stopped by the test" in ended.err
    monkeypatch.setattr(TwoNetworks, "install", install)
    stored = {f: f.stat().st_mtime_ns for f in tmp_path.glob(".lrc-work/*/factors/*/*.safetensors")}
    assert len(stored) == units
    assert pico.call("compress", config, "-q").code == 0
    assert all(file.stat().st_mtime_ns == time for file, time in stored.items())
    for file in expected.glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()
    reports = [json.loads((p / "report.json").read_text()) for p in (expected, tmp_path / "out")]
    assert reports[0]["layers"] == reports[1]["layers"]
