"""`lrc schema` prints the config as JSON Schema, for editors and other programs."""

import json

import click

from lrc_cli.commands.options import examples


@click.command(epilog=examples("lrc schema"))
def schema() -> None:
    """Print the JSON Schema of the config."""
    from lrc_cli.config import json_schema

    click.echo(json.dumps(json_schema(), indent=2))
