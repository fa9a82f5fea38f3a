"""The commands. Nothing heavy is imported before a command needs it: `lrc --help` is instant."""

import errno
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from lrc_cli import __version__
from lrc_cli.errors import LrcError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

config_argument = click.argument("config", type=click.Path(path_type=Path))
directory_argument = click.argument("directory", type=click.Path(path_type=Path))
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on standard output.")
quiet_option = click.option("-q", "--quiet", is_flag=True, help="Print results and errors only.")
factory_option = click.option(
    "--factory",
    metavar="PACKAGE.MODULE:FUNCTION",
    help="Builds the module of a checkpoint that is not transformers'.",
)
trust_option = click.option(
    "--trust-remote-code", is_flag=True, help="Let code that comes with the checkpoint run."
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="lrc")
def lrc() -> None:
    """Make a checkpoint smaller by low-rank factors fitted to real activations.

    Exit codes: 0 done; 1 failed while running; 2 bad usage, config or input; 3 a gate is missed, or
    a statement does not hold; 4 --strict and a layer fell back; 130 interrupted; 143 terminated.
    """


@lrc.command()
@config_argument
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a key, e.g. compression.size=0.6.",
)
@click.option("--output", metavar="DIR", help="Short for --set output.path=DIR.")
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
@json_option
@quiet_option
def compress(
    config: Path,
    overrides: tuple[str, ...],
    output: str | None,
    force: bool,
    restart: bool,
    strict: bool,
    junit: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Compress the checkpoint that CONFIG names; prints the output directory.

    Interrupted or killed, the same command goes on where it stopped.
    """
    from lrc_cli.processes import joined

    if output is not None:
        overrides = (*overrides, f"output.path={json.dumps(output)}")
    with joined() as processes:
        from lrc_cli.config import load_config

        loaded = load_config(config, overrides)
        calm_transformers()
        from lrc_cli.gates import check_gates_possible, fail_if_fallen, fail_if_missed
        from lrc_cli.progress import Progress, stop_on_signals
        from lrc_cli.report.junit import check_junit_path, write_junit
        from lrc_cli.run import compress as run

        check_gates_possible(loaded)
        if junit is not None:
            check_junit_path(junit, Path(loaded.output.path))
        report = None
        if not force and not restart:
            report = processes.from_first(lambda: earlier_report(loaded))
        if report is None:
            with stop_on_signals(quiet=not processes.is_first) as stop:
                progress = Progress(stop=stop, quiet=quiet or not processes.is_first)
                report = run(
                    loaded, force=force, restart=restart, progress=progress, processes=processes
                )
        if processes.is_first:
            click.echo(json.dumps(report, indent=2) if as_json else str(Path(loaded.output.path)))
            if not quiet and not as_json:
                click.echo(summary(report), err=True)
            if junit is not None:
                write_junit(junit, report, strict=strict)
        fail_if_missed(report)
        if strict:
            fail_if_fallen(report)


def earlier_report(config: Any) -> dict[str, Any] | None:
    """The report of the output where it is already what the config asks for; else None."""
    from lrc_cli.fingerprints import already_done
    from lrc_cli.gates import check_gates
    from lrc_cli.output import read_report

    directory = Path(config.output.path)
    if not already_done(config):
        return None
    click.echo(f"{directory}: already what the config asks for", err=True)
    report = read_report(directory)
    report["gates"] = check_gates(config.gates, report)
    return report


@lrc.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@factory_option
@trust_option
@json_option
def inspect(checkpoint: Path, factory: str | None, trust_remote_code: bool, as_json: bool) -> None:
    """Show what of CHECKPOINT would be compressed, and what not and why."""
    calm_transformers()
    from lrc_cli.inspection import inspect_checkpoint, render_inspection

    found = inspect_checkpoint(checkpoint, factory=factory, trust_remote_code=trust_remote_code)
    click.echo(json.dumps(found, indent=2) if as_json else render_inspection(found))


@lrc.command("eval")
@directory_argument
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    help="The original checkpoint; default: the one that the output's lrc.yaml names.",
)
@click.option(
    "--data", multiple=True, type=click.Path(path_type=Path), help="Text or tensors to score on."
)
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
    from lrc_cli.progress import Progress, stop_on_signals
    from lrc_cli.scoring import render_scores, score_directory

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
    from lrc_cli.progress import Progress, stop_on_signals
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


def summary(report: dict[str, Any]) -> str:
    """What a run came to, in a few lines."""
    size = report["size"]
    lines = [
        f"kept {size['kept_compressible']:.1%} of the compressible weights,"
        f" {size['kept_checkpoint']:.1%} of the checkpoint's bytes"
    ]
    for row in report["quality"]:
        if "perplexity_after" in row:
            before, after = row["perplexity_before"], row["perplexity_after"]
            lines.append(f"{row['text']}: perplexity {before:.2f} -> {after:.2f}")
        else:
            lines.append(f"{row['text']}: relative output error {row['relative_output_error']:.3f}")
    if report["certificate"]["statements"]:
        from lrc_cli.report.sentences import main_statements

        lines += ["certificate:", *(f"- {x}" for x in main_statements(report["certificate"]))]
    return "\n".join(lines)


def calm_transformers() -> None:
    """Silence transformers' progress bars and advice: our own output says what matters."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def main() -> None:
    """Run `lrc`, mapping errors to exit codes: never a traceback for a user's mistake."""
    sys.exit(run_command(lrc))


def run_command(command: Callable[..., Any]) -> int:
    """Run a click command and return its exit code."""
    try:
        command(standalone_mode=False)
    except click.exceptions.Exit as error:
        return int(error.exit_code)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted; the same command goes on where it stopped", err=True)
        return 130
    except LrcError as error:
        click.echo(f"error: {error}", err=True)
        return error.exit_code
    except OSError as error:
        # A full disk, a vanished file: the cause is the system's, the sentence ours.
        click.echo(f"error: {_describe(error)}", err=True)
        return 1
    return 0


def _describe(error: OSError) -> str:
    name = f"{error.filename}: " if error.filename else ""
    remedy = (
        "make room on the disk; the same command goes on where it stopped"
        if error.errno in FULL
        else "check that it is there and may be used, and run the command again"
    )
    return f"{name}{error.strerror or error}; {remedy}"
