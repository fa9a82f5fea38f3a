"""`lrc compress` runs the job of a config, or a job for each of several sizes."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lrc_cli.commands.exits import Command
from lrc_cli.commands.options import (
    PATH,
    config_argument,
    examples,
    json_option,
    output_option,
    overrides_option,
    quiet_option,
    sizes_option,
    verbose_option,
)
from lrc_cli.commands.plan import show_forecast
from lrc_cli.commands.setup import bound_caches, calm_transformers
from lrc_cli.errors import StrictFallback
from lrc_cli.runtime.streams import NotDelivered, deliver, deliver_json, tell
from lrc_cli.text import visible

if TYPE_CHECKING:
    from lrc_cli.config import Config
    from lrc_cli.report.record import Record


@click.command(
    cls=Command,
    epilog=examples(
        "lrc compress lrc.yaml",
        "lrc compress lrc.yaml --set compression.size=0.6 --output out/smaller",
        "lrc compress lrc.yaml --sizes 0.9,0.8",
    ),
)
@config_argument
@overrides_option
@output_option
@sizes_option
@click.option("--force", is_flag=True, help="Replace an existing output.")
@click.option(
    "--restart", is_flag=True, help="Drop the work directory's finished units of this run first."
)
@click.option("--strict", is_flag=True, help="Exit with 4 if a layer fell back.")
@click.option(
    "--junit",
    type=PATH,
    metavar="FILE",
    help="Write gates, target and certificate to FILE as JUnit XML.",
)
@click.option("--dry-run", is_flag=True, help="Only check and estimate, as `lrc plan` begins.")
@json_option
@quiet_option
@verbose_option
def compress(
    config: Path,
    overrides: tuple[str, ...],
    output: str | None,
    sizes: tuple[float, ...],
    dry_run: bool,
    junit: Path | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    strict: bool,
    **options: Any,
) -> None:
    """Compress the checkpoint that CONFIG names, and print the output directory.

    After an interruption the same command goes on where it stopped. Several processes share the
    work: torchrun --nproc_per_node N -m lrc_cli compress CONFIG.
    """
    from lrc_cli.config.sizes import load_configs
    from lrc_cli.runtime.join import joined
    from lrc_cli.runtime.processes import check_alone

    bound_caches()
    with joined() as processes:
        written_at = _time_of_change(config)
        configs = load_configs(config, overrides, output=output, sizes=sizes)
        calm_transformers()
        # These imports load torch, so the config is read and the caches are bounded first.
        from lrc_cli.job.jobs import run_jobs
        from lrc_cli.runtime.progress import Progress
        from lrc_cli.runtime.signals import stop_on_signals

        processes.from_first(lambda: check_jobs(configs, config, junit))
        if dry_run:
            check_alone("compress --dry-run", processes)
            show_forecast(configs, collect=False, as_json=as_json, quiet=quiet, verbose=verbose)
            return
        records = []
        speaks = processes.is_first
        with stop_on_signals(quiet=not speaks) as stop:
            progress = Progress(stop=stop, quiet=quiet or not speaks, verbose=verbose)
            for job, record in run_jobs(configs, progress=progress, processes=processes, **options):
                records.append(record)
                if speaks and not as_json:
                    show_output(job.output.path)
                if speaks and not as_json and not quiet:
                    for line in summary(record):
                        tell(line)
            if _time_of_change(config) != written_at:
                progress.note(f"{config}: changed meanwhile; this run used what it said at first")
        # The outputs are there: what they come to is said even where standard output is lost.
        with ExitStack() as at_last:
            at_last.callback(conclude, records, junit if speaks else None, strict=strict)
            if speaks and as_json:
                reports = [record.to_json() for record in records]
                deliver_json(reports if sizes else reports[0])


def show_output(path: str) -> None:
    """Prints the path of an output, which is not lost with standard output."""
    try:
        deliver(visible(path))
    except NotDelivered as error:
        if not error.is_quiet:
            tell(f"{error.message}; the output is {path}")


def _time_of_change(config: Path) -> int | None:
    """Returns when the config was written last, in nanoseconds; None: it is no file any more."""
    return config.stat().st_mtime_ns if config.is_file() else None


def check_jobs(configs: "Sequence[Config]", config_file: Path, junit: Path | None) -> None:
    """Raises InputError for gates that nothing measures, and for places that lrc may not write."""
    from lrc_cli.job.places import check_places
    from lrc_cli.report.gates import check_gates_possible

    check_gates_possible(configs[0])
    check_places(configs, config_file=config_file, junit=junit)


def conclude(records: "Sequence[Record]", junit: Path | None, *, strict: bool) -> None:
    """Writes the JUnit file, then fails for what the records say.

    Raises:
        GateMissed: a gate is missed in any of the jobs.
        StrictFallback: with `strict`, a layer fell back in any of the jobs.
    """
    from lrc_cli.report.facts import not_as_asked
    from lrc_cli.report.gates import fail_if_missed
    from lrc_cli.report.junit import write_junit

    if junit is not None:
        write_junit(junit, records, strict=strict)
    fail_if_missed(*records)
    fallen = [layer.name for record in records for layer in not_as_asked(record)]
    if strict and fallen:
        raise StrictFallback(
            f"{len(fallen)} layers fell back, the first is {fallen[0]}", "see report.json"
        )


def summary(record: "Record") -> list[str]:
    """Returns what a run came to, in a few lines."""
    from lrc_cli.quality.sentences import main_statements

    size = record.size
    lines = [
        f"kept {size.kept_compressible:.1%} of the compressible weights,"
        f" {size.kept_checkpoint:.1%} of the checkpoint's bytes"
    ]
    for row in record.quality:
        scores = row.scores
        if scores.perplexity_after is not None:
            change = f"{scores.perplexity_before:.2f} -> {scores.perplexity_after:.2f}"
            lines.append(f"{row.text}: perplexity {change}")
        else:
            lines.append(f"{row.text}: relative output error {scores.relative_output_error:.3f}")
    if record.certificate.statements:
        lines += ["certificate:", *(f"- {x}" for x in main_statements(record.certificate))]
    return lines
