"""These tests show that an output is there whole or not at all, however the run ends."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lrc_cli.checkpoint.manifest import PARTIAL_MARK, build_manifest
from lrc_cli.checkpoint.output_directory import (
    check_output,
    output_directory,
    resolve_output,
    tidy,
)
from lrc_cli.errors import InputError, RunError
from lrc_cli.runtime.files import copy_file, write_json
from lrc_cli.runtime.processes import Processes


def write_output(path: Path, content: str) -> Path:
    path.mkdir(parents=True)
    return fill(path, content)


def fill(directory: Path, content: str) -> Path:
    """Writes what shows that a directory is an output of lrc's, and a file."""
    for name in ("file", "lrc.yaml", "report.json"):
        (directory / name).write_text(content)
    write_json(directory / "manifest.json", build_manifest(directory))
    return directory


def read_output(path: Path) -> str:
    return (path / "file").read_text()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_block_that_ends_well_is_published(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "out"
    with output_directory(output, force=False) as directory:
        assert directory == tmp_path / "deep" / "out.partial"
        assert names(directory) == [PARTIAL_MARK]
        (directory / "file").write_text("first")
        assert not output.exists()
    assert read_output(output) == "first" and names(output.parent) == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("force", [False, True])
def test_a_block_that_raises_leaves_what_was_there(
    error: type[BaseException], force: bool, tmp_path: Path
) -> None:
    write_output(tmp_path / "out", "old")
    with pytest.raises(error), output_directory(tmp_path / "out", force=force) as directory:
        (directory / "file").write_text("new")
        raise error
    assert read_output(tmp_path / "out") == "old" and names(tmp_path) == ["out"]


def test_an_output_is_replaced_only_when_forced(tmp_path: Path) -> None:
    output = write_output(tmp_path / "out", "first")
    with (
        pytest.raises(RunError, match="appeared while the run went on"),
        output_directory(output, force=False) as directory,
    ):
        (directory / "file").write_text("second")
    assert read_output(output) == "first" and names(tmp_path) == ["out"]
    with output_directory(output, force=True) as directory:
        (directory / "file").write_text("second")
    assert read_output(output) == "second" and names(tmp_path) == ["out"]


def test_a_partial_directory_that_a_kill_left_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "out.partial" / "folder").mkdir(parents=True)
    (tmp_path / "out.partial" / "folder" / "file").write_text("half")
    (tmp_path / "out.partial" / PARTIAL_MARK).touch()
    (tmp_path / "out.lrc-lock").touch()
    with output_directory(tmp_path / "out", force=False) as directory:
        assert names(directory) == [PARTIAL_MARK]
        (directory / "file").write_text("whole")
    assert read_output(tmp_path / "out") == "whole" and names(tmp_path) == ["out"]


def test_what_two_renames_left_is_finished_before_the_block(tmp_path: Path) -> None:
    write_output(tmp_path / "out.lrc-old", "old")
    with pytest.raises(ValueError), output_directory(tmp_path / "out", force=True):
        assert read_output(tmp_path / "out") == "old"
        raise ValueError
    assert read_output(tmp_path / "out") == "old" and names(tmp_path) == ["out"]


class Second(Processes):
    """The second of two processes; the first process does nothing here."""

    rank, size = 1, 2

    def __init__(self) -> None:
        self.asked = 0

    def from_first(self, compute: Callable[[], Any]) -> Any:
        self.asked += 1


@pytest.mark.parametrize("fails", [False, True])
def test_only_the_first_process_touches_the_disk(fails: bool, tmp_path: Path) -> None:
    write_output(tmp_path / "out.partial", "the first one's")
    second = Second()
    try:
        with output_directory(tmp_path / "out", force=True, processes=second) as directory:
            assert directory == tmp_path / "out.partial"
            if fails:
                raise ValueError
    except ValueError:
        assert fails
    assert second.asked == (2 if fails else 3)
    assert names(tmp_path) == ["out.partial"]
    assert read_output(tmp_path / "out.partial") == "the first one's"


def crashing(original: Any, count: list[int], at: int) -> Any:
    """Returns the function with KeyboardInterrupt in place of call number `at` of all calls."""

    def call(*arguments: Any, **options: Any) -> Any:
        count[0] += 1
        if count[0] == at:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    return call


