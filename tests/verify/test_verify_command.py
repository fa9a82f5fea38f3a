"""`lrc verify` as a user meets it: what it prints, its exit codes, and what it does not import."""

import json
import subprocess
import sys
from pathlib import Path

import damage
import pico
import pytest
from verify_helpers import Made

FORBIDDEN = (
    *("engine", "job", "report.gates", "network.candidates.new_bias"),
    *("quality.compare", "quality.held_out", "quality.certificate", "quality.worst_case"),
)
"""Modules that made the output: verification may import none of them."""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "does not exist"),
        (["{original}"], "not a finished output"),
        (["{output}", "--against", "nowhere"], "does not exist"),
        (["{output}", "--against", "{output}"], "already quantised or compressed"),
        (["{output}", "--against", "{original}", "--data", "nowhere"], "no such file"),
        (["{output}", "--manifest-sha256", "abc"], "not a sha256"),
    ],
)
def test_wrong_use_is_said_in_one_line(made: Made, arguments: list[str], words: str) -> None:
    places = {"output": made.output, "original": made.original}
    ended = pico.call("verify", *(text.format(**places) for text in arguments), "-q")
    assert ended.code == 2
    assert words in ended.err
    assert ended.err.startswith("error: ") and ended.err.count("\n") == 1


def test_the_command_says_what_fails_first_and_what_to_pin(made: Made, tmp_path: Path) -> None:
    fine = pico.call("verify", made.output, "-q")
    assert fine.code == 0
    assert fine.out.rstrip().endswith(made.pin)
    assert "holds: tensors.hash: " in fine.out
    output = damage.copied(made.output, tmp_path)
    damage.edit_the_card(output)
    ended = pico.call("verify", output, "-q")
    assert ended.code == 3
    assert ended.out.startswith("fails: files.hash: README.md")
    found = json.loads(pico.call("verify", output, "--json", "-q").out)
    assert found["failed"] is True
    keys = {key for statement in found["statements"] for key in statement}
    assert keys == {"id", "what", "status", "detail"}


def test_verification_imports_nothing_of_the_run() -> None:
    script = "import sys, lrc_cli.verify; print(*[m for m in sys.modules if m.startswith('lrc')])"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    loaded = done.stdout.split()
    assert "lrc_cli.verify.levels" in loaded
    for name in FORBIDDEN:
        own = f"lrc_cli.{name}"
        assert not [m for m in loaded if m == own or m.startswith(f"{own}.")], own
