"""`lrc plan` estimates what jobs will take, before they run."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lrc_cli.commands.exits import Command
from lrc_cli.commands.options import (
    config_argument,
    examples,
    json_option,
    output_option,
    overrides_option,
    quiet_option,
    sizes_option,
    verbose_option,
)
from lrc_cli.commands.setup import calm_transformers
from lrc_cli.runtime.streams import deliver, deliver_json

if TYPE_CHECKING:
    from lrc_cli.config import Config


@click.command(
    cls=Command, epilog=examples("lrc plan lrc.yaml", "lrc plan lrc.yaml --sizes 0.9,0.8")
)
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

    The estimates come from a short measured probe. The size/error curve needs spectra. The work
    directory may have them; else they are collected, and `compress` uses them again. No checkpoint
    is written.
    """
    from lrc_cli.config.sizes import load_configs

    configs = load_configs(config, overrides, output=output, sizes=sizes)
    calm_transformers()
    from lrc_cli.job.places import check_places  # torch comes with it

    check_places(configs, config_file=config)
    show_forecast(configs, collect=True, **options)


def show_forecast(
    configs: "Sequence[Config]", *, collect: bool, as_json: bool, quiet: bool, verbose: bool
) -> None:
    """Prints what jobs will take."""
    from lrc_cli.forecast import forecast, render
    from lrc_cli.runtime.progress import Progress
    from lrc_cli.runtime.signals import stop_on_signals

    with stop_on_signals() as stop:
        progress = Progress(stop=stop, quiet=quiet, verbose=verbose)
        found = forecast(configs, collect=collect, progress=progress)
    if as_json:
        deliver_json(found)
    else:
        deliver(render(found))
