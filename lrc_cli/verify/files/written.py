"""The output is opened here as it lies on the disk: report, weights, config and layer names."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lrc_cli.checkpoint.fused import Fused, is_mark
from lrc_cli.checkpoint.source import Source, open_source
from lrc_cli.config import Config, load_config
from lrc_cli.network.keys import Keys
from lrc_cli.reading import read_json
from lrc_cli.verify.files.forms import TENSORS, is_read
from lrc_cli.verify.files.manifest import REPORT
from lrc_cli.verify.statements import Findings

FORM: dict[str, type] = {
    "layers": list,
    "skipped": list,
    "quality": list,
    "provenance": dict,
    "size": dict,
    "target": dict,
    "certificate": dict,
    "sequential": dict,
}
"""The parts of a report that every statement may look into."""
ROWS = {
    "layers": ("name", "kind", "shape", "method", "storage", "fallback"),
    "skipped": ("name", "bytes"),
    "quality": ("text", "num_sequences"),
}
PROVENANCE = (
    "lrc_version",
    "activation_dtype",
    "device",
    "config",
    "config_sha256",
    "checkpoint_sha256",
    "data_files_sha256",
    "sequences",
)


@dataclass(frozen=True, kw_only=True)
class Written:
    """Holds an output; a part that could not be opened is None, and a statement says why."""

    directory: Path
    report: dict[str, Any] | None = None
    source: Source | None = None
    config: Config | None = None
    keys: Mapping[str, Keys] = field(default_factory=dict)
    """The layer names of the report -> disk names, for the layers where files alone tell."""

    @property
    def layers(self) -> list[dict[str, Any]]:
        """The report's rows of layers."""
        return list((self.report or {}).get("layers", ()))

    @property
    def factorised(self) -> list[dict[str, Any]]:
        """The report's rows of layers that were replaced by factors."""
        return [layer for layer in self.layers if layer["storage"] != "dense"]

    @property
    def unread(self) -> list[dict[str, Any]]:
        """The report's rows of layers in forms that `lrc verify` does not know."""
        return [layer for layer in self.layers if not is_read(layer["storage"])]


def open_written(directory: Path, findings: Findings) -> Written:
    """Opens report.json, lrc.yaml and the weights; an unreadable part is a failed statement."""
    report = _open_report(directory, findings)
    config = _open_config(directory, findings)
    source = _open_weights(directory, report, findings)
    keys: Mapping[str, Keys] = {}
    with findings.guard("layers.names", "the report's layers are named like tensors"):
        keys = disk_names(report, source)
    return Written(directory=directory, report=report, source=source, config=config, keys=keys)


def _open_report(directory: Path, findings: Findings) -> dict[str, Any] | None:
    what = "report.json can be read"
    with findings.guard("report.open", what):
        report = read_json(directory / REPORT)
        if findings.judge("report.open", what, form_problem(report)):
            return report
    return None


def _open_config(directory: Path, findings: Findings) -> Config | None:
    what = "lrc.yaml is a config"
    with findings.guard("config.open", what):
        config = load_config(directory / "lrc.yaml")
        findings.judge("config.open", what, None)
        return config
    return None


def _open_weights(
    directory: Path, report: dict[str, Any] | None, findings: Findings
) -> Source | None:
    """Opens the weights; fused experts that the report names are seen apart."""
    what = "the weight files can be read, as their index names them"
    source = None
    with findings.guard("weights.open", what):
        source = open_source(directory, factorised=True)
        findings.judge("weights.open", what, None)
    what = "the tensors of fused experts are found as the report says"
    with findings.guard("weights.fused", what):
        return None if source is None else source.apart(fused_of(report, source))
    return source


def fused_of(report: dict[str, Any] | None, source: Source) -> dict[str, Fused]:
    """Returns how to see the fused tensors that a checkpoint holds as they are, without marks."""
    stated = (report or {}).get("fused", {})
    found = {key: Fused(**entry) for key, entry in stated.items()}
    there = source.tensors
    return {key: x for key, x in found.items() if key in there and not is_mark(there[key])}


def marks_of(written: Written) -> list[str]:
    """Returns the keys under which stand the ranks of experts that are stored apart."""
    if written.source is None:
        return []
    stated = (written.report or {}).get("fused", {})
    tensors = written.source.tensors
    return [key for key in stated if key in tensors and is_mark(tensors[key])]


def layer_tensors(source: Source, keys: Keys) -> dict[str, torch.Tensor]:
    """Returns a layer's tensors in the forms that are read, by name, as views of the files."""
    keys_of = {name: keys.key(name) for name in TENSORS}
    return {name: source.read(key) for name, key in keys_of.items() if key in source.tensors}


def form_problem(report: dict[str, Any]) -> str | None:
    """Returns why a JSON object is no report at all; each statement looks at the details."""
    for key, wanted in FORM.items():
        if not isinstance(report.get(key), wanted):
            return f"{key} is {type(report.get(key)).__name__}, not {wanted.__name__}"
    for key, names in ROWS.items():
        for row in report[key]:
            missing = [n for n in names if not isinstance(row, dict) or n not in row]
            if missing:
                return f"an entry of {key} has no {missing[0]}"
    missing = [name for name in PROVENANCE if name not in report["provenance"]]
    return f"provenance has no {missing[0]}" if missing else None


def disk_names(report: dict[str, Any] | None, source: Source | None) -> dict[str, Keys]:
    """Returns the disk names of layers; they may have a prefix more or less than module names."""
    if report is None or source is None:
        return {}
    skipped = {entry["name"] for entry in report["skipped"]}
    free = {Keys(key).layer: Keys(key) for key in source.tensors if key not in skipped}
    names = {}
    for layer in report["layers"]:
        name = layer["name"]
        exact = [stem for stem in free if stem in (name, layer.get("tied_to"))]
        related = [s for s in free if f".{s}".endswith(f".{name}") or f".{name}".endswith(f".{s}")]
        for found in (exact, related):
            if len(found) == 1:
                names[name] = free[found[0]]
                break
    return names


def gained_biases(written: Written) -> list[str]:
    """Returns disk keys of biases that the original had not: no tensor that was skipped."""
    assert written.source is not None
    skipped = {entry["name"] for entry in (written.report or {}).get("skipped", ())}
    keys = [keys.bias for keys in written.keys.values()]
    return [key for key in keys if key in written.source.tensors and key not in skipped]
