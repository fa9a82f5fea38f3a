"""The written output is read back, checked, measured and described in a record here."""

from dataclasses import replace
from pathlib import Path

import torch

from lrc_cli.checkpoint.manifest import MANIFEST_NAME, build_manifest
from lrc_cli.checkpoint.source import Source, open_source
from lrc_cli.data.purposes import CALIBRATION
from lrc_cli.errors import RunError
from lrc_cli.execution.constancy import PASSES_OF_COUNTERS, check_again
from lrc_cli.execution.glance import glance
from lrc_cli.execution.network import Network, NetworkError, make_network
from lrc_cli.execution.outputs import all_finite, floating_outputs
from lrc_cli.execution.walk import compressed_failure
from lrc_cli.job.factors.fit import read_facts
from lrc_cli.job.output.certify import certify
from lrc_cli.job.output.record import build_record
from lrc_cli.job.plan import Plan
from lrc_cli.job.work import STATISTICS, WorkDirectory
from lrc_cli.network.opening import open_module
from lrc_cli.quality.compare import compare, scoring
from lrc_cli.quality.records import QualityRow
from lrc_cli.quality.worst_case import worst_case
from lrc_cli.report import render_card, render_html
from lrc_cli.report.gates import check_gates
from lrc_cli.report.record import REPORT, LossRecord, Record, Recovery, SequentialDecision
from lrc_cli.runtime.files import write_json, write_text
from lrc_cli.runtime.memory import peak_memory
from lrc_cli.runtime.progress import Progress, Seconds
from lrc_cli.runtime.spill import HostMemory


def finish_output(
    plan: Plan,
    work: WorkDirectory,
    folder: str,
    directory: Path,
    sequential: SequentialDecision,
    recovery: Recovery | None,
    seconds: Seconds,
    progress: Progress,
) -> Record:
    """Reads the output back, checks and measures it, and writes the report and the manifest.

    All processes call this and share the measuring.

    Args:
        directory: the directory that `write_checkpoint` filled.
        sequential: whether the layers were fitted sequentially, and why.
        recovery: what training the factors gave; None where nothing was trained.
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
        _check_forward(network, plan, progress)
    memory = HostMemory(plan.config.runtime.memory_bytes, work.root)
    seconds = seconds | phase.timing
    quality, took = _measure(plan, network, memory, progress)
    seconds |= took
    facts = {k: x for unit in plan.units for k, x in read_facts(work, folder, unit).items()}
    certified = certify(plan, network, facts, memory.keep, progress)
    record = build_record(
        plan,
        layers=facts,
        held_out=certified.held_out,
        loss=_loss(plan, work),
        sequential=sequential,
        recovery=recovery,
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


def _check_forward(network: Network, plan: Plan, progress: Progress) -> None:
    """Raises RunError if the written network fails, or the dense network has changed meanwhile."""
    counting = check_again(plan.network, plan.trace)
    if counting:
        progress.note(
            f"the network's own code keeps what changes from pass to pass ({counting[0]}):"
            f" {PASSES_OF_COUNTERS} passes over one sequence gave the same outputs"
        )
    try:
        with torch.no_grad():
            outputs = glance(network, next(plan.sequences[CALIBRATION].batches(1)))
    except NetworkError as error:
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
                one_in=sequences.one_in,
                sha256=sequences.sha256,
            )
            rows.append(row)
    return rows, phase.timing
