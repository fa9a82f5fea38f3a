"""The job makes a plan, runs the stages that fill the work directory, and writes the output.

A global budget needs every layer's spectrum before any rank is known. So statistics and spectra of
all layers come first, then the ranks, then the factors.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import count
from typing import Any

from lrc_cli.checkpoint.output_directory import output_directory
from lrc_cli.config import Compression, Config
from lrc_cli.config.compression import default_allocation
from lrc_cli.engine import Solver
from lrc_cli.errors import ChangedInput, Interrupted
from lrc_cli.job.data_found import data_notes
from lrc_cli.job.factors.decide_sequential import Decision, check_sequential, decide
from lrc_cli.job.factors.plain import FactorsStage
from lrc_cli.job.factors.sequential import SequentialStage
from lrc_cli.job.inputs import Inputs
from lrc_cli.job.methods import methods_that
from lrc_cli.job.output.finish import finish_output
from lrc_cli.job.output.write import write_checkpoint
from lrc_cli.job.plan import Plan, make_plan, with_config
from lrc_cli.job.recover.measured import has_factors
from lrc_cli.job.recover.stage import RecoverStage, check_recover, own_stages, read_recovery
from lrc_cli.job.spectra.allocate import allocate, check_reachable
from lrc_cli.job.spectra.measured import MeasuredStage, measured_storages
from lrc_cli.job.spectra.survey import SpectraStage, dense_reasons, read_predicted
from lrc_cli.job.stage import run_stage
from lrc_cli.job.statistics.collect import StatisticsStage, prepare_pass
from lrc_cli.job.work import PASSING, SHARED, DamagedUnit, WorkDirectory
from lrc_cli.report.record import Record
from lrc_cli.runtime.processes import ALONE, Processes
from lrc_cli.runtime.progress import Progress, Seconds

ATTEMPTS = 3
"""How often an output is begun before units that are damaged meanwhile end the run."""


def compress(
    config: Config,
    *,
    force: bool = False,
    restart: bool = False,
    progress: Progress | None = None,
    processes: Processes = ALONE,
) -> dict[str, Any]:
    """Compresses the checkpoint that the config names and writes the output directory.

    Args:
        force: whether an existing output is replaced.
        restart: whether finished units of earlier runs are dropped first.
        processes: the processes that share the work. Each process calls this.

    Returns:
        The record, as in report.json.

    Raises:
        InputError: the config or the data cannot be used; nothing was written.
        RunError: the run failed; finished units stay in the work directory.
    """
    progress = progress or Progress()
    (record,) = compress_each(
        [config], force=force, restart=restart, progress=progress, processes=processes
    )
    return record.to_json()


def compress_each(
    configs: Sequence[Config],
    *,
    force: bool,
    restart: bool,
    progress: Progress,
    processes: Processes = ALONE,
) -> Iterator[Record]:
    """Runs several jobs as `compress` runs one, and yields the record of each.

    The configs differ in the target and in `output.path` only, so all use the same statistics.
    """
    with progress.phase("checks", 1) as checks:
        plans = make_plans(configs, force=force, processes=processes)
    first = plans[0]
    say_shortfalls(first, progress)
    _say_unused_settings(first, progress)
    with (
        _blaming(first.inputs),
        WorkDirectory(
            first.work_dir,
            first.statistics_fingerprint,
            processes,
            check_inputs=first.inputs.check_checkpoint,
        ) as work,
        work.logged(progress),
    ):
        _say_what_is_read(first, progress)
        if restart:
            work.drop([*PASSING, *SHARED, *(stage for x in plans for stage in own_stages(x))])
        for plan in plans:
            # The seconds of the checks are counted once, with the first plan.
            seconds = checks.timing if plan is first else {}
            yield _run_stages_and_write(plan, work, seconds, force=force, progress=progress)


@contextmanager
def _blaming(inputs: Inputs) -> Iterator[None]:
    """A context in which a failure is put down to a changed input if an input has changed."""
    try:
        yield
    except (ChangedInput, Interrupted):
        raise
    except Exception as error:
        what = inputs.change()
        if what is None:
            raise
        raise ChangedInput(what) from error


def _run_stages_and_write(
    plan: Plan, work: WorkDirectory, seconds: Seconds, *, force: bool, progress: Progress
) -> Record:
    """As `_write`, after the stages that all sizes share, and again where a unit is damaged.

    The stages find finished units, so they do nothing for a second size. Several processes do not
    begin again: each may have come to another place. The same command does.

    Raises:
        DamagedUnit: units are damaged again and again, or there are several processes.
    """
    attempts = count(1)
    while True:
        try:
            shared = seconds | run_shared_stages(plan, work, progress)
            return _write(plan, work, shared, force=force, progress=progress)
        except DamagedUnit:
            if next(attempts) == ATTEMPTS or work.processes.size > 1:
                raise
            work.distrust()


def run_shared_stages(plan: Plan, work: WorkDirectory, progress: Progress) -> Seconds:
    """Collects what every size needs: the statistics and the spectra that are missing."""
    statistics = StatisticsStage(plan, work, partial(prepare_pass, plan, work, progress))
    seconds = run_stage(statistics, progress)
    seconds |= run_stage(SpectraStage(plan, work), progress)
    for storage in measured_storages(plan):
        seconds |= run_stage(MeasuredStage(plan, work, storage), progress)
    return seconds


def make_plans(
    configs: Sequence[Config], *, force: bool, processes: Processes = ALONE
) -> list[Plan]:
    """Returns the checked plans of configs that differ in the target and in `output.path` only."""
    first = make_plan(configs[0], force=force, processes=processes)
    plans = [first, *(with_config(first, config, force=force) for config in configs[1:])]
    for plan in plans:
        check_sequential(plan)
        check_reachable(plan)
    check_recover(plans)
    return plans


def _write(
    plan: Plan, work: WorkDirectory, shared: Seconds, *, force: bool, progress: Progress
) -> Record:
    """Makes the factors of one size, writes its output and returns its record.

    Args:
        shared: the seconds of earlier phases that are counted with this output.
    """
    work.check_inputs()
    granted = allocate(plan, read_predicted(plan, work), dense_reasons(plan, work))
    decision = decide(plan, work, granted)
    _say_how_it_is_fitted(plan, decision, progress)
    factors = (
        SequentialStage(plan, work, granted, decision.excluded)
        if decision.used
        else FactorsStage(plan, work, granted)
    )
    seconds = shared | run_stage(factors, progress)
    processes, folder, recovery = plan.processes, factors.folder, None
    if plan.config.recover.is_used and has_factors(work, folder, plan.units):
        stage = RecoverStage.decided(plan, work, folder, granted, progress.note)
        seconds |= run_stage(stage, progress)
        folder, recovery = stage.folder, read_recovery(work, stage.folder)
    plan.inputs.check(processes)
    with output_directory(plan.output, force=force, processes=processes) as directory:
        seconds |= processes.from_first(
            lambda: write_checkpoint(plan, work, folder, directory, progress)
        )
        record = finish_output(
            plan, work, folder, directory, decision.record(), recovery, seconds, progress
        )
        plan.inputs.check(processes)
    _say_what_failed(record, progress)
    return record


def _say_how_it_is_fitted(plan: Plan, decision: Decision, progress: Progress) -> None:
    if plan.config.compression.sequential is not False:
        used = "on" if decision.used else "off"
        progress.note(f"compression.sequential: {used}: {decision.reason}")
    if not decision.used and not any(solver.uses_ridge for solver in plan.solvers):
        _say_unused_key(plan.config.compression, "ridge", "no layer is fitted with one", progress)


def _say_what_failed(record: Record, progress: Progress) -> None:
    goal = record.target
    if not goal.met:
        progress.note(
            f"compression.{goal.name}: {goal.value} is missed: see the layers that fell back"
        )
    if not record.factorised:
        progress.note("no layer was factorised: see the reasons in the report")


def say_shortfalls(plan: Plan, progress: Progress) -> None:
    """Says what of checkpoint and data is not used, and which numbers are lower than asked."""
    for note in [*plan.source.notes, *data_notes(plan)]:
        progress.note(note)


def _say_what_is_read(plan: Plan, progress: Progress) -> None:
    """Says which texts are so long that passages of them are read."""
    for name, drawn in plan.sequences.items():
        if drawn.one_in is not None:
            progress.note(
                f"{name}: the text is long, and one passage in {drawn.one_in} of it is read;"
                f" {len(drawn):,} of {drawn.population:,} sequences are drawn"
            )


def _say_unused_settings(plan: Plan, progress: Progress) -> None:
    """Says which settings have no effect: none is ignored in silence."""
    compression = plan.config.compression
    if not any(_reads_loss(solver) for solver in plan.solvers):
        methods = " or ".join(methods_that(_reads_loss))
        _say_unused_key(compression, "loss", f"no layer has {methods}", progress)
    target, _ = compression.target
    if target != "size":
        _say_unused_key(compression, "size_of", f"the target is {target}", progress)
    if target in ("max_layer_error", "threshold"):
        default = default_allocation(compression.method)
        why = f"{target} decides layer by layer"
        _say_unused_key(compression, "allocation", why, progress, default=default)


def _reads_loss(solver: Solver) -> bool:
    return "fisher" in solver.needs


def _say_unused_key(
    compression: Compression, key: str, why: str, progress: Progress, *, default: object = None
) -> None:
    """Says that a key is not used, where its value is not the default.

    Args:
        default: the default where it follows from other keys; None: the section has the default.
    """
    value = getattr(compression, key)
    if value != (getattr(Compression, key) if default is None else default):
        progress.note(f"compression.{key}: {value} is not used: {why}")
