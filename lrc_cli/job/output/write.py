"""The output directory is written here: weights, then checks, quality, report and manifest."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lrc_cli import __version__
from lrc_cli.checkpoint.fused import MARK_DTYPE, NO_RANK
from lrc_cli.checkpoint.headers import FLOAT_DTYPES, FORMAT_VERSION
from lrc_cli.checkpoint.manifest import MANIFEST_NAME, build_manifest
from lrc_cli.checkpoint.source import Source, open_source
from lrc_cli.checkpoint.writer import Entry, write_weights
from lrc_cli.config import config_hash, to_yaml
from lrc_cli.data.purposes import CALIBRATION
from lrc_cli.errors import RunError, is_networks
from lrc_cli.execution.losses import all_finite, floating_outputs
from lrc_cli.execution.network import Network, make_network
from lrc_cli.execution.precision import DTYPES
from lrc_cli.execution.walk import compressed_failure
from lrc_cli.forms import FORMS
from lrc_cli.job.factors.stored import read_facts
from lrc_cli.job.output.certify import certify
from lrc_cli.job.output.record import build_record
from lrc_cli.job.plan import Plan
from lrc_cli.job.work import STATISTICS, WorkDirectory
from lrc_cli.network.keys import WEIGHT
from lrc_cli.network.opening import open_module
from lrc_cli.quality.compare import compare, scoring
from lrc_cli.quality.records import QualityRow
from lrc_cli.quality.worst_case import worst_case
from lrc_cli.report import render_card, render_html
from lrc_cli.report.gates import check_gates
from lrc_cli.report.record import REPORT, LossRecord, Record, SequentialDecision
from lrc_cli.runtime.files import copy_file, write_json, write_text
from lrc_cli.runtime.memory import peak_memory
from lrc_cli.runtime.progress import Progress, Seconds
from lrc_cli.runtime.spill import HostMemory


def write_checkpoint(
    plan: Plan, work: WorkDirectory, stage: str, directory: Path, progress: Progress
) -> Seconds:
    """Streams the compressed weights and the files around them into a directory.

    Returns:
        The seconds of writing, by phase.
    """
    entries = list(_entries(plan, work, stage))
    with progress.phase("writing", 1) as phase:
        metadata = {
            "format_version": FORMAT_VERSION,
            "tool_version": __version__,
            "config_sha256": config_hash(plan.config),
        }
        table = layer_table(plan, work, stage)
        if plan.source.config is None:
            metadata |= {"factory": plan.config.model.factory, "layers": table}
        shard_bytes = plan.config.output.shard_bytes
        write_weights(directory, entries, shard_bytes=shard_bytes, metadata=metadata)
        if plan.source.config is not None:
            write_json(directory / "config.json", _model_config(plan, table))
        for file in plan.source.side_files():
            copy_file(file, directory / file.relative_to(plan.source.path))
        write_text(directory / "lrc.yaml", to_yaml(plan.config))
    return phase.timing


def layer_table(plan: Plan, work: WorkDirectory, stage: str) -> dict[str, dict[str, Any]]:
    """Returns {disk name: the form and its parameters} of layers that are not dense."""
    table = {}
    for unit, layers in plan.units.items():
        facts = read_facts(work, stage, unit)
        for layer in layers:
            fact = facts[layer.name]
            if not fact.is_dense:
                table[layer.keys.layer] = FORMS[fact.storage].table_entry(fact.stated)
    return table


def _model_config(plan: Plan, table: dict[str, Any]) -> dict[str, Any]:
    config = dict(plan.source.config or {})
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


def _entries(plan: Plan, work: WorkDirectory, stage: str) -> Iterator[Entry]:
    """Yields every tensor of the output. Factors take the place of their weight in the order."""
    owners = {layer.keys.weight: layer for layer in plan.layers}
    owners |= {layer.keys.bias: layer for layer in plan.layers}
    cast = DTYPES.get(plan.config.output.dtype)
    apart = _ExpertsApart(plan, work, stage)
    for key, info in plan.source.tensors.items():
        if key in plan.source.parts:
            yield from apart.whole_before(key)
            if not apart.is_apart(key):
                continue
        layer = owners.get(key)
        packed, facts = ({}, {}) if layer is None else work.get(stage, layer.unit)
        if layer is None or key not in packed:
            dtype = cast if cast is not None and info.dtype in FLOAT_DTYPES else info.dtype
            read = partial(_converted, plan.source, key, dtype)
            yield Entry(key=key, shape=info.shape, dtype=dtype, read=read)
            continue
        names = [key]
        keys = layer.keys
        if key == keys.weight:
            gained = [] if keys.bias in plan.source.tensors else [keys.bias]
            form = FORMS[facts[layer.name]["storage"]]
            names += [keys.key(x) for x in form.tensors if x != WEIGHT] + gained
        for name in names:
            if name in packed:
                tensor, read = packed[name], partial(_packed, work, stage, layer.unit, name)
                yield Entry(key=name, shape=tuple(tensor.shape), dtype=tensor.dtype, read=read)


class _ExpertsApart:
    """The fused experts that are written apart, because some of their matrices are factorised."""

    def __init__(self, plan: Plan, work: WorkDirectory, stage: str) -> None:
        self.source, self.dtype = plan.source, DTYPES.get(plan.config.output.dtype)
        self.ranks: dict[str, int] = {}
        """{key of a factorised matrix: its rank}."""
        for unit, layers in plan.units.items():
            facts = read_facts(work, stage, unit)
            for layer in layers:
                fact, key = facts[layer.name], layer.keys.weight
                if key in plan.source.parts and not fact.is_dense:
                    self.ranks[key] = NO_RANK if fact.rank is None else fact.rank
        self.experts = {self._experts(key) for key in self.ranks}

    def _experts(self, key: str) -> str:
        return self.source.fused[self.source.parts[key][0]].experts

    def is_apart(self, key: str) -> bool:
        """Returns whether a part of a fused tensor is written as a tensor of its own."""
        return self._experts(key) in self.experts

    def whole_before(self, key: str) -> Iterator[Entry]:
        """Yields what is written under a fused tensor's own key, when its first part comes."""
        whole, index = self.source.parts[key]
        fused, info = self.source.fused[whole], self.source.weights.tensors[whole]
        if index:
            return
        if not self.is_apart(key):
            is_cast = self.dtype is not None and info.dtype in FLOAT_DTYPES
            dtype = self.dtype if is_cast and self.dtype is not None else info.dtype

            def read() -> torch.Tensor:
                return self.source.weights.read(whole).to(dtype)

            yield Entry(key=whole, shape=info.shape, dtype=dtype, read=read)
        elif fused.has_mark:
            ranks = [self.ranks.get(part, 0) for part in fused.keys(info.shape[0])]
            mark = torch.tensor(ranks, dtype=MARK_DTYPE)
            yield Entry(key=whole, shape=(len(ranks),), dtype=MARK_DTYPE, read=lambda: mark)


