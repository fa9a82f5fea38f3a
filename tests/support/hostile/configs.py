"""Hostile configs: every key with every kind of wrong value, and files that are no configs."""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from hostile.harness import COMPRESS, Case, Spoil
from lrc_cli.config import json_schema

WRONG: dict[str, Any] = {
    "null": None,
    "true": True,
    "an empty text": "",
    "a text": "some words",
    "a NUL": "a\0b",
    "minus one": -1,
    "zero": 0,
    "a half": 0.5,
    "400 digits": 10**400,
    "infinity": math.inf,
    "not a number": math.nan,
    "an empty list": [],
    "a list of a list": [[1]],
    "a mapping": {"a": 1},
}
"""Values of which each key takes a few at most."""

LEAVES = {
    "model": ("path", "factory", "trust_remote_code"),
    "calibration": ("path", "part", "text_field", "chat_template", "num_sequences", "seed"),
    "certification": ("path", "part", "num_sequences", "confidence", "quantile"),
    "evaluation.0": ("name", "path", "part", "num_sequences", "sequence_length", "text_field"),
    "compression": (
        *("method", "loss", "size", "max_layer_error", "max_loss_increase", "threshold"),
        *("size_of", "allocation", "sequential", "ridge", "correction", "center", "storage"),
        *("rank_multiple", "include", "exclude", "embeddings", "layers"),
    ),
    "compression.layers.*q_proj": ("size", "rank", "method", "storage"),
    "recover": ("scope", "tokens", "minutes", "norms", "path", "part", "num_sequences"),
    "runtime": ("device", "dtype", "memory_limit", "work_dir", "seed"),
    "output": ("path", "dtype", "shard_size", "remote_code"),
    "gates": ("max_perplexity_increase", "max_layer_error"),
}
"""The keys by section."""


def pristine_tree() -> dict[str, Any]:
    """The job as plain values, with every section that has keys of its own."""
    return {
        "model": {"path": "model"},
        "calibration": {"path": "text.txt", "num_sequences": 12, "sequence_length": 32},
        "certification": {"num_sequences": 4},
        "evaluation": [{"name": "rest", "path": "text.txt", "num_sequences": 4}],
        "compression": {"method": "svd", "size": 0.6, "layers": {"*q_proj": {"size": 0.5}}},
        "output": {"path": "out"},
    }


def put(tree: Any, place: list[str], value: Any) -> None:
    """Sets a value in a tree; the number of a list's item is a key."""
    *way, last = place
    for key in way:
        tree = tree[int(key)] if isinstance(tree, list) else tree.setdefault(key, {})
    tree[last] = value


