"""`lrc schema` prints the config as JSON Schema, for editors and other programs."""

import click

from lrc_cli.commands.exits import Command
from lrc_cli.commands.options import examples
from lrc_cli.runtime.streams import deliver_json


@click.command(cls=Command, epilog=examples("lrc schema"))
def schema() -> None:
    """Print the JSON Schema of the config."""
    from lrc_cli.config import json_schema

    deliver_json(json_schema())
