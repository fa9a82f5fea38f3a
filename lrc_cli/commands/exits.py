"""A command ends with an exit code for every outcome and a sentence for every mistake."""

import errno
from collections.abc import Callable
from typing import Any

import click

from lrc_cli.errors import LrcError, is_out_of_memory

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LESS_MEMORY = (
    "ask `lrc plan` what it takes, and give shorter sequences, exclude the widest layers, or use a"
    " device with more memory"
)


def run_command(command: Callable[..., Any]) -> int:
    """Runs a click command and returns its exit code."""
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
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        click.echo(f"error: out of memory ({_first_line(error)}); {LESS_MEMORY}", err=True)
        return 1
    except OSError as error:
        # The disk is full or a file has vanished: the cause is the system's, the sentence ours.
        click.echo(f"error: {_describe(error)}", err=True)
        return 1
    return 0


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or ["no more can be had"])[0]


def _describe(error: OSError) -> str:
    name = f"{error.filename}: " if error.filename else ""
    remedy = (
        "make room on the disk; the same command goes on where it stopped"
        if error.errno in FULL
        else "check that it is there and may be used, and run the command again"
    )
    return f"{name}{error.strerror or error}; {remedy}"
