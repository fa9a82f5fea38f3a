"""A config as plain values, YAML, canonical JSON and a hash."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import yaml

from lrc_cli.config.sections import Config


def plain(value: Any) -> Any:
    """Dataclasses and tuples as dicts and lists, in the order of their fields."""
    if dataclasses.is_dataclass(value):
        fields = [f.name for f in dataclasses.fields(value) if not f.metadata.get("hidden")]
        return {name: plain(getattr(value, name)) for name in fields}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, tuple) else value


def to_dict(config: Config) -> dict[str, Any]:
    """The resolved config: every key with its value, as JSON and YAML can hold it."""
    resolved: dict[str, Any] = plain(config)
    return resolved


def to_yaml(config: Config) -> str:
    """The resolved config as YAML that reads back as an equal config.

    A `num_sequences` that was left to its default is left out again: written down it would
    become a demand, and the same job could fail on the file on which it had been lowered.
    """
    resolved = to_dict(config)
    sections = (config.calibration, config.certification, *(config.evaluation or ()))
    values = (resolved["calibration"], resolved["certification"], *(resolved["evaluation"] or ()))
    for section, written in zip(sections, values, strict=True):
        if section is not None and section.num_sequences_is_default:
            del written["num_sequences"]
    return yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True, width=100)


def config_hash(config: Config, recorded: Mapping[str, Any] | None = None) -> str:
    """sha256 of the canonical JSON of all that can change the weights.

    Left out are output.path, runtime.work_dir, runtime.memory_limit, gates and evaluation. The
    order of `layers` counts, because the last pattern that matches wins; no other order does.

    Args:
        recorded: the written YAML as plain values, of which the config is: keys that came into the
            schema after it was written are left out, as they were then.
    """
    resolved = to_dict(config) if recorded is None else _known(to_dict(config), recorded)
    del resolved["gates"], resolved["evaluation"]
    del resolved["output"]["path"], resolved["runtime"]["work_dir"]
    del resolved["runtime"]["memory_limit"]
    resolved["compression"]["layers"] = list(resolved["compression"]["layers"].items())
    text = json.dumps(resolved, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _known(resolved: Mapping[str, Any], recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Without the keys that `recorded` lacks, other than a `num_sequences` left to its default."""
    found = {}
    for key, value in resolved.items():
        there = recorded.get(key)
        if key in recorded or key == "num_sequences":
            is_section = isinstance(value, Mapping) and isinstance(there, Mapping)
            found[key] = _known(value, there or {}) if is_section else value
    return found
