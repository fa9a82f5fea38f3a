"""`lrc eval` scores a written directory beside its original."""

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
from lrc_cli.text import visible_lines


@click.command(
    "eval",
    cls=Command,
    epilog=examples("lrc eval out/llama", "lrc eval out/llama --data text.txt --part 0.9:1"),
)
@directory_argument
@click.option(
    "--against",
    type=PATH,
    help="The original checkpoint; default: the path in the output's lrc.yaml.",
)
@click.option("--data", multiple=True, type=PATH, help="Data to score on.")
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
@state_dict_option
@json_option
@quiet_option
def evaluate(directory: Path, as_json: bool, quiet: bool, **options: Any) -> None:
    """Score the compressed checkpoint in DIRECTORY beside its original.

    Without --data the texts of the output's own config are scored.
    """
    calm_transformers()
    from lrc_cli.quality.score import score_directory
    from lrc_cli.runtime.progress import Progress
    from lrc_cli.runtime.signals import stop_on_signals
    from lrc_cli.verify.files.manifest import open_manifest

    open_manifest(directory)  # raises InputError where this is no finished output
    with stop_on_signals() as stop:
        found = score_directory(directory, progress=Progress(stop=stop, quiet=quiet), **options)
    if as_json:
        deliver_json(found)
    else:
        deliver(render_scores(found))


def render_scores(found: dict[str, Any]) -> str:
    """Returns the text for people: one line per text."""
    size, seconds = found["bytes"], found["seconds_per_sequence"]
    peak = found["memory"]["host_resident"] / 1e6
    lines = [
        f"{found['directory']} against {found['against']}"
        f" ({found['activation_dtype']} activations)",
        f"bytes: {size['before']} -> {size['after']} ({size['after'] / size['before']:.1%})",
        f"one sequence: {seconds['before']:.3f} s -> {seconds['after']:.3f} s",
        f"peak memory, both networks together: {peak:.0f} MB",
    ]
    for row in found["quality"]:
        pieces = []
        if "perplexity_after" in row:
            pieces.append(
                f"perplexity {row['perplexity_before']:.3f} -> {row['perplexity_after']:.3f}"
            )
        if "relative_output_error" in row:
            pieces.append(f"relative output error {row['relative_output_error']:.4f}")
        if "kl" in row:
            pieces.append(f"KL {row['kl']:.4f}, top-1 agreement {row['top1_agreement']:.1%}")
        lines.append(f"{row['text']}: {', '.join(pieces)} ({row['num_sequences']} sequences)")
    return visible_lines(lines)
