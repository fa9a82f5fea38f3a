"""A command ends with an exit code for every outcome and a sentence for every mistake."""

import errno
import io
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain, repeat
from typing import Any

import click

from lrc_cli.errors import Interrupted, LrcError, Problems, is_out_of_memory
from lrc_cli.runtime.join import EndedElsewhere
from lrc_cli.runtime.signals import ending_on_signals, ignore_signals
from lrc_cli.runtime.strangers import is_interrupt
from lrc_cli.runtime.streams import NotDelivered, check_delivered, lenient_streams, tell
from lrc_cli.runtime.traces import is_trace_asked, raised_at, trace, where_to_look
from lrc_cli.text import named, told

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LESS_MEMORY = (
    "ask `lrc plan` what it takes, and give shorter sequences, exclude the widest layers, or use a"
    " device with more memory"
)


CLICKS = (
    click.exceptions.Exit,
    click.Abort,
    click.ClickException,
    EOFError,
    KeyboardInterrupt,
    OSError,
)
"""The errors that click answers."""


class Failed(Exception):
    """A command raised an error that click would answer, with another exit code or none.

    Args:
        error: what was raised.
    """

    def __init__(self, error: BaseException) -> None:
        self.error = error
        super().__init__()


class Command(click.Command):
    """A command whose errors are answered by `run_command`, and never by click."""

    def invoke(self, context: click.Context) -> Any:
        """Runs the command.

        Raises:
            Failed: the command raised an error that click would answer.
        """
        try:
            return super().invoke(context)
        except CLICKS as error:
            raise Failed(error) from error


class Group(click.Group):
    """A group of commands that are answered by `run_command`, also when a signal comes early."""

    def invoke(self, context: click.Context) -> Any:
        """Runs the command that the arguments name.

        Raises:
            Failed: a signal came.
        """
        try:
            return super().invoke(context)
        except Interrupted as error:
            raise Failed(error) from error


@contextmanager
def _calm_warnings() -> Iterator[None]:
    """A context in which warnings of libraries are shown only where the user asks for traces."""
    with warnings.catch_warnings():
        if not is_trace_asked() and not sys.warnoptions:
            warnings.simplefilter("ignore")
        yield


def run_command(command: Callable[..., Any]) -> int:
    """Runs a click command and returns its exit code."""
    with lenient_streams(), ending_on_signals(), _calm_warnings():
        try:
            code = command(standalone_mode=False)
            if isinstance(code, int):  # click has printed its help or its version
                check_delivered()
        except BaseException as error:
            ignore_signals()
            return _answer(error.error if isinstance(error, Failed) else error)
        return code if isinstance(code, int) else 0


def _answer(error: BaseException) -> int:
    """Says in one sentence what ended a command, and returns the exit code."""
    if isinstance(error, click.Abort) and error.__cause__ is not None:
        error = error.__cause__
    if is_trace_asked():
        for line in trace(error):
            tell(line)
    if isinstance(error, click.ClickException):
        return _show_usage(error)
    if is_interrupt(error):
        tell("interrupted; the same command goes on where it stopped")
        return int(getattr(error, "exit_code", 130))
    if isinstance(error, EndedElsewhere):
        return error.exit_code
    if isinstance(error, LrcError):
        if not (isinstance(error, NotDelivered) and error.is_quiet):
            lines = error.lines if isinstance(error, Problems) else [_tell_all(error)]
            for start, line in zip(chain(["error: "], repeat("")), lines, strict=False):
                tell(f"{start}{line}")
        return error.exit_code
    if isinstance(error, FileNotFoundError) and _has_no_directory():
        tell("error: the working directory is gone; change to another one, or give whole paths")
        return 2
    tell(f"error: {_describe(error)}")
    return 1


def _has_no_directory() -> bool:
    """Whether the working directory was deleted, so that no relative path can be looked up."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False


def _tell_all(error: LrcError) -> str:
    """Returns an error's sentence, and where its trace is if the trace helps."""
    return f"{told(error)}; {where_to_look(error)}" if error.has_trace else told(error)


def _show_usage(error: click.ClickException) -> int:
    shown = io.StringIO()
    error.show(shown)
    for line in shown.getvalue().splitlines():
        tell(line)
    return error.exit_code


def _describe(error: BaseException) -> str:
    """Returns a sentence for an error that nobody has foreseen."""
    if is_out_of_memory(error):
        return f"out of memory ({_first_line(error)}); {LESS_MEMORY}"
    if isinstance(error, OSError):
        # The disk is full or a file has vanished: the cause is the system's, the sentence ours.
        return _describe_system(error)
    place = raised_at(error)
    at = f" (raised in {place})" if place else ""
    return f"{named(error)}{at}; {where_to_look(error)}"


def _first_line(error: BaseException) -> str:
    return (told(error).splitlines() or ["no more can be had"])[0]


def _describe_system(error: OSError) -> str:
    name = f"{error.filename}: " if error.filename else ""
    remedy = (
        "make room on the disk; the same command goes on where it stopped"
        if error.errno in FULL
        else "check that it is there and may be used, and run the command again"
    )
    return f"{name}{error.strerror or told(error)}; {remedy}"
