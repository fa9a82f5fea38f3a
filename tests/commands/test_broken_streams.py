"""Commands are started as a shell starts them, with streams that are closed, full or left alone.

A command whose result is what it prints fails where the result is lost. A job keeps its output.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pico
import pytest

from lrc_cli import __version__


def run(redirections: str, *arguments: object) -> tuple[int, str, str]:
    """Returns the exit code of `lrc`, and what reached standard output and standard error."""
    shell = f'"$@" {redirections}'
    command = ["sh", "-c", shell, "sh", sys.executable, "-m", "lrc_cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    return done.returncode, done.stdout, done.stderr


FULL = "standard output cannot be written: No space left on device"
CLOSED = "standard output cannot be written: it is closed"
LIGHT: dict[str, tuple[str, Sequence[str], int, str]] = {
    "schema, full": (">/dev/full", ["schema"], 1, FULL),
    "schema, closed": (">&-", ["schema"], 1, CLOSED),
    "schema, both closed": (">&- 2>&-", ["schema"], 1, ""),
    "schema, all closed": ("<&- >&- 2>&-", ["schema"], 1, ""),
    "schema, both full": (">/dev/full 2>/dev/full", ["schema"], 1, ""),
    "schema, a file that cannot be written": ("1</dev/null", ["schema"], 1, "Bad file descriptor"),
    "help, full": (">/dev/full", ["--help"], 1, FULL),
    "help of a command, closed": (">&-", ["plan", "--help"], 1, CLOSED),
    "version, full": (">/dev/full", ["--version"], 1, FULL),
    "version, stderr closed": ("2>&-", ["--version"], 0, ""),
    "version, stdin closed": ("<&-", ["--version"], 0, ""),
    "bad usage, stderr full": ("2>/dev/full", ["nope"], 2, ""),
    "bad usage, stderr closed": ("2>&-", ["nope"], 2, ""),
    "no config, both closed": (">&- 2>&-", ["plan", "absent.yaml"], 2, ""),
}


@pytest.mark.parametrize(("redirections", "arguments", "code", "said"), LIGHT.values(), ids=LIGHT)
def test_a_result_that_is_lost_is_exit_one(
    redirections: str, arguments: Sequence[str], code: int, said: str
) -> None:
    ended = run(redirections, *arguments)
    assert ended[0] == code
    assert ended[2].count("\n") == bool(said) and said in ended[2]
    assert "Traceback" not in ended[2] and (code or __version__ in ended[1])


def test_a_reader_that_goes_away_is_told_nothing() -> None:
    done = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m lrc_cli schema | true"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and done.stderr == ""


JOBS = {
    "all closed": ("<&- >&- 2>&-", ""),
    "both full": (">/dev/full 2>/dev/full", ""),
    "stdout closed": (">&-", "it is closed; the output is "),
}


@pytest.mark.parametrize(("redirections", "said"), JOBS.values(), ids=JOBS)
def test_a_job_keeps_its_output(
    redirections: str,
    said: str,
    tmp_path: Path,
    plain_folder: pico.PlainFolder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(plain_folder.path), prepend=os.pathsep)
    job = pico.job(tmp_path, plain_folder.model("mlp"))
    code, out, err = run(redirections, "compress", job)
    assert code == 0 and out == "" and said in err and "Traceback" not in err
    assert pico.call("verify", tmp_path / "out").code == 0


def test_json_that_is_lost_is_exit_one_and_the_output_stays(
    tmp_path: Path, llama_job: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    job, junit = pico.job(tmp_path, llama_job), tmp_path / "gates.xml"
    with open("/dev/full", "w") as full, monkeypatch.context() as patch:
        patch.setattr("contextlib.redirect_stdout", lambda _: _Redirected(full))
        ended = pico.call("compress", job, "--json", "--junit", junit)
    assert ended.code == 1 and FULL in ended.err.splitlines()[-1]
    assert (tmp_path / "out" / "manifest.json").exists() and junit.exists()


class _Redirected:
    """A context in which standard output is another stream."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __enter__(self) -> None:
        self.before, sys.stdout = sys.stdout, self.stream

    def __exit__(self, *_: object) -> None:
        sys.stdout = self.before


@pytest.mark.parametrize(
    ("number", "seconds", "code"),
    [
        (signal.SIGINT, 0.5, 130),
        (signal.SIGTERM, 1.0, 143),
        (signal.SIGHUP, 2.0, 129),
        (signal.SIGINT, 3.0, 130),
    ],
)
def test_a_signal_at_any_time_is_one_sentence(
    number: signal.Signals, seconds: float, code: int, checkpoint: pico.Models
) -> None:
    """The signals come while modules are imported; some come twice."""
    running = subprocess.Popen(
        [sys.executable, "-c", WAITING, "inspect", str(checkpoint("llama"))],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert running.stderr is not None and running.stderr.readline() == "begun\n"
    time.sleep(seconds)
    running.send_signal(number)
    running.send_signal(number)
    _, err = running.communicate(timeout=60)
    assert running.returncode == code, err
    assert err == "interrupted; the same command goes on where it stopped\n"


WAITING = """
import sys, time, lrc_cli.network
from lrc_cli import cli

class Slow:
    def find_spec(self, name, *rest):
        if name == "lrc_cli.network.inventory":
            time.sleep(60)

sys.meta_path.insert(0, Slow())
print("begun", file=sys.stderr, flush=True)
cli.main()
"""


def test_a_name_of_two_lines_is_one_line(tmp_path: Path, llama_job: dict[str, Any]) -> None:
    name = "rest\nerror: \x1b[2J\u202e"
    text = {"name": name, "path": llama_job["calibration.path"], "part": [0.6, 1.0]}
    changes = llama_job | {"evaluation": [text | {"num_sequences": 4}]}
    ended = pico.call("compress", pico.job(tmp_path, changes), "--junit", tmp_path / "x.xml")
    assert ended.code == 0 and "rest\\nerror: \\x1b[2J\\u202e: perplexity" in ended.err
    for page in ("README.md", "report.html", "../x.xml"):
        shown = (tmp_path / "out" / page).read_text()
        assert "\x1b" not in shown and "\u202e" not in shown and "\\x1b" in shown
    for command in (["eval"], ["verify"]):
        shown = pico.call(*command, tmp_path / "out").out
        assert "\x1b" not in shown and "\u202e" not in shown and "\nerror: " not in shown
    assert os.path.exists(tmp_path / "out" / "manifest.json")
