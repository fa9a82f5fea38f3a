"""These checks need the files only: tensors, index, metadata and layer table agree."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lrc_cli.checkpoint.fused import NO_RANK, Fused
from lrc_cli.checkpoint.headers import (
    FORMAT_VERSION,
    INDEX_NAME,
    TensorInfo,
    open_tensors,
    parse_record,
)
from lrc_cli.checkpoint.source import Source
from lrc_cli.network.keys import Keys
from lrc_cli.reading import read_json
from lrc_cli.verify.files.forms import (
    PERM,
    TENSORS,
    UP,
    WEIGHT,
    is_read,
    reader_of,
    table_problem,
    unread,
)
from lrc_cli.verify.files.written import Written, gained_biases, layer_tensors, marks_of
from lrc_cli.verify.statements import Findings

CHUNK = 1 << 22
"""The number of entries that are looked at together."""


def check_weights(written: Written, findings: Findings) -> None:
    """Checks all that the weight files alone say; needs `written.source`."""
    source = written.source
    if source is None:
        reason = "the weight files cannot be opened"
        findings.not_checked("tensors", "shapes, numbers, index and layer table", reason)
        return
    with findings.guard("tensors.finite", "the tensors can be read"):
        _check_finite(source, findings)
    with findings.guard("index", "the index is right"):
        _check_index(source, findings)
    with findings.guard("metadata", "the files' metadata is right"):
        _check_metadata(written, source, findings)
    with findings.guard("table", "the layer table is right"):
        _check_table(written, source, findings)
    with findings.guard("table", "the marks of experts are right"):
        _check_marks(written, source, findings)
    with findings.guard("layers.shape", "the report's layers are those of the files"):
        _check_layers(written, source, findings)


def _check_finite(source: Source, findings: Findings) -> None:
    for key, info in source.tensors.items():
        if not info.dtype.is_floating_point:
            continue
        flat = source.read(key).flatten()
        wrong = sum(int((~torch.isfinite(part)).sum()) for part in flat.split(CHUNK))
        problem = f"{wrong} entries are not" if wrong else None
        findings.judge("tensors.finite", f"every number of {key} is finite", problem)


def _check_index(source: Source, findings: Findings) -> None:
    file = source.path / INDEX_NAME
    if not file.exists():
        single = len(list(source.path.glob("*.safetensors"))) == 1
        problem = None if single else "there are several, and no index"
        findings.judge("index.files", "there is one weight file", problem)
        return
    index = read_json(file)
    found: dict[str, str] = {}
    for shard in sorted(source.path.glob("*.safetensors")):
        with open_tensors(shard) as handle:
            found |= dict.fromkeys(handle.keys(), shard.name)
    wrong = {
        k for k in {*found, *index["weight_map"]} if index["weight_map"].get(k) != found.get(k)
    }
    problem = f"not for {', '.join(sorted(wrong)[:3])}" if wrong else None
    findings.judge("index.files", "the index names the shard of every tensor", problem)
    total = sum(info.num_bytes for info in source.tensors.values())
    stated = index["metadata"]["total_size"]
    findings.equal("index.size", "the index states the bytes of all tensors", stated, total)


def _check_metadata(written: Written, source: Source, findings: Findings) -> None:
    facts = (written.report or {}).get("provenance", {})
    for file in source.files:
        metadata = _metadata(file)
        record = _record(file)
        stated = {
            "format_version": record.get("format_version"),
            "tool_version": record.get("tool_version"),
            "config_sha256": record.get("config_sha256"),
            "format": metadata.get("format"),
            "keys": sorted(metadata),
        }
        found = {
            "format_version": FORMAT_VERSION,
            "tool_version": facts.get("lrc_version"),
            "config_sha256": facts.get("config_sha256"),
            "format": "pt",
            "keys": ["format", "lrc"],
        }
        what = f"the metadata of {file.name} agrees with the report"
        findings.equal("metadata", what, stated, found)
        if source.config is None:
            factory = written.config.model.factory if written.config else None
            what = f"{file.name} names the config's factory"
            findings.equal("metadata", what, record.get("factory"), factory)


def _metadata(file: Path) -> dict[str, str]:
    with open_tensors(file) as handle:
        return handle.metadata() or {}


def _record(file: Path) -> dict[str, Any]:
    """Returns what lrc wrote into a file's metadata."""
    return parse_record(_metadata(file), file)


def _stated_table(source: Source) -> Mapping[str, Mapping[str, Any]]:
    """Returns the layer table (disk name -> storage, rank, block) of config.json or metadata."""
    if source.config is None:
        record = _record(source.files[-1])
    else:
        record = source.config.get("quantization_config") or {}
    table: Mapping[str, Mapping[str, Any]] = record.get("layers", {})
    return table


