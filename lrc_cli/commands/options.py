"""Several commands share the arguments, options and form of examples that stand here."""

from pathlib import Path
from typing import Any

import click

from lrc_cli.runtime.places import check_name


class PathType(click.Path):
    """A path that the system can be asked for: its names are not too long, without null characters.

    Whether something lies there is looked at by the command.
    """

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Returns the path of an argument.

        Raises:
            InputError: no file can have this path.
        """
        check_name(_shown(param), value)
        return super().convert(value, param, ctx)


def _shown(param: click.Parameter | None) -> str:
    """Returns what a user calls a parameter: --junit, or CONFIG."""
    if isinstance(param, click.Option):
        return max(param.opts, key=len)
    return (param.name or "PATH").upper() if param is not None else "PATH"


PATH = PathType()
config_argument = click.argument("config", type=PATH)
directory_argument = click.argument("directory", type=PATH)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on standard output.")
quiet_option = click.option("-q", "--quiet", is_flag=True, help="Print results and errors only.")
verbose_option = click.option("-v", "--verbose", is_flag=True, help="A line for every step.")
factory_option = click.option(
    "--factory",
    metavar="PACKAGE.MODULE:FUNCTION",
    help="Builds the module of a checkpoint that is not transformers'.",
)
trust_option = click.option(
    "--trust-remote-code", is_flag=True, help="Let code that comes with the checkpoint run."
)
state_dict_option = click.option(
    "--state-dict",
    metavar="KEYS",
    help="Keys that lead to the state dict in a file with several, e.g. state_dict.ema;"
    " default: the only one, or what the output's lrc.yaml says.",
)
overrides_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a key, e.g. compression.size=0.6.",
)
output_option = click.option("--output", metavar="DIR", help="Short for --set output.path=DIR.")


def examples(*lines: str) -> str:
    """Returns the end of a command's help: lines to copy, which click leaves as they are."""
    return "\n".join(["\b", "Examples:", *(f"  {line}" for line in lines)])


def _parse_sizes(_: Any, __: Any, text: str | None) -> tuple[float, ...]:
    """Returns shares from "0.9,0.8"."""
    if text is None:
        return ()
    try:
        sizes = tuple(float(piece) for piece in text.split(","))
    except ValueError as error:
        message = f"{text!r} is not a list of shares; write them as in 0.9,0.8"
        raise click.BadParameter(message) from error
    if len(set(sizes)) < len(sizes):
        raise click.BadParameter(f"{text!r} names a size twice; leave one out")
    return sizes


sizes_option = click.option(
    "--sizes",
    metavar="SIZE,SIZE,...",
    callback=_parse_sizes,
    help="Several values of compression.size from one pass of statistics; the outputs are called"
    " DIR-SIZE.",
)
