"""The commands. Nothing heavy is imported before a command needs it: `lrc --help` is instant."""

import sys

import click

from lrc_cli import __version__
from lrc_cli.commands.certify import certify
from lrc_cli.commands.compress import compress
from lrc_cli.commands.evaluate import evaluate
from lrc_cli.commands.exits import Group, run_command
from lrc_cli.commands.inspect import inspect
from lrc_cli.commands.options import examples
from lrc_cli.commands.plan import plan
from lrc_cli.commands.schema import schema
from lrc_cli.commands.verify import verify
from lrc_cli.runtime.join import joined
from lrc_cli.runtime.processes import check_alone
from lrc_cli.runtime.signals import ignore_signals
from lrc_cli.runtime.streams import occupy_descriptors, settle_streams

__all__ = ["lrc", "main", "run_command"]


@click.group(
    cls=Group,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=examples("lrc plan lrc.yaml", "lrc compress lrc.yaml", "lrc verify out/llama"),
)
@click.version_option(__version__, prog_name="lrc")
@click.pass_context
def lrc(context: click.Context) -> None:
    """Make a checkpoint smaller by low-rank factors fitted to real activations.

    Exit codes: 0 done; 1 failed while running; 2 bad usage, config or input; 3 a gate is missed, or
    a statement does not hold; 4 --strict and a layer fell back; 130 interrupted; 143 terminated.
    """
    # Several processes may share the work of `compress`, which joins them itself.
    if context.invoked_subcommand not in (None, "compress"):
        with joined() as processes:
            check_alone(str(context.invoked_subcommand), processes)


for command in (compress, plan, inspect, evaluate, certify, verify, schema):
    lrc.add_command(command)


def main() -> None:
    """Run `lrc`, mapping errors to exit codes: never a traceback."""
    occupy_descriptors()
    code = run_command(lrc)
    ignore_signals()
    settle_streams()
    sys.exit(code)
