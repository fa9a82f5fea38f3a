"""The main job: two phases over a work directory, because a global budget needs every layer's
spectrum before any rank is known."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch

from lrc_cli.checkpoint.output_directory import output_directory
from lrc_cli.config import Compression, Config
from lrc_cli.config.compression import default_allocation
from lrc_cli.data.purposes import purposes_of
from lrc_cli.engine import Solver
from lrc_cli.job.factors.decide_sequential import check_sequential, decide
from lrc_cli.job.factors.problem import fit
from lrc_cli.job.factors.sequential import factorize_sequentially
from lrc_cli.job.methods import methods_that
from lrc_cli.job.output.write import finish_output, write_checkpoint
from lrc_cli.job.plan import Plan, make_plan, with_config
from lrc_cli.job.spectra.ranks import allocate_ranks, check_reachable
from lrc_cli.job.spectra.solve import solve_cost, solve_units
from lrc_cli.job.spectra.survey import read_spectra, survey_layers
from lrc_cli.job.statistics.collect import collect_statistics
from lrc_cli.job.work import LOG, PASSING, SHARED, WorkDirectory
from lrc_cli.runtime.processes import ALONE, Processes
from lrc_cli.runtime.progress import Progress


def compress(
    config: Config,
    *,
    force: bool = False,
    restart: bool = False,
    progress: Progress | None = None,
    processes: Processes = ALONE,
) -> dict[str, Any]:
    """Compress the checkpoint that the config names and write the output directory.

    Args:
        force: replace an existing output.
        restart: drop the finished units of this run first.
        processes: those that share the work, each of which calls this.

    Returns:
        The report, as in report.json.

    Raises:
        InputError: the config or the data cannot be used; nothing was written.
        RunError: the run failed; finished units stay in the work directory.
    """
    progress = progress or Progress()
    (report,) = compress_each(
        [config], force=force, restart=restart, progress=progress, processes=processes
    )
    return report


def compress_each(
    configs: Sequence[Config],
    *,
    force: bool,
    restart: bool,
    progress: Progress,
    processes: Processes = ALONE,
) -> Iterator[dict[str, Any]]:
    """As `compress`, for configs that differ in the target and in `output.path` only.

    The statistics are collected once, for all of them.
    """
    with progress.phase("checks", 1):
        plans = make_plans(configs, force=force, processes=processes)
    _say_what_is_off(plans[0], progress)
    with (
        WorkDirectory(plans[0].work_dir, plans[0].statistics_fingerprint, processes) as work,
        progress.logged(work.root / LOG) if processes.is_first else nullcontext(),
    ):
        if restart:
            work.drop([*PASSING, *SHARED, *(plan.factors_stage for plan in plans)])
        collect_statistics(plans[0], work, progress)
        survey_layers(plans[0], work, progress)
        for plan in plans:
            if plan is not plans[0]:
                progress.seconds.clear()  # what was shared was the first one's
            yield _write(plan, work, force=force, progress=progress)


def make_plans(
    configs: Sequence[Config], *, force: bool, processes: Processes = ALONE
) -> list[Plan]:
    """The checked plans of configs that differ in the target and in `output.path` only."""
    first = make_plan(configs[0], force=force, processes=processes)
    plans = [first, *(with_config(first, config, force=force) for config in configs[1:])]
    for plan in plans:
        check_sequential(plan)
        check_reachable(plan)
    return plans


def _write(plan: Plan, work: WorkDirectory, *, force: bool, progress: Progress) -> dict[str, Any]:
    """From spectra to the output, and its report."""
    compression, factors, processes = plan.config.compression, plan.factors_stage, plan.processes
    ranks = allocate_ranks(plan, read_spectra(plan, work))
    decision = decide(plan, work, ranks)
    if compression.sequential is not False:
        used = "on" if decision.used else "off"
        progress.note(f"compression.sequential: {used}: {decision.reason}")
    if not decision.used and not any(solver.uses_ridge for solver in plan.solvers):
        _say_unused(compression, "ridge", "no layer is fitted with one", progress)
    factorize = factorize_sequentially if decision.used else factorize_layers
    factorize(plan, work, ranks, factors, progress)
    with output_directory(plan.output, force=force, processes=processes) as directory:
        processes.from_first(lambda: write_checkpoint(plan, work, factors, directory, progress))
        report = finish_output(plan, work, factors, directory, decision.facts(), progress)
    _say_what_failed(report, progress)
    return report


def _say_what_failed(report: dict[str, Any], progress: Progress) -> None:
    if not report["target"]["met"]:
        name, value = report["target"]["name"], report["target"]["value"]
        progress.note(f"compression.{name}: {value} is missed: see the layers that fell back")
    if all(layer["storage"] == "dense" for layer in report["layers"]):
        progress.note("no layer was factorised: see the reasons in the report")


def _say_what_is_off(plan: Plan, progress: Progress) -> None:
    """A setting that resolves to nothing is never ignored in silence."""
    compression = plan.config.compression
    if not any(_reads_loss(solver) for solver in plan.solvers):
        methods = " or ".join(methods_that(_reads_loss))
        _say_unused(compression, "loss", f"no layer has {methods}", progress)
    target, _ = compression.target
    if target != "size":
        _say_unused(compression, "size_of", f"the target is {target}", progress)
    if target in ("max_layer_error", "threshold"):
        default = default_allocation(compression.method)
        why = f"{target} decides layer by layer"
        _say_unused(compression, "allocation", why, progress, default=default)
    for purpose in purposes_of(plan.config):
        found = len(plan.sequences.get(purpose.name, ()))
        if found < purpose.num_sequences:
            lowered = f"{found} sequences, not {purpose.num_sequences}, because no more are left"
            progress.note(f"{purpose.name}: {lowered if found else 'skipped, no sequence is left'}")


def _reads_loss(solver: Solver) -> bool:
    return "fisher" in solver.needs


def _say_unused(
    compression: Compression, key: str, why: str, progress: Progress, *, default: object = None
) -> None:
    """Say that a key is not used, where it is not at its default.

    Args:
        default: the default where it follows from other keys; None: it is the section's own.
    """
    value = getattr(compression, key)
    if value != (getattr(Compression, key) if default is None else default):
        progress.note(f"compression.{key}: {value} is not used: {why}")


def factorize_layers(
    plan: Plan, work: WorkDirectory, ranks: dict[str, int], stage: str, progress: Progress
) -> None:
    """Phase two: the factors of every unit that has none yet."""
    todo = work.missing(stage, plan.units)
    if not todo:
        return
    own = list(filter(plan.owns, todo))
    cost = solve_cost(x for unit in own for x in plan.units[unit])
    with progress.phase("factors", cost) as phase:
        for unit, solved in solve_units(plan, own, partial(fit, plan, work, ranks)):
            tensors: dict[str, torch.Tensor] = {}
            for layer in plan.units[unit]:
                tensors |= solved[layer.name].tensors(layer)
            work.put(stage, unit, tensors, {name: fitted.facts for name, fitted in solved.items()})
            phase.advance(solve_cost(plan.units[unit]))
    plan.processes.wait()