def write_tree(tree: Any) -> Spoil:
    """The job becomes this tree."""
    return lambda room: (room / "job.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))  # type: ignore[func-returns-value]


def is_allowed(tree: Any) -> bool:
    """Whether the schema takes the tree; numbers that are not finite are never allowed."""
    values = [tree]
    while values:
        value = values.pop()
        if isinstance(value, int | float) and not abs(value) < 1e308:
            return False
        if isinstance(value, dict | list):
            values += value.values() if isinstance(value, dict) else value
    return bool(_VALIDATOR.is_valid(tree))


_VALIDATOR = jsonschema.Draft202012Validator(json_schema())


def wrong_values() -> Iterator[Case]:
    """A case for every key and kind of value that the schema does not allow there."""
    for section, keys in LEAVES.items():
        place = section.split(".", 2) if section.startswith("compression.") else section.split(".")
        for key in keys:
            for words, value in WRONG.items():
                tree = pristine_tree()
                put(tree, [*place, key], value)
                if not is_allowed(tree):
                    name, said = f"{section}.{key} is {words}", ("job.yaml:", key)
                    yield Case(name=name, said=said, spoil=write_tree(tree))


def wrong_sections() -> Iterator[Case]:
    """A case for every section that is no mapping, and for keys that are nearly right."""
    for section in ("model", "calibration", "compression", "output", "runtime", "gates", "recover"):
        for words, value in {"a text": "x", "a list": [1], "a number": 5, "true": True}.items():
            tree = pristine_tree()
            tree[section] = value
            yield Case(
                name=f"{section} is {words}", said=("job.yaml:", section), spoil=write_tree(tree)
            )
    for section in ("model", "calibration", "compression", "output"):
        tree = pristine_tree()
        del tree[section]
        yield Case(
            name=f"{section} is missing", said=("job.yaml:", section), spoil=write_tree(tree)
        )
    for section, key, near in (
        ("model", "Path", "path"),
        ("calibration", "num_sequence", "num_sequences"),
        ("compression", "sise", "size"),
        ("compression", "max_layer_eror", "max_layer_error"),
        ("runtime", "devise", "device"),
        ("output", "shard-size", "shard_size"),
        ("gates", "max_layer_errors", "max_layer_error"),
        ("calibration", "size", "compression.size"),
    ):
        tree = pristine_tree()
        tree.setdefault(section, {})[key] = 1
        yield Case(
            name=f"{section}.{key} for {near}",
            said=(key, f"did you mean '{near}'?"),
            spoil=write_tree(tree),
        )


GOOD = yaml.safe_dump(pristine_tree(), sort_keys=False)


def text(content: str | bytes) -> Spoil:
    """The config file has this content."""
    raw = content if isinstance(content, bytes) else content.encode()
    return lambda room: (room / "job.yaml").write_bytes(raw)  # type: ignore[func-returns-value]


def replaced(make: Spoil) -> Spoil:
    """The config is taken away, and something else is made in its place."""

    def spoil(room: Path) -> None:
        (room / "job.yaml").unlink()
        make(room)

    return spoil


def with_key(line: str) -> str:
    """The good config and one more line of `model`."""
    return GOOD.replace("model:\n", f"model:\n  {line}\n")


FILES: dict[str, tuple[Spoil, tuple[str, ...]]] = {
    "missing": (replaced(lambda room: None), ("job.yaml", "no such file")),
    "a directory": (replaced(lambda room: (room / "job.yaml").mkdir()), ("is a directory",)),
    "a pipe": (replaced(lambda room: os.mkfifo(room / "job.yaml")), ("job.yaml", "pipe")),
    "a device": (replaced(lambda room: (room / "job.yaml").symlink_to("/dev/zero")), ("device",)),
    "a link to itself": (
        replaced(lambda room: (room / "job.yaml").symlink_to("job.yaml")),
        ("job.yaml",),
    ),
    "a link to nothing": (
        replaced(lambda room: (room / "job.yaml").symlink_to("nowhere")),
        ("job.yaml", "no such file"),
    ),
    "empty": (text(""), ("job.yaml", "empty")),
    "white": (text(" \n\n \n"), ("job.yaml", "empty")),
    "comments": (text("# nothing\n"), ("job.yaml", "empty")),
    "null": (text("null\n"), ("job.yaml",)),
    "a text": (text("hello\n"), ("job.yaml:1:1", "mapping")),
    "a list": (text("- model\n"), ("job.yaml:1:1", "mapping")),
    "several documents": (text(f"{GOOD}---\n{GOOD}"), ("job.yaml:", "document")),
    "UTF-16": (text(GOOD.encode("utf-16")), ("job.yaml", "UTF-8")),
    "UTF-32": (text(GOOD.encode("utf-32-be")), ("job.yaml",)),
    "latin-1": (text("# \xe9\n".encode("latin-1") + GOOD.encode()), ("job.yaml:1", "UTF-8")),
    "cut in a character": (text(GOOD.encode() + b"# \xe2\x82"), ("job.yaml", "UTF-8")),
    "a NUL": (text(GOOD.encode() + b"\0"), ("job.yaml:", "U+0000")),
    "an escape": (text(GOOD.encode() + b"# \x1b[2J"), ("job.yaml:", "U+001B")),
    "random bytes": (text(bytes(range(128, 256)) * 8), ("job.yaml", "UTF-8")),
    "a zip": (text(b"PK\x03\x04\x14\x00\x00\x00\x08\x00"), ("job.yaml",)),
    "JSON cut short": (text('{"model": {"path": '), ("job.yaml:", "YAML")),
    "an open quote": (text(with_key('factory: "x')), ("job.yaml:", "YAML")),
    "a tab": (text("model:\n\tpath: model\n"), ("job.yaml:2", "tab")),
    "a wrong indent": (text("model:\n  path: model\n factory: x\n"), ("job.yaml:3", "YAML")),
    "a tag of Python": (
        text(with_key("factory: !!python/object/apply:os.system ['touch ran']")),
        ("job.yaml:2", "tag"),
    ),
    "a tag of Python's name": (
        text(with_key("factory: !!python/name:os.system")),
        ("job.yaml:2", "tag"),
    ),
    "a tag of its own": (text(with_key("factory: !mine x")), ("job.yaml:2", "!mine")),
    "a binary": (text(with_key("factory: !!binary aGVsbG8=")), ("job.yaml:2", "tag")),
    "a set": (text(with_key("factory: !!set {a, b}")), ("job.yaml:2", "tag")),
    "an anchor to itself": (text(f"{GOOD}gates: &a [*a]\n"), ("gates", "contains itself")),
    "an anchor to its mapping": (
        text(f"{GOOD}gates: &a {{max_layer_error: *a}}\n"),
        ("max_layer_error", "contains itself"),
    ),
    "an unknown alias": (text(with_key("factory: *nowhere")), ("job.yaml:2", "alias")),
    "a merge key": (text("a: &a {path: model}\nmodel:\n  <<: *a\n"), ("job.yaml", "<<")),
    "a duplicated key": (text(with_key("path: other")), ("job.yaml:3", "duplicate key")),
    "a duplicated section": (text(f"{GOOD}output: {{path: b}}\n"), ("output", "duplicate key")),
    "a key that is a list": (text(f"{GOOD}? [a]\n: b\n"), ("a key must be a text",)),
    "nested lists": (text("a: " + "[" * 5000 + "]" * 5000), ("job.yaml",)),
    "nested mappings": (text("a: " + "{a: " * 3000 + "1" + "}" * 3000), ("job.yaml",)),
    "aliases that multiply": (
        text(
            "a0: &a0 [x, x]\n"
            + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))
        ),
        ("job.yaml:", "a0", "unknown key"),
    ),
    "2000 unknown keys": (
        text(GOOD + "".join(f"key{i}: 1\n" for i in range(2000))),
        ("job.yaml:", "unknown key", "more"),
    ),
    "a key of 100000 letters": (text(f"{GOOD}{'k' * 1000}: 1\n"), ("job.yaml:", "unknown key")),
    "a value of 100000 letters": (text(with_key(f"factory: {'v' * 100_000}")), ("factory",)),
    "a key with escapes": (text(GOOD + '"\\e[2J\\e[1m": 1\n'), ("job.yaml:", "unknown key")),
    "a key that writes leftwards": (text(GOOD + '"\\u202Egpj": 1\n'), ("unknown key",)),
    "a lone surrogate": (text(with_key('factory: "\\ud800"')), ("job.yaml:2", "factory")),
    "5 MB of comments": (text(f"#{'x' * 98}\n" * 50_000 + "model: 1\n"), ("job.yaml",)),
    "a sexagesimal number": (
        text(GOOD.replace("num_sequences: 12", "num_sequences: 1:30")),
        ("text.txt", "90 were asked for"),
    ),
    "a number in exponents": (
        text(GOOD.replace("num_sequences: 12", "num_sequences: 1e1")),
        ("num_sequences",),
    ),
    "yes for a number": (text(GOOD.replace("size: 0.6", "size: yes")), ("compression.size",)),
    "a percentage": (text(GOOD.replace("size: 0.6", "size: 60%")), ("compression.size",)),
    "a comma for a point": (text(GOOD.replace("size: 0.6", "size: 0,6")), ("compression.size",)),
    "a part the wrong way round": (
        text(GOOD.replace("num_sequences: 12", "part: [0.6, 0.2]")),
        ("calibration.part", "start < end"),
    ),
    "a part of nothing": (
        text(GOOD.replace("num_sequences: 12", "part: [0.5, 0.5]")),
        ("calibration.part", "start < end"),
    ),
    "a bad regular expression": (
        text(GOOD.replace("'*q_proj'", "'re:('")),
        ("compression.layers", "regular expression"),
    ),
    "two evaluations of a name": (
        text(GOOD.replace("evaluation:\n", "evaluation:\n- {name: rest, path: text.txt}\n")),
        ("evaluation", "given twice"),
    ),
    "an evaluation called calibration": (
        text(GOOD.replace("name: rest", "name: calibration")),
        ("evaluation.0.name", "section"),
    ),
    "two targets": (
        text(GOOD.replace("size: 0.6", "size: 0.6\n  max_layer_error: 0.1")),
        ("exactly one of",),
    ),
    "a target of another method": (
        text(GOOD.replace("size: 0.6", "max_loss_increase: 0.1")),
        ("max_loss_increase", "curvature"),
    ),
}
"""Files in place of the config, and what the message says."""

