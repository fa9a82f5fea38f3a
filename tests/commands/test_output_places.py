"""These tests name places that an output or a work directory may not or cannot take."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pico
import pytest
from command_helpers import Changes, assert_one_sentence


def test_an_output_in_the_checkpoint_or_around_it(tmp_path: Path, llama_job: Changes) -> None:
    model = tmp_path / "outer" / "model"
    shutil.copytree(llama_job["model.path"], model)
    for output in (model / "small", tmp_path / "outer"):
        changes = llama_job | {"model.path": str(model), "output.path": str(output)}
        ended = pico.call("compress", pico.job(tmp_path, changes), "-q", "--force")
        assert_one_sentence(ended, 2, "lie in one another")


def test_force_through_a_link_replaces_what_it_leads_to(tmp_path: Path, llama_job: Changes) -> None:
    real, _ = pico.compressed(tmp_path, llama_job | {"compression.method": "svd"})
    (tmp_path / "link").symlink_to("out")
    changes = {"compression.size": 0.5, "compression.method": "svd"}
    changes["output.path"] = str(tmp_path / "link")
    _, report = pico.compressed(tmp_path, llama_job | changes, "--force")
    assert (tmp_path / "link").is_symlink()
    assert json.loads((real / "report.json").read_text()) == report
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {".lrc-work", "job.yaml", "link", "out"}


REFUSING = {
    "proc": "/proc/x",
    "deep-in-proc": "/proc/x/y/z",
    "sys": "/sys/x",
    "below-a-file": f"{__file__}/x",
    "read-only": "{tmp}/read-only/x",
}
"""Returns places in which not even root can make anything."""


@pytest.mark.parametrize("command", ["compress", "plan"])
@pytest.mark.parametrize("key", ["output.path", "runtime.work_dir"])
@pytest.mark.parametrize("kind", list(REFUSING))
def test_a_place_that_cannot_be_written(
    kind: str,
    key: str,
    command: str,
    tmp_path: Path,
    llama_job: Changes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "read-only").mkdir()
    make = os.mkdir

    def refuse(path: Any, *rest: Any, **more: Any) -> None:
        # A read-only disk refuses in this way. File modes would not keep root out.
        if "read-only" in str(path):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
        make(path, *rest, **more)

    monkeypatch.setattr(os, "mkdir", refuse)
    place = REFUSING[kind].format(tmp=tmp_path)
    ended = pico.call(command, pico.job(tmp_path, llama_job | {key: place}), "-q")
    assert_one_sentence(ended, 2, f"error: {key}: ", "not a writable", f"; choose another {key}")
    names = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*"))
    assert names == ["job.yaml", "read-only"]


def test_a_work_directory_that_is_a_file_or_takes_nothing(
    tmp_path: Path, llama_job: Changes
) -> None:
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file", Path("/proc")):
        changes = llama_job | {"runtime.work_dir": str(place)}
        ended = pico.call("compress", pico.job(tmp_path, changes), "-q")
        assert_one_sentence(ended, 2, f"error: runtime.work_dir: {place} is not a writable")
    assert (tmp_path / "file").read_text() == "x"


def test_an_output_that_cannot_be_made(tmp_path: Path, llama_job: Changes) -> None:
    (tmp_path / "file").write_text("x")
    model = tmp_path / "model"
    shutil.copytree(llama_job["model.path"], model)
    for output, piece in (
        (tmp_path / "file" / "out", "not a writable directory"),
        (tmp_path / "file", "exists"),
        (model, "is the checkpoint itself"),
    ):
        changes = llama_job | {"model.path": str(model), "output.path": str(output)}
        for options in ((), ("--force",)):
            ended = pico.call("compress", pico.job(tmp_path, changes), "-q", *options)
            assert_one_sentence(ended, 2, piece)
    assert (tmp_path / "file").read_text() == "x" and not (model / "report.json").exists()
