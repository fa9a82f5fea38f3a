"""The config of a job: strict YAML with positions in, frozen dataclasses out."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from lrc_cli.config.canonical import certify_yaml, config_hash, to_dict, to_yaml, yaml_text
from lrc_cli.config.certify import CertifyConfig, CopyGates
from lrc_cli.config.compression import Compression, LayerOverride
from lrc_cli.config.constraints import FieldError, parse_bytes
from lrc_cli.config.patterns import matches
from lrc_cli.config.reader import Whole, read
from lrc_cli.config.schema import json_schema
from lrc_cli.config.sections import (
    Calibration,
    Certification,
    Config,
    EvaluationText,
    Gates,
    Model,
    Output,
    Recover,
    Runtime,
)
from lrc_cli.config.tree import (
    CONFIG_BYTES,
    Node,
    Position,
    Problem,
    fail,
    parse,
    plain_values,
    put_value,
    set_value,
)
from lrc_cli.errors import InputError
from lrc_cli.reading import read_utf8

__all__ = [
    "CONFIG_BYTES",
    "Calibration",
    "Certification",
    "CertifyConfig",
    "Compression",
    "Config",
    "CopyGates",
    "EvaluationText",
    "FieldError",
    "Gates",
    "LayerOverride",
    "Model",
    "Output",
    "Recover",
    "Runtime",
    "certify_yaml",
    "check_written",
    "config_hash",
    "json_schema",
    "load_certify",
    "load_config",
    "matches",
    "parse_bytes",
    "parse_certify",
    "parse_config",
    "plain_values",
    "to_dict",
    "to_yaml",
    "yaml_text",
]


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a config file.

    Args:
        path: a YAML file in UTF-8.
        overrides: assignments "key.sub=value" that replace keys of the file, values in YAML.

    Raises:
        InputError: the file cannot be read, or a line of it is wrong; see `parse_config`.
    """
    text = read_utf8(path, CONFIG_BYTES, "utf-8-sig")
    return parse_config(text, str(path), overrides)


def check_written(config: Config) -> None:
    """Raises InputError for a config that lrc could not read again where it has written it out.

    Every override has all of its keys there, so the written config is longer than the given one.
    """
    text = to_yaml(config)
    problem = _reading_problem(text)
    if problem is not None:
        entries = len(config.compression.layers)
        raise InputError(
            f"the config takes {len(text.encode()):,} bytes with all keys of its {entries:,}"
            f" entries in compression.layers written out, and {problem}",
            "give fewer entries: one pattern can stand for many layers",
        )


@lru_cache(maxsize=16)  # a long config takes seconds, and is checked several times
def _reading_problem(text: str) -> str | None:
    """Returns why lrc does not read a text as a config; None: it does."""
    if len(text.encode()) > CONFIG_BYTES:
        return f"at most {CONFIG_BYTES:,} are read"
    try:
        parse_config(text, "lrc.yaml")
    except InputError as error:
        return error.message.partition("\n")[0]
    return None


def parse_config(text: str, name: str, overrides: Sequence[str] = ()) -> Config:
    """Read a config from a text; `name` stands for the file in messages.

    Raises:
        InputError: one line for each thing wrong, "name:line:column: key: what is allowed".
    """
    problems: list[Problem] = []
    root = parse(text, name, problems)
    if root is None:
        message = "the config is empty; it needs model, calibration, compression and output"
        raise fail([Problem(Position(1, 1, name), "", message)])
    return _read_tree(root, overrides, problems, Config)


def _read_tree(
    root: Node, overrides: Sequence[str], problems: list[Problem], whole: type[Whole]
) -> Whole:
    for assignment in overrides:
        root = set_value(root, assignment, problems)
    config = read(root, problems, whole)
    if config is None or problems:
        raise fail(problems)
    return config


def load_certify(
    path: Path | None, given: Mapping[str, tuple[str, Any]], overrides: Sequence[str] = ()
) -> CertifyConfig:
    """Read the config of `lrc certify` from a file, from options, or from both.

    Args:
        path: a YAML file in UTF-8; None: the options say everything.
        given: the options that were given: dotted key -> (the option, the value).
        overrides: as in `load_config`; they come last.

    Raises:
        InputError: the file cannot be read, or a line of it or an option is wrong.
    """
    text = "" if path is None else read_utf8(path, CONFIG_BYTES, "utf-8-sig")
    return parse_certify(text, "the arguments" if path is None else str(path), given, overrides)


def parse_certify(
    text: str,
    name: str,
    given: Mapping[str, tuple[str, Any]] | None = None,
    overrides: Sequence[str] = (),
) -> CertifyConfig:
    """Read the config of `lrc certify` from a text; arguments and errors as in `load_certify`."""
    problems: list[Problem] = []
    place = Position(0, 0, name)
    root = parse(text, name, problems) or Node({}, place, place)
    for key, (option, value) in (given or {}).items():
        root = put_value(root, key, value, option)
    return _read_tree(root, overrides, problems, CertifyConfig)
