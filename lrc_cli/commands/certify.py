"""`lrc certify` compares somebody's copy of a checkpoint with its original."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lrc_cli.commands.exits import Command
from lrc_cli.commands.options import (
    PATH,
    examples,
    json_option,
    quiet_option,
    trust_option,
    verbose_option,
)
from lrc_cli.commands.setup import bound_caches, calm_transformers
from lrc_cli.config.constraints import part_of
from lrc_cli.errors import InputError
from lrc_cli.runtime.streams import deliver, deliver_json, tell
from lrc_cli.text import visible

if TYPE_CHECKING:
    from lrc_cli.certify.record import CopyRecord

CONFIG_SUFFIXES = (".yaml", ".yml")


@click.command(
    cls=Command,
    epilog=examples(
        "lrc certify out/llama --against models/llama --data text.txt --sequence-length 32",
        "lrc certify out/llama --against models/llama --data text.txt --sequence-length 32"
        " --set gates.max_kl_mean=9 --force",
        "lrc certify certify.yaml",
    ),
)
@click.argument("other", type=PATH)
@click.option("--against", type=PATH, help="The original, a dense checkpoint.")
@click.option("--data", type=PATH, help="The data that statements are about.")
@click.option("--part", metavar="A:B", help="Share of the data, e.g. 0.7:1.")
@click.option("--num-sequences", type=click.IntRange(min=1), help="Sequences to draw [128].")
@click.option(
    "--sequence-length", type=click.IntRange(min=2), help="Tokens of a sequence of texts [512]."
)
@click.option("--output", type=PATH, metavar="DIR", help="Directory to write [certificate].")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Set any key of the config, e.g. gates.max_flags=0; comes last.",
)
@click.option(
    "--factory",
    metavar="PACKAGE.MODULE:FUNCTION",
    help="Builds the module of both checkpoints where they are not transformers'.",
)
@trust_option
@click.option("--force", is_flag=True, help="Replace an existing certificate.")
@click.option(
    "--junit", type=PATH, metavar="FILE", help="Write gates and statements to FILE as JUnit XML."
)
@json_option
@quiet_option
@verbose_option
def certify(
    other: Path,
    overrides: tuple[str, ...],
    force: bool,
    junit: Path | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Measure the copy OTHER beside its original, and write a certificate of the difference.

    OTHER is a checkpoint, or a config (.yaml) that names both checkpoints and the data. Exit code 3
    if a gate is missed; the certificate is there all the same.
    """
    from lrc_cli.config import load_certify

    bound_caches()
    is_config = other.suffix in CONFIG_SUFFIXES
    given = _given(None if is_config else other, options)
    config = load_certify(other if is_config else None, given, overrides)
    calm_transformers()
    # These imports load torch, so the config is read first.
    from lrc_cli.certify.gates import fail_if_missed
    from lrc_cli.certify.junit import write_copy_junit
    from lrc_cli.certify.run import certify as run
    from lrc_cli.runtime.progress import Progress
    from lrc_cli.runtime.signals import stop_on_signals

    with stop_on_signals() as stop:
        progress = Progress(stop=stop, quiet=quiet, verbose=verbose)
        record = run(
            config,
            config_file=other if is_config else None,
            junit=junit,
            force=force,
            progress=progress,
        )
    if junit is not None:
        write_copy_junit(junit, record)
    if as_json:
        deliver_json(record.to_json())
    else:
        deliver(visible(config.output.path))
    if not as_json and not quiet:
        for line in lines_of(record):
            tell(line)
    fail_if_missed(record)


def _given(other: Path | None, options: dict[str, Any]) -> dict[str, tuple[str, Any]]:
    """Returns the config's keys that options give, each with the option's name and the value."""
    if other is not None and (options["against"] is None or options["data"] is None):
        raise InputError(
            "lrc certify needs the original and the data that statements are about",
            "give --against and --data, or a config",
        )
    part = options["part"]
    found: dict[str, tuple[str, Any]] = {
        "other.path": ("OTHER", other),
        "original.path": ("--against", options["against"]),
        "data.path": ("--data", options["data"]),
        "data.part": ("--part", None if part is None else part_of(part)),
        "data.num_sequences": ("--num-sequences", options["num_sequences"]),
        "data.sequence_length": ("--sequence-length", options["sequence_length"]),
        "output.path": ("--output", options["output"]),
        "original.factory": ("--factory", options["factory"]),
        "other.factory": ("--factory", options["factory"]),
        "original.trust_remote_code": ("--trust-remote-code", options["trust_remote_code"] or None),
        "other.trust_remote_code": ("--trust-remote-code", options["trust_remote_code"] or None),
    }
    return {
        key: (option, str(value) if isinstance(value, Path) else value)
        for key, (option, value) in found.items()
        if value is not None
    }


def lines_of(record: "CopyRecord") -> list[str]:
    """Returns what a certificate came to, in a few lines."""
    from lrc_cli.certify.sentences import NO_PROOF, statements, summary

    lines = [summary(record), *(f"- {line}" for line in statements(record))]
    flags = record.weights.flags
    lines += [f"flag: {x.kind}: {x.tensor}: {x.text}" for x in flags[:20]]
    lines += [f"and {len(flags) - 20} more flags, in the certificate"] if len(flags) > 20 else []
    return [*lines, NO_PROOF] if flags else lines
