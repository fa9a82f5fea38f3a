"""The commands. Nothing heavy is imported before a command needs it: `lrc --help` is instant."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import click

from lrc_cli import __version__
from lrc_cli.commands.exits import run_command
from lrc_cli.commands.options import (
    config_argument,
    directory_argument,
    factory_option,
    json_option,
    output_option,
    overrides_option,
    quiet_option,
    sizes_option,
    trust_option,
    verbose_option,
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="lrc")
@click.pass_context
def lrc(context: click.Context) -> None:
    """Make a checkpoint smaller by low-rank factors fitted to real activations.

    Exit codes: 0 done; 1 failed while running; 2 bad usage, config or input; 3 a gate is missed, or
    a statement does not hold; 4 --strict and a layer fell back; 130 interrupted; 143 terminated.
    """
    command = context.invoked_subcommand
    if command is not None and command != "compress":
        from lrc_cli.runtime.join import joined
        from lrc_cli.runtime.processes import check_alone

        with joined() as processes:
            check_alone(command, processes)


@lrc.command()
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
    type=click.Path(path_type=Path),
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
    """Compress the checkpoint that CONFIG names; prints the output directory.

    Interrupted or killed, the same command goes on where it stopped. Several processes share the
    work: torchrun --nproc_per_node N -m lrc_cli compress CONFIG.
    """
    from lrc_cli.runtime.join import joined
    from lrc_cli.runtime.processes import check_alone

    bound_caches()
    with joined() as processes:
        from lrc_cli.config.sizes import load_configs

        configs = load_configs(config, overrides, output=output, sizes=sizes)
        calm_transformers()
        from lrc_cli.commands.compress import check_jobs, conclude, run_jobs, summary
        from lrc_cli.runtime.progress import Progress
        from lrc_cli.runtime.signals import stop_on_signals

        check_jobs(configs, junit)
        if dry_run:
            check_alone("compress --dry-run", processes)
            show_forecast(configs, collect=False, as_json=as_json, quiet=quiet, verbose=verbose)
            return
        reports = []
        speaks = processes.is_first
        with stop_on_signals(quiet=not speaks) as stop:
            progress = Progress(stop=stop, quiet=quiet or not speaks, verbose=verbose)
            for job, report in run_jobs(configs, progress=progress, processes=processes, **options):
                reports.append(report)
                if speaks and not as_json:
                    click.echo(job.output.path)
                if speaks and not as_json and not quiet:
                    click.echo(summary(report), err=True)
        if speaks and as_json:
            click.echo(json.dumps(reports if sizes else reports[0], indent=2))
        conclude(reports, junit if speaks else None, strict=strict)


@lrc.command()
@config_argument
@overrides_option
@output_option
@sizes_option
@json_option
@quiet_option
@verbose_option
def plan(
    config: Path,
    overrides: tuple[str, ...],
    output: str | None,
    sizes: tuple[float, ...],
    **options: Any,
) -> None:
    """Check CONFIG and estimate what compressing takes, and what sizes cost in quality.

    The estimates come from a short measured probe. The size/error curve needs spectra: those of the
    work directory, else they are collected, for `compress` to use again. Writes no checkpoint.
    """
    from lrc_cli.config.sizes import load_configs

    configs = load_configs(config, overrides, output=output, sizes=sizes)
    calm_transformers()
    show_forecast(configs, collect=True, **options)


def show_forecast(
    configs: list[Any], *, collect: bool, as_json: bool, quiet: bool, verbose: bool
) -> None:
    """Print what jobs will take."""
    from lrc_cli.forecast import forecast, render
    from lrc_cli.runtime.progress import Progress
    from lrc_cli.runtime.signals import stop_on_signals

    with stop_on_signals() as stop:
        progress = Progress(stop=stop, quiet=quiet, verbose=verbose)
        found = forecast(configs, collect=collect, progress=progress)
    click.echo(json.dumps(found, indent=2) if as_json else render(found))


@lrc.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@factory_option
@trust_option
@json_option
def inspect(checkpoint: Path, factory: str | None, trust_remote_code: bool, as_json: bool) -> None:
    """Show what of CHECKPOINT would be compressed, and what not and why."""
    calm_transformers()
    from lrc_cli.commands.inspect import inspect_checkpoint, render_inspection

    found = inspect_checkpoint(checkpoint, factory=factory, trust_remote_code=trust_remote_code)
    click.echo(json.dumps(found, indent=2) if as_json else render_inspection(found))


@lrc.command("eval")
@directory_argument
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    help="The original checkpoint; default: the one that the output's lrc.yaml names.",
)
@click.option("--data", multiple=True, type=click.Path(path_type=Path), help="Data to score on.")
@click.option(
    "--part", multiple=True, metavar="A:B", help="Share of the --data before it, e.g. 0.7:1."
)
@click.option("--num-sequences", type=click.IntRange(min=1), default=64, show_default=True)
@click.option(
    "--sequence-length",
    type=click.IntRange(min=2),
    help="Tokens of a sequence of --data; default: as in the output's calibration.",
)
@factory_option
@trust_option
@json_option
@quiet_option
def evaluate(directory: Path, as_json: bool, quiet: bool, **options: Any) -> None:
    """Score the compressed checkpoint in DIRECTORY beside its original.

    Without --data the texts of the output's own config are scored.
    """
    calm_transformers()
    from lrc_cli.commands.evaluate import render_scores, score_directory
    from lrc_cli.runtime.progress import Progress
    from lrc_cli.runtime.signals import stop_on_signals

    with stop_on_signals() as stop:
        found = score_directory(directory, progress=Progress(stop=stop, quiet=quiet), **options)
    click.echo(json.dumps(found, indent=2) if as_json else render_scores(found))


@lrc.command()
@directory_argument
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    help="The original checkpoint: measures the errors and the quality once more.",
)
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="A data file that is not where the config says; known by its hash.",
)
@click.option(
    "--manifest-sha256", metavar="HEX", help="What the hash of manifest.json must be: pins it all."
)
@factory_option
@trust_option
@json_option
@quiet_option
def verify(directory: Path, as_json: bool, quiet: bool, **options: Any) -> None:
    """Check what the files in DIRECTORY say of themselves, independently of the run.

    Exit code 3 if a statement fails. What could not be looked at is said to be not checked.
    """
    calm_transformers()
    from lrc_cli.runtime.progress import Progress
    from lrc_cli.runtime.signals import stop_on_signals
    from lrc_cli.verify import render, verify_directory
    from lrc_cli.verify.statements import StatementFailed

    with stop_on_signals() as stop:
        found = verify_directory(directory, progress=Progress(stop=stop, quiet=quiet), **options)
    click.echo(json.dumps(found.as_dict(), indent=2) if as_json else render(found.findings))
    if not as_json:
        click.echo(f"sha256 of manifest.json: {found.manifest_sha256}")
    if found.findings.failed:
        raise StatementFailed(f"{directory}: not every statement holds", "see what fails above")


@lrc.command()
def schema() -> None:
    """Print the JSON Schema of the config."""
    from lrc_cli.config import json_schema

    click.echo(json.dumps(json_schema(), indent=2))


def bound_caches() -> None:
    """Keep what oneDNN holds on to from growing with the depth; before torch is imported.

    It keeps compiled products of the last 1024 shapes, and every low-rank layer has a shape of its
    own. A block, which is what runs again and again, has far fewer. (Two caches, by the same
    limit: oneDNN's own and the one of torch's binding.)
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "32")


def calm_transformers() -> None:
    """Silence transformers' progress bars and advice: our own output says what matters."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def main() -> None:
    """Run `lrc`, mapping errors to exit codes: never a traceback for a user's mistake."""
    sys.exit(run_command(lrc))