@pytest.mark.parametrize("is_killed", [False, True])
def test_every_crash_while_it_is_published_leaves_one_whole_output(
    is_killed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal lets the partial directory be removed; a kill lets nothing be done any more."""
    left = []
    for at in range(1, 6):
        output = write_output(tmp_path / str(at) / "out", "old")
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            count = [0]
            rmtree = crashing(shutil.rmtree, count, at)
            with output_directory(output, force=True) as directory:
                fill(directory, "new")
                patch.setattr(Path, "rename", crashing(Path.rename, count, at))
                patch.setattr(os, "fsync", crashing(os.fsync, count, at))
                if is_killed:
                    patch.setattr(shutil, "rmtree", killed_at(rmtree, directory))
                else:
                    patch.setattr(shutil, "rmtree", rmtree)
        left.append((directory.exists(), output.exists()))
        tidy(output)
        assert read_output(output) in ("old", "new")
        assert not output.with_name("out.lrc-old").exists()
        if is_killed:
            with output_directory(output, force=True) as directory:
                (directory / "file").write_text("again")
            assert read_output(output) == "again" and names(output.parent) == ["out"]
    if is_killed:
        assert (True, False) in left, "no crash came between the two renames"
    else:
        assert not any(partial for partial, _ in left)


def killed_at(rmtree: Any, partial: Path) -> Any:
    """Returns `shutil.rmtree` of a process that is gone before it removes the partial directory."""

    def call(path: Path) -> None:
        if path != partial:
            rmtree(path)

    return call


def test_folders_are_on_the_disk_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "side").write_text("side")
    synced: list[tuple[int, bool]] = []

    def fsync(descriptor: int) -> None:
        synced.append((os.fstat(descriptor).st_ino, (tmp_path / "out").exists()))

    with output_directory(tmp_path / "out", force=False) as directory:
        copy_file(tmp_path / "side", directory / "a" / "b")
        assert (tmp_path / "out.partial" / "a" / "b").read_text() == "side"
        monkeypatch.setattr(os, "fsync", fsync)
    folder = (tmp_path / "out" / "a").stat().st_ino
    assert (folder, False) in synced


HOLD = """
import sys, time
from pathlib import Path
from lrc_cli.checkpoint.output_directory import output_directory
with output_directory(Path(sys.argv[1]), force=False) as directory:
    (directory / "file").write_text("first")
    print("begun", flush=True)
    time.sleep(600)
"""


def test_one_output_is_written_by_one_run(tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = [sys.executable, "-c", HOLD, str(output)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "begun\n"
        with (
            pytest.raises(RunError, match="another lrc run is writing it; wait"),
            output_directory(output, force=True),
        ):
            raise AssertionError("two runs write one output")
        write_output(tmp_path / "out.lrc-old", "old")
        with pytest.raises(RunError, match="another lrc run is writing it"):
            tidy(output)
        assert read_output(tmp_path / "out.partial") == "first"
        other.kill()
    tidy(output)
    assert read_output(output) == "old"
    with output_directory(output, force=True) as directory:
        (directory / "file").write_text("second")
    assert read_output(output) == "second"
    assert names(tmp_path) == ["out"], "the lock outlived its run"


def test_an_output_is_the_directory_it_leads_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_output("a/../out") == tmp_path / "out" and resolve_output(".") == tmp_path
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(InputError, match="is a link to nothing; remove it"):
        resolve_output("link")
    (tmp_path / "real").mkdir()
    assert resolve_output("link") == tmp_path / "real"
    with pytest.raises(InputError, match="'/' is not a directory to write"):
        resolve_output("/")


def test_what_is_no_place_for_an_output_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is not a writable directory"):
        check_output(tmp_path / "file" / "out", force=True)
    output = write_output(tmp_path / "out", "lrc's")
    with pytest.raises(InputError, match="the output exists; give --force"):
        check_output(output, force=False)
    check_output(output, force=True)
    (output / "notes").write_text("somebody else's")
    with pytest.raises(InputError, match="--force would delete notes, which lrc did not write"):
        check_output(output, force=True)
    check_output(tmp_path / "new" / "out", force=False)
    assert names(tmp_path) == ["file", "out"]


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        '{"name": "app", "start_url": "/"}',
        '{"manifest_version": 3, "name": "an extension"}',
        '{"manifest_version": 1, "files": {}, "tensors": {}}',
        '{"manifest_version": 1, "files": {"lrc.yaml": 1, "report.json": 2}, "tensors": {}}',
        "[" * 100_000,
        '{"manifest_version": ' + "1" * 5000 + "}",
        "\0",
        "",
    ],
)
def test_a_manifest_that_lrc_did_not_write_proves_nothing(content: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text(content)
    for force in (False, True):
        with pytest.raises(InputError, match="was not written by lrc"):
            check_output(tmp_path / "out", force=force)
    assert (tmp_path / "out" / "manifest.json").read_text() == content


def test_nothing_that_appears_under_the_name_is_replaced(tmp_path: Path) -> None:
    with (
        pytest.raises(RunError, match="that lrc did not write appeared"),
        output_directory(tmp_path / "out", force=True) as directory,
    ):
        fill(directory, "new")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "file").write_text("somebody else's")
    assert read_output(tmp_path / "out") == "somebody else's" and names(tmp_path) == ["out"]


def test_a_directory_of_a_stranger_between_two_renames_stays(tmp_path: Path) -> None:
    write_output(tmp_path / "out.lrc-old", "old")
    (tmp_path / "out").mkdir()
    tidy(tmp_path / "out")
    assert read_output(tmp_path / "out.lrc-old") == "old" and names(tmp_path / "out") == []
    (tmp_path / "out").rmdir()
    tidy(tmp_path / "out")
    assert read_output(tmp_path / "out") == "old" and names(tmp_path) == ["out"]


def test_a_kill_between_the_rename_and_the_mark_leaves_a_clean_output(tmp_path: Path) -> None:
    output = write_output(tmp_path / "out", "new")
    (output / PARTIAL_MARK).touch()
    tidy(output)
    assert read_output(output) == "new" and PARTIAL_MARK not in names(output)
    assert names(tmp_path) == ["out"]
