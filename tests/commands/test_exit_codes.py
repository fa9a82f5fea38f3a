"""These tests show that refusals of the system and mistakes in code end in one sentence."""

import contextlib
import errno
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lrc_cli.cli import run_command


@pytest.mark.parametrize(
    ("number", "goes_on"), [(errno.EACCES, False), (errno.ENOENT, False), (errno.ENOSPC, True)]
)
def test_only_a_full_disk_promises_to_go_on(number: int, goes_on: bool) -> None:
    def fail(**_: Any) -> None:
        raise OSError(number, os.strerror(number), "some/file")

    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        assert run_command(fail) == 1
    line = err.getvalue()
    assert line.startswith(f"error: some/file: {os.strerror(number)}; ") and line.count("\n") == 1
    assert ("goes on where it stopped" in line) == goes_on


def test_a_closed_pipe_is_no_traceback() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [Path(sys.executable).with_name("lrc"), "schema"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert done.stderr == "" and done.returncode == 1


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB.\nMore."),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"
        ),
    ],
)
def test_no_memory_left_is_one_sentence_with_the_lever(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(**_: Any) -> None:
        raise error

    assert run_command(fails) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: out of memory (") and said.count("\n") == 1
    assert "ask `lrc plan` what it takes" in said


def test_an_error_of_ours_is_not_taken_for_want_of_memory(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fails(**_: Any) -> None:
        raise RuntimeError("a mistake in the code")

    assert run_command(fails) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: RuntimeError: a mistake in the code (raised in ")
    assert said.count("\n") == 1 and "memory" not in said
