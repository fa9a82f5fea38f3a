"""The compressed weights are written here, with the files that belong to them."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lrc_cli import __version__
from lrc_cli.checkpoint.choice import NAMED
from lrc_cli.checkpoint.headers import FLOAT_DTYPES, FORMAT_VERSION
from lrc_cli.checkpoint.source import Source
from lrc_cli.checkpoint.writer import Entry, write_weights
from lrc_cli.config import config_hash, to_yaml
from lrc_cli.execution.precision import DTYPES
from lrc_cli.forms import FORMS
from lrc_cli.job.factors.fit import read_facts
from lrc_cli.job.output.fused import ExpertsApart
from lrc_cli.job.plan import Plan
from lrc_cli.job.work import WorkDirectory
from lrc_cli.network.keys import WEIGHT
from lrc_cli.network.missing import UNUSED
from lrc_cli.runtime.files import copy_file, write_json, write_text
from lrc_cli.runtime.progress import Progress, Seconds


def write_checkpoint(
    plan: Plan, work: WorkDirectory, folder: str, directory: Path, progress: Progress
) -> Seconds:
    """Streams the compressed weights and the files around them into a directory.

    Returns:
        The seconds of writing, by phase.
    """
    entries = list(_entries(plan, work, folder))
    with progress.phase("writing", 1) as phase:
        metadata: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "tool_version": __version__,
            "config_sha256": config_hash(plan.config),
        }
        table = layer_table(plan, work, folder)
        if plan.source.config is None:
            metadata |= {"factory": plan.config.model.factory, "layers": table}
        if plan.source.lacking:
            metadata |= {UNUSED: list(plan.source.lacking)}
        shard_bytes = plan.config.output.shard_bytes
        write_weights(directory, entries, shard_bytes=shard_bytes, metadata=metadata)
        if plan.source.config is not None:
            write_json(directory / "config.json", _model_config(plan, table))
        for file in plan.source.side_files():
            copy_file(file, directory / file.relative_to(plan.source.path))
        write_text(directory / "lrc.yaml", to_yaml(plan.config))
    return phase.timing


def layer_table(plan: Plan, work: WorkDirectory, folder: str) -> dict[str, dict[str, Any]]:
    """Returns {disk name: the form and its parameters} of layers that are not dense."""
    table = {}
    for unit, layers in plan.units.items():
        facts = read_facts(work, folder, unit)
        for layer in layers:
            fact = facts[layer.name]
            if not fact.is_dense:
                table[layer.keys.layer] = FORMS[fact.storage].table_entry(fact.stated)
    return table


def _model_config(plan: Plan, table: dict[str, Any]) -> dict[str, Any]:
    config = dict(plan.source.config or {})
    config.pop(NAMED, None)  # the output's weights have the names that transformers looks for
    if plan.config.output.dtype != "auto":
        config.pop("torch_dtype", None)
        config["dtype"] = plan.config.output.dtype
    if table:
        config["quantization_config"] = {
            "quant_method": "lrc",
            "format_version": FORMAT_VERSION,
            "layers": table,
        }
    return config


def _entries(plan: Plan, work: WorkDirectory, folder: str) -> Iterator[Entry]:
    """Yields every tensor of the output. Factors take the place of their weight in the order."""
    owners = {layer.keys.weight: layer for layer in plan.layers}
    stored = {key: unit for unit in plan.units for key in work.names(folder, unit)}
    cast = DTYPES.get(plan.config.output.dtype)
    apart = ExpertsApart(plan, work, folder)
    for key, info in plan.source.tensors.items():
        # A matrix of one expert is a part of the tensor that holds the matrices of all experts.
        if key in plan.source.parts:
            yield from apart.whole_before(key)
            if not apart.is_apart(key):
                continue
        if key not in stored:
            dtype = cast if cast is not None and info.dtype in FLOAT_DTYPES else info.dtype
            read = partial(_converted, plan.source, key, dtype)
            yield Entry(key=key, shape=info.shape, dtype=dtype, read=read)
            continue
        # A bias or a norm takes its own place.
        names, layer = [key], owners.get(key)
        if layer is not None:
            keys = layer.keys
            gained = [] if keys.bias in plan.source.tensors else [keys.bias]
            form = FORMS[read_facts(work, folder, layer.unit)[layer.name].storage]
            names += [keys.key(x) for x in form.tensors if x != WEIGHT] + gained
        for name in names:
            if name in stored:
                read = partial(_stored, work, folder, stored[name], name)
                tensor = read()
                yield Entry(key=name, shape=tuple(tensor.shape), dtype=tensor.dtype, read=read)


def _converted(source: Source, key: str, dtype: torch.dtype) -> torch.Tensor:
    return source.read(key).to(dtype)


def _stored(work: WorkDirectory, folder: str, unit: str, name: str) -> torch.Tensor:
    return work.get(folder, unit, [name])[0][name]
