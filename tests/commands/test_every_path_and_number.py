"""Every path and every number that a user can give is tried with values that nothing can take.

The keys come from the JSON Schema of the config, and the options from click, so a new key or option
is in the table from its first day.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pico
import pytest
import yaml

from lrc_cli.cli import lrc
from lrc_cli.commands.options import PathType
from lrc_cli.config import json_schema
from lrc_cli.text import visible

ENDS = ("path", "work_dir")
"""The names of keys that hold paths."""
NOT_WRITTEN = ("compression.layers", "compression.include", "compression.exclude")


def keys_of(schema: Any, place: str = "") -> Iterator[tuple[str, set[str]]]:
    """Yields the dotted keys of the config with the types of their values."""
    for name, value in schema.get("properties", {}).items():
        options = value.get("anyOf", [value])
        here = f"{place}.{name}".removeprefix(".")
        if any("properties" in option for option in options):
            for option in options:
                yield from keys_of(option, here)
        elif any("properties" in option.get("items", {}) for option in options):
            for option in options:
                yield from keys_of(option.get("items", {}), f"{here}.0")
        elif here not in NOT_WRITTEN:
            yield here, {kind for option in options for kind in _types(option)}


def _types(option: Any) -> list[str]:
    kind = option.get("type", [])
    return [kind] if isinstance(kind, str) else list(kind)


KEYS = dict(keys_of(json_schema()))
PATHS = [key for key in KEYS if key.split(".")[-1] in ENDS]
NUMBERS = [key for key, types in KEYS.items() if types & {"integer", "number"}]
PARTS = [key for key in KEYS if key.endswith(".part")]


def test_the_table_has_every_path_and_number() -> None:
    assert {"model.path", "evaluation.0.path", "recover.path", "runtime.work_dir"} <= set(PATHS)
    assert {"runtime.memory_limit", "compression.size", "recover.tokens"} <= set(NUMBERS)
    assert len(PATHS) >= 7 and len(NUMBERS) >= 20 and len(PARTS) >= 3
    assert {("verify", "--against"), ("compress", "--junit")} <= {x[:2] for x in OPTIONS}


BAD_PATHS = {
    "a name of 256 letters": "n" * 256,
    "a path of 5000 letters": "d/" * 2500,
    "a name of a megabyte": "n" * 1_000_000,
    "a null character": "a\0b",
    "a null character at the end": "a\0",
    "a null character alone": "\0",
    "half a character": "a\udcffb",
    "empty": "",
    "nothing but a line": "a\nb" * 9,
    "an escape sequence": "\x1b[2J",
    "below a file": "text.txt/below/it",
}
POSSIBLE = ("nothing but a line", "an escape sequence")
"""Names that a file may have."""
IMPOSSIBLE = [kind for kind, path in BAD_PATHS.items() if len(path) > 200 or "\0" in path]
"""Names that no file can have."""
LARGE = 10**400
BAD_NUMBERS = {
    "400 digits": LARGE,
    "400 digits below zero": -LARGE,
    "a float beyond floats": "1e400",
    "a text of 400 digits": f"'{LARGE}'",
    "a size of 400 digits": f"{LARGE}B",
    "a size with 400 decimals": f"1.{LARGE}GB",
    "infinity": ".inf",
    "infinity below zero": "-.inf",
    "not a number": ".nan",
    "5000 digits": "9" * 5000,
    "octal digits": "0o" + "7" * 400,
    "hexadecimal digits": "0x" + "f" * 400,
    "a megabyte of digits": "7" * 1_000_000,
    "minus one": -1,
    "a list of 400 digits": f"[{LARGE}]",
    "sexagesimal digits": ":".join(["59"] * 200),
}


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory, checkpoint: pico.Models) -> Path:
    """Returns a directory with a job that has a value for every section."""
    folder = tmp_path_factory.mktemp("room")
    (folder / "text.txt").write_text(pico.words(2000))
    tree = {
        "model": {"path": str(checkpoint("llama"))},
        "calibration": {"path": "text.txt", "num_sequences": 12, "sequence_length": 32},
        "certification": {"num_sequences": 4, "path": "text.txt"},
        "evaluation": [{"name": "rest", "path": "text.txt", "num_sequences": 4}],
        "compression": {"method": "svd", "size": 0.6},
        "recover": {"scope": "model"},
        "output": {"path": "out"},
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(tree))
    return folder


def tried(room: Path, *arguments: object) -> pico.Ended:
    """Runs a command that must leave the room as it is."""
    before = sorted(room.iterdir())
    with contextlib.chdir(room):
        ended = pico.call(*arguments)
    assert sorted(room.iterdir()) == before
    return ended


def assert_named(ended: pico.Ended, name: str) -> None:
    """The command was refused in a few short lines that name the key or the option."""
    assert ended.code == 2, (ended.code, ended.err[:2000])
    assert ended.out == "" and "Traceback" not in ended.err
    assert name in ended.err, ended.err[:2000]
    assert all(len(line) < 2200 for line in ended.err.splitlines())
    assert "\0" not in ended.err and "\x1b" not in ended.err


def yaml_of(value: str) -> str:
    """Returns a text as YAML writes it in quotes; half a character stays as it is."""
    return value if "\udcff" in value else yaml.safe_dump(value, width=10**9).removesuffix("...\n")


TARGETS = ("size", "max_layer_error", "max_loss_increase", "threshold")


@pytest.mark.parametrize("kind", BAD_PATHS)
@pytest.mark.parametrize("key", PATHS)
def test_a_path_of_the_config(key: str, kind: str, room: Path) -> None:
    value = BAD_PATHS[kind]
    if key in ("output.path", "runtime.work_dir") and kind in POSSIBLE:
        pytest.skip("a directory may have this name")
    ended = tried(room, "compress", "job.yaml", "-q", "--set", f"{key}={yaml_of(value)}")
    # A path that may be there is named itself.
    may_be_there = kind in (*POSSIBLE, "below a file") and f"{visible(value)}" in ended.err
    assert_named(ended, "no" if may_be_there else key)


@pytest.mark.parametrize("kind", BAD_NUMBERS)
@pytest.mark.parametrize("key", NUMBERS)
def test_a_number_of_the_config(key: str, kind: str, room: Path) -> None:
    settings = ["--set", f"{key}={BAD_NUMBERS[kind]}"]
    name = key.split(".")[-1]
    if name in TARGETS and key.startswith("compression.") and name != "size":
        settings += ["--set", "compression.size=null"]
    ended = tried(room, "compress", "job.yaml", "-q", *settings)
    assert_named(ended, key)


@pytest.mark.parametrize("kind", BAD_NUMBERS)
@pytest.mark.parametrize("key", PARTS)
def test_a_part_of_the_config(key: str, kind: str, room: Path) -> None:
    part = f"[0, {BAD_NUMBERS[kind]}]"
    assert_named(tried(room, "compress", "job.yaml", "-q", "--set", f"{key}={part}"), key)


def options() -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Yields every path that a command takes: its command, name and the arguments before it."""
    for name, command in lrc.commands.items():
        paths = [x for x in command.params if isinstance(x.type, PathType)]
        arguments = [x for x in command.params if isinstance(x, click.Argument)]
        for parameter in paths:
            shown = max(parameter.opts, key=len)
            if isinstance(parameter, click.Option):
                yield name, shown, ("job.yaml",) * len(arguments)
            else:
                place = arguments.index(parameter)
                yield name, str(parameter.name).upper(), ("job.yaml",) * place
        for parameter in command.params:
            if parameter.metavar in ("DIR", "FILE") and parameter not in paths:
                yield name, max(parameter.opts, key=len), ("job.yaml",) * len(arguments)


OPTIONS = list(options())


@pytest.mark.parametrize("kind", IMPOSSIBLE)
@pytest.mark.parametrize("case", OPTIONS, ids=lambda case: f"{case[0]} {case[1]}")
def test_a_path_of_a_command(case: tuple[str, str, tuple[str, ...]], kind: str, room: Path) -> None:
    command, name, before = case
    value = [f"{name}={BAD_PATHS[kind]}"] if name.startswith("--") else [BAD_PATHS[kind]]
    rest = ["text.txt"] if command == "eval" and not before else []
    ended = tried(room, command, *before, *value, *rest)
    shown = name if name != "--output" or name in ended.err else "output.path"
    assert_named(ended, shown)
