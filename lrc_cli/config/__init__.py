"""The config of a job: strict YAML with positions in, frozen dataclasses out."""

from collections.abc import Sequence
from pathlib import Path

from lrc_cli.config.canonical import config_hash, to_dict, to_yaml, yaml_text
from lrc_cli.config.compression import Compression, LayerOverride
from lrc_cli.config.constraints import FieldError, parse_bytes
from lrc_cli.config.patterns import matches
from lrc_cli.config.reader import read
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
    Position,
    Problem,
    fail,
    parse,
    plain_values,
    set_value,
)
from lrc_cli.reading import read_utf8

__all__ = [
    "CONFIG_BYTES",
    "Calibration",
    "Certification",
    "Compression",
    "Config",
    "EvaluationText",
    "FieldError",
    "Gates",
    "LayerOverride",
    "Model",
    "Output",
    "Recover",
    "Runtime",
    "config_hash",
    "json_schema",
    "load_config",
    "matches",
    "parse_bytes",
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
    for assignment in overrides:
        root = set_value(root, assignment, problems)
    config = read(root, problems)
    if config is None or problems:
        raise fail(problems)
    return config