def _converted(source: Source, key: str, dtype: torch.dtype) -> torch.Tensor:
    return source.read(key).to(dtype)


def _packed(work: WorkDirectory, stage: str, unit: str, name: str) -> torch.Tensor:
    return work.get(stage, unit, [name])[0][name]


def finish_output(
    plan: Plan,
    work: WorkDirectory,
    stage: str,
    directory: Path,
    sequential: SequentialDecision,
    seconds: Seconds,
    progress: Progress,
) -> Record:
    """Reads the output back, checks and measures it, and writes the report and the manifest.

    All processes call this and share the measuring.

    Args:
        directory: the directory that `write_checkpoint` filled.
        sequential: whether the layers were fitted sequentially, and why.
        seconds: the seconds of the phases until now, for the report.
    """
    written = open_source(directory, factorised=True)
    with progress.phase("verification", 1) as phase:
        plan.processes.from_first(lambda: _check_written(written, plan.config.output.dtype))
        module, written = open_module(
            written,
            factory=plan.config.model.factory,
            trust_remote_code=plan.config.model.trust_remote_code,
        )
        network = make_network(module, device=plan.device, dtype=plan.network.dtype)
        _check_forward(network, plan)
    memory = HostMemory(plan.config.runtime.memory_bytes, work.root)
    seconds = seconds | phase.timing
    quality, took = _measure(plan, network, memory, progress)
    seconds |= took
    facts = {k: x for unit in plan.units for k, x in read_facts(work, stage, unit).items()}
    certified = certify(plan, network, facts, memory.keep, progress)
    record = build_record(
        plan,
        layers=facts,
        held_out=certified.held_out,
        loss=_loss(plan, work),
        sequential=sequential,
        written=written,
        quality=quality,
        certificate=certified.certificate,
        worst_case=worst_case(
            plan.network.module, network.module, plan.sequences[CALIBRATION].inputs
        ),
        seconds=seconds | certified.seconds,
        memory=peak_memory(plan.device),
    )
    record = replace(record, gates=check_gates(plan.config.gates, record))
    return plan.processes.from_first(lambda: _write_record(directory, record))


def _write_record(directory: Path, record: Record) -> Record:
    write_json(directory / REPORT, record.to_json())
    write_text(directory / "README.md", render_card(record))
    write_text(directory / "report.html", render_html(record))
    write_json(directory / MANIFEST_NAME, build_manifest(directory))
    return record


def _loss(plan: Plan, work: WorkDirectory) -> LossRecord | None:
    """Returns the loss that the statistics were measured with; None where no layer needed it."""
    for unit in plan.units:
        loss = work.facts(STATISTICS, unit)["loss"]
        if loss is not None:
            return LossRecord.from_json(loss, f"{STATISTICS}/{unit}", "loss")
    return None


def _check_written(written: Source, dtype: str) -> None:
    key = written.find_not_finite()
    if key is not None:
        raise RunError(
            f"output.dtype: {dtype} cannot hold the numbers of tensor {key}: infinite or NaN there",
            "set output.dtype: float32 or bfloat16",
        )


def _check_forward(network: Network, plan: Plan) -> None:
    try:
        with torch.no_grad():
            outputs = network(next(plan.sequences[CALIBRATION].batches(1)))
    except Exception as error:
        if not is_networks(error):
            raise
        raise compressed_failure(error) from error
    if not all_finite(floating_outputs(outputs)):
        raise RunError(
            "the compressed network's outputs are not finite",
            "ask for less compression, or set output.dtype: float32",
        )


def _measure(
    plan: Plan, network: Network, memory: HostMemory, progress: Progress
) -> tuple[list[QualityRow], Seconds]:
    """Compares both networks on every text. Returns a row for each text, and seconds by phase."""
    names = plan.evaluation_names
    if not names:
        return [], {}
    probe = next(plan.sequences[names[0]].batches(1))
    loss = scoring(plan.network, probe, plan.tokenizer)
    rows = []
    with progress.phase("evaluation", sum(len(plan.sequences[name]) for name in names)) as phase:
        for name in names:
            sequences = plan.sequences[name]
            scores = compare(
                plan.network,
                network,
                sequences,
                loss=loss,
                seed=plan.config.runtime.seed,
                advance=phase.advance,
                keep=memory.keep,
                processes=plan.processes,
            )
            row = QualityRow(
                text=name,
                scores=scores,
                population=sequences.population,
                sha256=sequences.sha256,
            )
            rows.append(row)
    return rows, phase.timing
