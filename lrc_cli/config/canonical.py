"""A config is written here as plain values, as YAML and as the canonical JSON that is hashed."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import yaml

from lrc_cli.config.certify import CertifyConfig
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

    A `num_sequences` that was left to its default is left out again. A number in the YAML would be
    a demand, and the same job could fail on the file for which the default had been lowered.
    """
    resolved = to_dict(config)
    sections = (config.calibration, config.certification, *(config.evaluation or ()))
    values = (resolved["calibration"], resolved["certification"], *(resolved["evaluation"] or ()))
    for section, written in zip(sections, values, strict=True):
        if section is not None and section.num_sequences_is_default:
            del written["num_sequences"]
    return yaml_text(resolved)


def certify_yaml(config: CertifyConfig) -> str:
    """The resolved config of `lrc certify` as YAML that reads back as an equal config."""
    resolved = plain(config)
    if config.data.num_sequences_is_default:
        del resolved["data"]["num_sequences"]
    return yaml_text(resolved)


def yaml_text(values: Mapping[str, Any]) -> str:
    """The YAML in which lrc writes a config: without comments, in this order, one line a key."""
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100)


def config_hash(config: Config, recorded: Mapping[str, Any] | None = None) -> str:
    """The sha256 of the canonical JSON of everything that can change the weights.

    The keys output.path, runtime.work_dir, runtime.memory_limit, gates and evaluation are left
    out. The order of `layers` counts, because the last pattern that matches wins. No other order
    counts.

    Args:
        recorded: the written YAML as plain values, from which the config was read. Keys that came
            into the schema later are left out, so the hash is the same as at the time of writing.
    """
    resolved = to_dict(config) if recorded is None else _known(to_dict(config), recorded)
    del resolved["gates"], resolved["evaluation"]
    del resolved["output"]["path"], resolved["runtime"]["work_dir"]
    del resolved["runtime"]["memory_limit"]
    resolved["compression"]["layers"] = list(resolved["compression"]["layers"].items())
    text = json.dumps(resolved, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _known(resolved: Mapping[str, Any], recorded: Mapping[str, Any]) -> dict[str, Any]:
    """The config without the keys that `recorded` lacks; a lacking `num_sequences` stays."""
    found = {}
    for key, value in resolved.items():
        there = recorded.get(key)
        if key in recorded or (key == "num_sequences" and value is not None):
            is_section = isinstance(value, Mapping) and isinstance(there, Mapping)
            found[key] = _known(value, there or {}) if is_section else value
    return found
