"""These tests list the commands and options, read their help, and watch what they import."""

import json
import subprocess
import sys

import pico
import pytest

from lrc_cli import __version__
from lrc_cli.cli import lrc


def test_commands_and_options_are_frozen() -> None:
    """Scripts rely on every name: commands and options are added, never renamed."""
    surface = {
        name: sorted(max(parameter.opts, key=len) for parameter in command.params)
        for name, command in lrc.commands.items()
    }
    assert surface == {
        "compress": sorted(
            [
                *("config", "--set", "--output", "--force", "--restart", "--strict", "--junit"),
                *("--sizes", "--dry-run", "--json", "--quiet", "--verbose"),
            ]
        ),
        "plan": sorted(
            [*("config", "--set", "--output", "--sizes"), *("--json", "--quiet", "--verbose")]
        ),
        "inspect": sorted(
            ["checkpoint", "--state-dict", "--factory", "--trust-remote-code", "--json"]
        ),
        "eval": sorted(
            [
                *("directory", "--against", "--data", "--part", "--num-sequences"),
                *("--sequence-length", "--factory", "--trust-remote-code", "--json", "--quiet"),
                "--state-dict",
            ]
        ),
        "certify": sorted(
            [
                *("other", "--against", "--data", "--part", "--num-sequences", "--output"),
                *("--sequence-length", "--factory", "--trust-remote-code", "--set", "--force"),
                *("--junit", "--json", "--quiet", "--verbose"),
            ]
        ),
        "schema": ["--certify"],
        "verify": sorted(
            [
                *("directory", "--against", "--other", "--data", "--manifest-sha256", "--strict"),
                *("--factory", "--trust-remote-code", "--json", "--quiet", "--state-dict"),
            ]
        ),
    }


LIGHT = """
import sys
from lrc_cli.cli import lrc, run_command
sys.argv = ["lrc", *sys.argv[1:]]
code = run_command(lrc)
heavy = {"torch", "transformers", "numpy", "safetensors"} & set(sys.modules)
assert not heavy, heavy
sys.exit(code)
"""


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["-h"], 0),
        (["compress", "--help"], 0),
        (["eval", "--help"], 0),
        (["plan", "--help"], 0),
        (["plan", "absent.yaml", "--sizes", "0.9,0.8"], 2),
        (["--version"], 0),
        (["schema"], 0),
        (["compress", "absent.yaml"], 2),
        (["certify", "absent.yaml"], 2),
        (["certify", "absent"], 2),
        (["schema", "--certify"], 0),
        (["compres"], 2),
    ],
)
def test_light_commands_import_nothing_heavy(arguments: list[str], code: int) -> None:
    command = [sys.executable, "-c", LIGHT, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr


def test_every_command_is_in_the_help() -> None:
    ended = pico.call("--help")
    assert ended.code == 0 and all(name in ended.out for name in lrc.commands)
    for name in lrc.commands:
        assert pico.call(name, "--help").out.startswith("Usage: ")
    assert __version__ in pico.call("--version").out


def test_the_schema_is_json() -> None:
    schema = json.loads(pico.call("schema").out)
    assert set(schema["required"]) == {"model", "calibration", "compression", "output"}


@pytest.mark.parametrize(
    "arguments", [["compress", "--sizes"], ["unknown"], ["compress"], ["eval"]]
)
def test_bad_usage_is_exit_two(arguments: list[str]) -> None:
    ended = pico.call(*arguments)
    assert ended.code == 2 and "Error" in ended.err and "Traceback" not in ended.err