LINES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "no equals sign": (("--set", "compression.size"), ("KEY=VALUE",)),
    "no key": (("--set", "=1"), ("KEY=VALUE",)),
    "an empty part of a key": (("--set", "a..b=1"), ("KEY=VALUE",)),
    "an unknown section": (("--set", "compresion.size=1"), ("compresion", "did you mean")),
    "a value that is no YAML": (("--set", "model.path=["), ("--set model.path", "YAML")),
    "a value with a tag": (("--set", "model.path=!!python/name:os.system x"), ("tag",)),
    "a value with a NUL": (("--set", 'model.path="a\\0b"'), ("model.path",)),
    "a value with an escape": (("--set", "model.path=\x1b[2J"), ("model.path", "U+001B")),
    "a value that is no UTF-8": (("--set", "model.path=\udcff"), ("model.path",)),
    "an item that is not there": (("--set", "evaluation.7.name=a"), ("no such item",)),
    "an item of a negative number": (("--set", "evaluation.-1.name=a"), ("no such item",)),
    "an item of 5000 digits": (("--set", f"evaluation.{'9' * 5000}.name=a"), ("--set",)),
    "an item in other digits": (("--set", "evaluation.\u00b2.name=a"), ("no such item",)),
    "below a number": (("--set", "compression.size.a=1"), ("not a mapping",)),
    "1000 levels": (("--set", f"{'a.' * 1000}a=1"), ("--set", "100 keys")),
    "a key of 10000 letters": (("--set", f"{'a' * 10_000}=1"), ("unknown key",)),
    "sizes of letters": (("--sizes", "a,b"), ("'a,b'", "shares")),
    "sizes twice": (("--sizes", "0.5,0.5"), ("twice",)),
    "an empty size": (("--sizes", "0.5,"), ("shares",)),
    "no size": (("--sizes", ""), ("shares",)),
    "a size of nan": (("--sizes", "nan"), ("compression.size",)),
    "a size of inf": (("--sizes", "inf"), ("compression.size",)),
    "a size of zero": (("--sizes", "0"), ("compression.size",)),
    "a size of -0.5": (("--sizes=-0.5",), ("compression.size",)),
    "a size of two": (("--sizes", "2"), ("compression.size",)),
    "a size of 1e400": (("--sizes", "1e400"), ("compression.size",)),
    "an unknown option": (("--frobnicate",), ("--frobnicate",)),
    "a second config": (("other.yaml",), ("other.yaml",)),
    "an option with escapes": (("--\x1b[2J",), ("option",)),
    "an option without its value": (("--set",), ("--set",)),
    "a junit file that is the model": (("--junit", "model/model.safetensors"), ("safetensors",)),
    "an empty output": (("--output", ""), ("output",)),
    "an output with a NUL": (("--output", "a\0b"), ("output",)),
    "an output of 5000 letters": (("--output", "o" * 5000), ("output.path",)),
}
"""More arguments of `lrc compress job.yaml`, and what the message says."""

COMMANDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "no config": (("compress",), ("CONFIG",)),
    "an unknown command": (("compres",), ("compres",)),
    "a command with escapes": (("\x1b]0;x\x07",), ("command",)),
    "an empty name of a config": (("compress", ""), ("is a directory",)),
    "a config whose name is no UTF-8": (("compress", "a\udcff.yaml"), ("no such file",)),
    "a config of 5000 letters": (("compress", "c" * 5000), ("ccc",)),
    "the checkpoint as config": (("compress", "model"), ("model: is a directory",)),
    "weights as config": (("compress", "model/model.safetensors"), ("model.safetensors", "UTF-8")),
    "a text as config": (("compress", "text.txt"), ("text.txt:1:1",)),
    "plan with a missing config": (("plan", "nil.yaml"), ("nil.yaml", "no such file")),
    "inspect without a checkpoint": (("inspect",), ("CHECKPOINT",)),
    "inspect of nothing": (("inspect", "nil"), ("nil", "check the path")),
    "inspect of an empty name": (("inspect", ""), ("",)),
    "inspect of a text": (("inspect", "text.txt"), ("text.txt",)),
    "inspect of a config": (("inspect", "job.yaml"), ("job.yaml",)),
    "inspect of a device": (("inspect", "/dev/zero"), ("/dev/zero",)),
    "inspect with a bad factory": (("inspect", "model", "--factory", "a b"), ("a b",)),
    "verify without a directory": (("verify",), ("DIRECTORY",)),
    "verify of nothing": (("verify", "nil"), ("nil",)),
    "verify of a checkpoint": (("verify", "model"), ("model", "manifest.json")),
    "verify of a file": (("verify", "text.txt"), ("text.txt",)),
    "verify of a device": (("verify", "/dev/null"), ("/dev/null",)),
    "eval of a checkpoint": (("eval", "model"), ("model", "manifest.json")),
    "eval of nothing": (("eval", "nil"), ("nil",)),
    "eval of no sequences": (("eval", "model", "--num-sequences", "0"), ("--num-sequences",)),
    "eval of a word": (("eval", "model", "--num-sequences", "many"), ("'many'",)),
    "eval of short sequences": (("eval", "model", "--sequence-length", "1"), ("--sequence-l",)),
    "schema with an argument": (("schema", "x"), ("x",)),
}
"""Command lines, and what the message says."""


def _of_tables() -> Iterator[Case]:
    for name, (spoil, said) in FILES.items():
        yield Case(name=f"the config is {name}", said=said, spoil=spoil)
    for name, (more, said) in LINES.items():
        yield Case(name=f"the command has {name}", said=said, command=(*COMPRESS, *more))
    for name, (command, said) in COMMANDS.items():
        yield Case(name=f"the command is {name}", said=said, command=command)


VALUES = [*wrong_values()]
CASES = [*wrong_sections(), *_of_tables()]
