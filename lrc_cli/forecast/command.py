"""`lrc plan` and `compress --dry-run` check a job, estimate it and draw the size/error curve."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch

from lrc_cli.config import Config
from lrc_cli.engine import Predicted
from lrc_cli.errors import InputError
from lrc_cli.forecast.curve import curve_of, point_of
from lrc_cli.forecast.data_pass import run_statistics
from lrc_cli.forecast.estimate import (
    Piece,
    Space,
    check_disk,
    check_memory,
    peak_of,
    seconds_by_phase,
)
from lrc_cli.forecast.more_data import judge_on_other_data
from lrc_cli.forecast.probe import Probe, existing_parent, probe_directory
from lrc_cli.forecast.quality import run_quality
from lrc_cli.forecast.recover import run_recover
from lrc_cli.forecast.sequential import run_sequential
from lrc_cli.job.factors.decide_sequential import decide, kept_fraction
from lrc_cli.job.plan import Plan
from lrc_cli.job.run import make_plans, run_shared_stages, say_shortfalls
from lrc_cli.job.spectra.allocate import Granted, allocate, nothing_known, rest_bytes
from lrc_cli.job.spectra.survey import dense_reasons, read_predicted, vectors_bytes
from lrc_cli.job.work import LOG, SPECTRA, WorkDirectory
from lrc_cli.runtime.memory import available_bytes
from lrc_cli.runtime.progress import Progress

SPEED_BYTES = 32 << 20
"""The bytes that are written once to measure the speed of the disk."""
PHASES = (
    *("checks", "statistics", "spectra", "factors", "recover", "writing"),
    *("verification", "evaluation", "selection", "certification"),
)

Forecast = dict[str, Any]


def forecast(configs: Sequence[Config], *, collect: bool, progress: Progress) -> Forecast:
    """Makes every check of `compress`, estimates the jobs and, with spectra, the size/error curve.

    Args:
        configs: jobs that differ in `compression.size` and `output.path` only.
        collect: whether missing statistics and spectra are collected.

    Raises:
        InputError: a job cannot be done, or does not fit in memory or on the disk.
        RunError: the probe failed, or another run uses the work directory.
    """
    with progress.phase("checks", 1) as checks, _refusing_small_gpus(configs[0]):
        plans = make_plans(configs, force=True)
    for plan in plans:
        if plan.output.exists():
            progress.note(f"{plan.output}: the output exists, compress needs --force to replace it")
    first = plans[0]
    say_shortfalls(first, progress)
    with ExitStack() as stack:
        job_work = _open_job_work(first, stack)
        known = job_work is not None and _has_spectra(first, job_work)
        with progress.phase("probe", 1), _refusing_small_gpus(configs[0]):
            probe = Probe(first, job_work, probe_directory(first, stack), progress)
            found = _estimates(plans, probe, checks.seconds)
        surveyed = None
        if known and job_work is not None:
            surveyed = _surveyed(first, job_work)
            found["calibration"] |= _of_more_data(first, job_work, *surveyed)
    if surveyed is None and collect:
        with (
            WorkDirectory(
                first.work_dir,
                first.statistics_fingerprint,
                check_inputs=first.inputs.check_checkpoint,
            ) as work,
            progress.logged(work.root / LOG),
        ):
            run_shared_stages(first, work, progress)
            surveyed = _surveyed(first, work)
            found["calibration"] |= _of_more_data(first, work, *surveyed)
    found["spectra"] = "reused" if known else "collected" if surveyed is not None else None
    if surveyed is not None:
        predicted, reasons = surveyed
        found["curve"] = curve_of(first, predicted)
        for plan, job in zip(plans, found["jobs"], strict=True):
            granted = allocate(plan, predicted, reasons)
            job |= {**point_of(plan, granted, predicted), "ranks": _ranks(granted)}
    return found


def _surveyed(plan: Plan, work: WorkDirectory) -> tuple[Mapping[str, Predicted], Mapping[str, str]]:
    """Returns the predicted errors of layers, and why layers without errors stay dense, by name."""
    return read_predicted(plan, work), dense_reasons(plan, work)


def _of_more_data(
    plan: Plan,
    work: WorkDirectory,
    predicted: Mapping[str, Predicted],
    reasons: Mapping[str, str],
) -> dict[str, Any]:
    """Returns what more calibration data would bring; nothing for a target out of reach."""
    try:
        granted = allocate(plan, predicted, reasons)
    except InputError:  # the caller meets it too
        return {}
    return judge_on_other_data(plan, work, granted)


@contextmanager
def _refusing_small_gpus(config: Config) -> Iterator[None]:
    """Turns a lack of GPU memory into InputError: a probe takes as much as the job."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"runtime.device: {config.runtime.device}: the GPU's memory does not hold one block at"
            " work",
            "give shorter sequences, exclude the widest layers, or set runtime.device: cpu",
        ) from error


def _open_job_work(plan: Plan, stack: ExitStack) -> WorkDirectory | None:
    """Opens the job's work directory, if an earlier run has left a directory."""
    if not (plan.work_dir / "fingerprint.json").exists():
        return None
    work = WorkDirectory(plan.work_dir, plan.statistics_fingerprint)
    return stack.enter_context(work)


def _has_spectra(plan: Plan, work: WorkDirectory) -> bool:
    return all(work.has(SPECTRA, unit) for unit in plan.units)


