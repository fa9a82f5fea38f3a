"""`lrc verify` checks every statement of a written directory."""

from pathlib import Path
from typing import Any

import click

from lrc_cli.commands.exits import Command
from lrc_cli.commands.options import (
    PATH,
    directory_argument,
    examples,
    factory_option,
    json_option,
    quiet_option,
    state_dict_option,
    trust_option,
)
from lrc_cli.commands.setup import calm_transformers
from lrc_cli.runtime.streams import deliver, deliver_json


@click.command(
    cls=Command,
    epilog=examples("lrc verify out/llama", "lrc verify out/llama --against models/llama"),
)
@directory_argument
@click.option(
    "--against",
    type=PATH,
    help="The original checkpoint: measures the errors and the quality once more.",
)
@click.option("--other", type=PATH, help="The copy that a certificate of `lrc certify` is about.")
@click.option(
    "--data",
    type=PATH,
    help="A data file that is not where the config says; known by its hash.",
)
@click.option(
    "--manifest-sha256", metavar="HEX", help="What the hash of manifest.json must be: pins it all."
)
@click.option(
    "--strict",
    is_flag=True,
    help="Exit with 3 also if something that the arguments ask for could not be checked.",
)
@factory_option
@trust_option
@state_dict_option
@json_option
@quiet_option
def verify(directory: Path, strict: bool, as_json: bool, quiet: bool, **options: Any) -> None:
    """Check what the files in DIRECTORY say of themselves, independently of the run.

    Exit code 3 if a statement fails. What could not be looked at is said to be not checked. A last
    line counts what should have been looked at and could not be, such as the pages of another
    version. With --strict such a line is exit code 3 too.
    """
    calm_transformers()
    from lrc_cli.runtime.progress import Progress
    from lrc_cli.runtime.signals import stop_on_signals
    from lrc_cli.verify import render, verify_directory
    from lrc_cli.verify.statements import StatementFailed

    with stop_on_signals() as stop:
        found = verify_directory(directory, progress=Progress(stop=stop, quiet=quiet), **options)
    if as_json:
        deliver_json(found.as_dict())
    else:
        pinned = f"sha256 of manifest.json: {found.manifest_sha256}"
        deliver(f"{render(found.findings)}\n{pinned}")
    if found.findings.failed:
        raise StatementFailed(f"{directory}: not every statement holds", "see what fails above")
    if strict and found.findings.left_open:
        raise StatementFailed(
            f"{directory}: not everything could be checked", "see what is not checked above"
        )
