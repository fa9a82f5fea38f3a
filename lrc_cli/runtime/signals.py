"""A first signal ends a run between two units of work; a second signal ends it at once."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from lrc_cli.errors import Interrupted
from lrc_cli.runtime.streams import tell

__all__ = ["Interrupted", "Stop", "ending_on_signals", "ignore_signals", "stop_on_signals"]

Handler = Callable[[int, FrameType | None], None]


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
            tell("stopping after the current step; once more to stop now")

    def check(self) -> None:
        """Raise Interrupted if a stop was asked for."""
        if self.number is not None:
            raise Interrupted(self.number)


def _signals() -> list[signal.Signals]:
    """The signals that ask for an end. SIGHUP stays ignored under `nohup`."""
    asked = [signal.SIGINT, signal.SIGTERM]
    hangs_up = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
    return [*asked, signal.SIGHUP] if hangs_up else asked


@contextmanager
def _handled(handler: Handler) -> Iterator[None]:
    """A context in which a function handles the signals. Only the main thread can handle any."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in _signals()}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


@contextmanager
def stop_on_signals(*, quiet: bool = False) -> Iterator[Stop]:
    """A context in which SIGINT, SIGTERM and SIGHUP ask for a stop instead of killing the process.

    Args:
        quiet: see `Stop`.
    """
    stop = Stop(quiet=quiet)
    with _handled(stop.request):
        yield stop


@contextmanager
def ending_on_signals() -> Iterator[None]:
    """A context in which the first signal raises Interrupted, wherever the program is."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    with _handled(end):
        yield


def ignore_signals() -> None:
    """From here on no signal disturbs the process: all that is left is to say how it ended."""
    if threading.current_thread() is threading.main_thread():
        for number in _signals():
            signal.signal(number, signal.SIG_IGN)
