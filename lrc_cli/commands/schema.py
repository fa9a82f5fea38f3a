"""`lrc schema` prints the config as JSON Schema, for editors and other programs."""

import click

from lrc_cli.commands.exits import Command
from lrc_cli.commands.options import examples
from lrc_cli.runtime.streams import deliver_json


@click.command(cls=Command, epilog=examples("lrc schema", "lrc schema --certify"))
@click.option("--certify", is_flag=True, help="The config of `lrc certify`, in place of a job's.")
def schema(certify: bool) -> None:
    """Print the JSON Schema of the config."""
    from lrc_cli.config import CertifyConfig, Config, json_schema

    deliver_json(json_schema(CertifyConfig if certify else Config))