def _estimates(plans: Sequence[Plan], probe: Probe, checks: float) -> Forecast:
    """Estimates time, memory and disk from the probe. Raises InputError for what does not fit."""
    first = plans[0]
    # One file shows how fast the disk writes.
    probe.work.put("speed", "", {"zeros": torch.zeros(SPEED_BYTES // 4)}, {})
    per_byte = probe.work.seconds["speed"] / SPEED_BYTES
    # The pass runs on a few micro-batches. A network that does not fit should not be solved first.
    run_statistics(probe)
    _check_memory(probe)
    # Spectra are solved for one unit of every kind, and predict the errors of the others.
    kinds = probe.unit_kinds()
    probe.run_spectra(kinds)
    probe.spread_facts(kinds)
    predicted = probe.predicted(kinds)
    pieces = [Piece(phase="checks", seconds=checks), *probe.pieces]
    lasting = probe.statistics_bytes + vectors_bytes(first, probe.missing(SPECTRA))
    jobs, outputs = list[dict[str, Any]](), 0
    quality: list[Piece] | None = None
    for plan in plans:
        # The factors of each size are made for one unit of every kind.
        granted = _likely_granted(plan, predicted)
        decision = decide(plan, probe.work, granted)
        if decision.used:
            factors = run_sequential(probe, plan, granted, decision, kinds)
            _add_both_networks(probe, kept_fraction(plan, granted) * plan.compressible_bytes)
        else:
            factors = probe.run_factors(plan, granted, kinds)
        # The time of all measurements after the factors does not depend on the size.
        if quality is None:
            quality, memory = run_quality(plan, probe.work, kinds)
            probe.memory.append(memory)
        # The size of the output follows from the ranks, and its time from the speed of the disk.
        granted_bytes = int(kept_fraction(plan, granted) * plan.compressible_bytes)
        size = granted_bytes + rest_bytes(plan)
        training = run_recover(probe, plan, granted, kinds)
        writing = Piece(phase="writing", seconds=per_byte, times=size)
        own = [*factors, *training.pieces, writing, *quality]
        pieces += own
        outputs += size
        lasting += training.stored + (0 if probe.has_factors(plan) else granted_bytes)
        probe.spilled_bytes = max(probe.spilled_bytes, training.unfinished)
        target, value = plan.config.compression.target
        jobs.append(
            {
                "target": {"name": target, "value": value},
                "output": str(plan.output),
                "checkpoint_bytes": size,
                "sequential": decision.record().to_json(),
                "recover": training.record,
                "seconds": seconds_by_phase(own),
            }
        )
    _check_memory(probe)
    # The first units are stored at the turn of the pass, while everything that passes is still on
    # the disk. Little of it is left when the last unit is stored. Factors come later.
    fraction = min(probe.lag / max(len(first.units), 1), 1.0)
    turn = probe.passing_bytes + int(probe.statistics_bytes * fraction)
    end = probe.statistics_bytes + min(probe.passing_bytes, 2 * probe.boundary_bytes)
    work = max(lasting + probe.spilled_bytes, turn, end)
    spaces = [
        _space_at(first, "runtime.work_dir", work, work - lasting),
        _space_at(first, "output.path", outputs),
    ]
    check_disk(spaces)
    seconds = seconds_by_phase(pieces)
    return {
        "checkpoint": str(first.source.path),
        "device": str(first.device),
        "runs_whole": probe.why_whole,
        "layers": len(first.layers),
        "blocks": len(first.units),
        "work_dir": str(first.work_dir),
        "calibration": {} if first.reach is None else first.reach.to_json(),
        "seconds": {name: seconds[name] for name in PHASES if name in seconds},
        "total_seconds": sum(seconds.values()),
        "memory": {
            "phases": {m.phase: m.total for m in probe.memory},
            "peak": peak_of(probe.memory).total,
            "gpu_peak": max(m.gpu for m in probe.memory),
            "available": available_bytes(),
        },
        "disk": [
            {"key": s.key, "path": str(s.path), "needed": s.needed, "free": s.free} for s in spaces
        ],
        "jobs": jobs,
    }


def _add_both_networks(probe: Probe, factor_bytes: float) -> None:
    """Adds what sequential fitting holds: both networks' hidden states, and all factors in files.

    Hidden states stay in memory up to the limit.
    """
    hidden, limit = 2 * probe.hidden_bytes, probe.plan.config.runtime.memory_bytes
    kept = hidden if limit is None else min(hidden, limit)
    largest = max((m for m in probe.memory if m.phase == "factors"), key=lambda m: m.measured)
    probe.memory.append(replace(largest, kept=kept))
    probe.spilled_bytes = max(probe.spilled_bytes, int(factor_bytes) + hidden - kept)


def _check_memory(probe: Probe) -> None:
    if probe.memory:
        check_memory(peak_of(probe.memory), available_bytes())


def _likely_granted(plan: Plan, predicted: Mapping[str, Predicted]) -> Granted:
    """Returns what the errors of a few layers grant, or the shapes where errors rule it out."""
    try:
        return allocate(plan, predicted, {})
    except InputError:
        return allocate(plan, nothing_known(plan), {})


def _ranks(granted: Granted) -> dict[str, int | None]:
    """Returns the ranks by layer name; 0 stands for dense, None for a form without a rank."""
    return {name: 0 if choice.is_dense else choice.rank for name, choice in granted.items()}


def _space_at(plan: Plan, key: str, needed: int, passing: int = 0) -> Space:
    path = plan.output if key == "output.path" else plan.work_dir
    parent = existing_parent(path)
    return Space(
        key=key,
        path=path,
        needed=needed,
        passing=passing,
        free=shutil.disk_usage(parent).free,
        device=parent.stat().st_dev,
    )