def _check_table(written: Written, source: Source, findings: Findings) -> None:
    """The table must name exactly the layers whose tensors are factors, and say what they are."""
    if source.config is not None:
        quantization = source.config.get("quantization_config") or {}
        if quantization:
            stated = quantization.get("format_version")
            what = "config.json states the format version"
            findings.equal("table", what, stated, FORMAT_VERSION)
    table, tensors = _stated_table(source), source.tensors
    _check_storages(written, table, findings)
    found = {key.removesuffix(f".{UP}") for key in tensors if key.endswith(f".{UP}")}
    found = {layer for layer in found if Keys.of(layer, tensors).weight in tensors} | {
        key.removesuffix(f".{PERM}") for key in tensors if key.endswith(f".{PERM}")
    }
    for layer in sorted({*found, *table}):
        what = f"the layer table and the tensors of {layer} agree"
        if layer not in table:
            findings.judge("table", what, "the table has no such layer, the tensors are factors")
            continue
        storage = table[layer].get("storage")
        if not is_read(storage):
            findings.not_checked("table", what, unread(storage))
            continue
        keys = Keys.of(layer, tensors)
        shapes = {name: _shape(source, keys.key(name)) for name in TENSORS}
        problem = table_problem(shapes, table[layer])
        if problem is None:
            found_tensors = layer_tensors(source, keys)
            problem = reader_of(found_tensors).numbers_problem(found_tensors)
        findings.judge("table", what, problem)


def _check_storages(
    written: Written, table: Mapping[str, Mapping[str, Any]], findings: Findings
) -> None:
    """The table must have the storages of the report, whose rows are compared with the config."""
    rows = {written.keys[x["name"]].layer: x for x in written.layers if x["name"] in written.keys}
    known = {row["storage"] for row in written.layers}
    for layer, entry in table.items() if written.report is not None else ():
        stated, what = entry.get("storage"), f"the storage of {layer} is the report's"
        if layer in rows:
            findings.equal("table", what, stated, rows[layer]["storage"])
        else:  # the layer's tensors go by another name
            problem = None if stated in known else f"no layer of the report is stored as {stated}"
            findings.judge("table", what, problem)


def _check_marks(written: Written, source: Source, findings: Findings) -> None:
    """Marks, which stand in for experts' fused tensors, must hold the ranks of their matrices."""
    fused, table = (written.report or {}).get("fused", {}), _stated_table(source)
    for key in marks_of(written):
        ranks = source.read(key).tolist()
        layers = [Keys(x).layer for x in Fused(**fused[key]).keys(len(ranks))]
        entries = [table.get(layer) for layer in layers]
        found = [0 if x is None else x.get("rank", NO_RANK) for x in entries]
        findings.equal("table", f"{key} has the ranks of its experts", ranks, found)


def _shape(source: Source, key: str) -> tuple[int, ...] | None:
    info = source.tensors.get(key)
    return None if info is None else info.shape


def _check_layers(written: Written, source: Source, findings: Findings) -> None:
    """Checks the report's rows against the tensors."""
    if not written.report:
        findings.not_checked("layers.shape", "the report's layers", "report.json cannot be read")
        return
    known = [written.keys.get(layer["name"]) for layer in written.factorised]
    factorised = {keys.layer for keys in known if keys is not None}
    if len(factorised) == len(written.factorised):
        what = "the report's factorised layers are those of the layer table"
        findings.equal("layers.shape", what, sorted(factorised), sorted(_stated_table(source)))
    biases = gained_biases(written)
    for layer in written.layers:
        keys, what = written.keys.get(layer["name"]), f"the report has the sizes of {layer['name']}"
        if not is_read(layer["storage"]):
            findings.not_checked("layers.shape", what, unread(layer["storage"]))
        elif keys is None:
            reason = "its tensors go by another name"
            findings.not_checked("layers.shape", what, reason, by_design=True)
        else:
            gained = source.tensors.get(keys.bias) if keys.bias in biases else None
            findings.judge("layers.shape", what, _layer_problem(layer, source, keys, gained))


def _layer_problem(
    layer: Mapping[str, Any], source: Source, keys: Keys, gained: TensorInfo | None
) -> str | None:
    infos = {name: source.tensors.get(keys.key(name)) for name in TENSORS}
    weight = infos[WEIGHT]
    if weight is None:
        return f"the tensor {keys.weight} is missing"
    stated: dict[str, Any] = {k: layer.get(k) for k in ("dtype", "bytes_after", "fallback")}
    found: dict[str, Any] = {
        "dtype": str(weight.dtype).removeprefix("torch."),
        "bytes_after": sum(
            info.num_bytes for info in (*infos.values(), gained) if info is not None
        ),
        "fallback": bool(layer["fallback"]) if layer["storage"] == "dense" else False,
    }
    stated["shape"] = layer["shape"]
    if infos[UP] is None:
        found["shape"] = _matrix_shape(weight.shape)
        if layer["kind"] in ("Conv1D", "Embedding"):
            found["shape"].reverse()
        stated["storage"], found["storage"] = layer["storage"], "dense"
    else:
        shapes = {name: None if info is None else info.shape for name, info in infos.items()}
        reader = reader_of({name for name, shape in shapes.items() if shape is not None})
        found["shape"], entry = reader.shape(shapes), reader.entry(shapes)
        stated |= {k: layer.get(k) for k in ("storage", "rank", "block")}
        found |= entry | {"block": entry["block"] or 1}
        if infos[PERM] is not None:
            stated["max_coefficient"] = layer.get("max_coefficient")
            found["max_coefficient"] = source.read(keys.key(UP)).abs().max().item()
    return None if stated == found else f"stated {stated}, found {found}"


def _matrix_shape(shape: tuple[int, ...]) -> list[int]:
    """Returns rows and columns; a convolution's columns cover its kernel in all channels."""
    return [shape[0], math.prod(shape[1:])]
