"""A first signal ends a run between two units of work; a second signal ends it at once."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from lrc_cli.errors import LrcError


class Interrupted(LrcError):
    """The run was asked to stop, and stopped between two pieces of work."""

    def __init__(self, number: int) -> None:
        self.exit_code = 128 + number
        super().__init__("interrupted", "the same command goes on where it stopped")


class Stop:
    """A request to stop: the first signal waits for the current piece of work, the second does not.

    Args:
        quiet: whether a signal is left without an answer in words.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.number: int | None = None
        self.quiet = quiet

    def request(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        if self.number is not None:
            raise Interrupted(number)
        self.number = number
        if not self.quiet:
            print("stopping after the current step; once more to stop now", file=sys.stderr)

    def check(self) -> None:
        """Raise Interrupted if a stop was asked for."""
        if self.number is not None:
            raise Interrupted(self.number)


@contextmanager
def stop_on_signals(*, quiet: bool = False) -> Iterator[Stop]:
    """A context in which SIGINT and SIGTERM ask for a stop instead of killing the process.

    Args:
        quiet: see `Stop`.
    """
    stop = Stop(quiet=quiet)
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, stop.request) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
