"""Progress goes to standard error: a bar with a cost-weighted ETA on a terminal, else lines."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from lrc_cli.errors import InputError, Interrupted
from lrc_cli.runtime.places import open_to_append
from lrc_cli.runtime.processes import LostProcess
from lrc_cli.runtime.signals import Stop
from lrc_cli.runtime.streams import LONGEST, lenient
from lrc_cli.runtime.traces import note_trace, recorded
from lrc_cli.text import cut, visible

LINE_SECONDS = 15.0
Seconds = dict[str, float]
"""Wall time by phase."""


class Progress:
    """The display and the clock of phases of work, which also looks for a stop request.

    Args:
        stop: the request that is checked at every step; None never stops.
        quiet: whether to show nothing but the lines of `say`.
        verbose: whether to show a line for every step in place of the bar.
        stream: the stream to write to; None: standard error.
    """

    def __init__(
        self,
        *,
        stop: Stop | None = None,
        quiet: bool = False,
        verbose: bool = False,
        stream: TextIO | None = None,
    ) -> None:
        self.stop, self.quiet = stop or Stop(), quiet
        self.stream = lenient(stream or sys.stderr, is_raw=True)
        self.line_seconds = 0.0 if verbose else LINE_SECONDS
        self.has_bar = not quiet and not verbose and self.stream.isatty()
        self._log: int | None = None
        self._unlogged: list[str] = []

    def note(self, text: str) -> None:
        """Show one line to the user, unless quiet was asked for."""
        self._record(text)
        if not self.quiet:
            self._show(text)

    def say(self, text: str) -> None:
        """Show one line to the user, also if quiet was asked for."""
        self._record(text)
        self._show(text)

    def _show(self, text: str) -> None:
        tqdm.write(cut(visible(text), LONGEST), file=self.stream)

    def _record(self, text: str) -> None:
        line = _stamped(text)
        if self._log is None:
            self._unlogged.append(line)
        else:
            self._write(line)

    def _write(self, lines: str) -> None:
        """Append lines to the log; where this fails, the run goes on without a log."""
        assert self._log is not None
        try:
            os.write(self._log, lines.encode("utf-8"))
        except OSError as error:
            self._log = None
            self.note(f"the log cannot be written ({error.strerror}): the run goes on without it")

    @contextmanager
    def logged(self, file: Path) -> Iterator[None]:
        """A context in which every line is appended to a file too; earlier lines come first.

        An error that ends the context is recorded with its trace. Where the file cannot be
        written, the run goes on and says so.
        """
        try:
            descriptor = open_to_append("log", file)
        except (InputError, OSError) as error:
            self.note(f"there is no log: {error}")
            yield
            return
        self._log = descriptor
        lines, self._unlogged = self._unlogged, []
        self._write("".join(lines))
        try:
            yield
        except GeneratorExit:  # the caller asks for no further job, which is no failure
            raise
        except BaseException as error:
            for line in recorded(error):
                self._record(line)
            note_trace(error, file)
            raise
        finally:
            self._log = None
            if not _is_file(descriptor, file):
                self.note(f"{file}: the log was removed or replaced while the run went on")
            os.close(descriptor)

    @contextmanager
    def phase(self, name: str, cost: float) -> Iterator["Phase"]:
        """A phase of known total cost, in any unit that is proportional to its time."""
        self.stop.check()
        phase = Phase(self, name, cost)
        try:
            yield phase
        finally:
            phase.close()


@contextmanager
def failure_logged(file: Path) -> Iterator[None]:
    """A context whose failure is appended to a file with its trace; without one there is no file.

    A signal, and the failure of another process, are no failures of this one.
    """
    try:
        yield
    except (GeneratorExit, Interrupted, LostProcess):
        raise
    except BaseException as error:
        # What went wrong is said in any case.
        with suppress(InputError, OSError):
            descriptor = open_to_append("log", file)
            try:
                os.write(descriptor, "".join(map(_stamped, recorded(error))).encode())
            finally:
                os.close(descriptor)
            note_trace(error, file)
        raise


def _stamped(text: str) -> str:
    """A line of a log."""
    return f"{time.strftime('%Y-%m-%d %H:%M:%S')} {visible(text)}\n"


def _is_file(descriptor: int, file: Path) -> bool:
    """Whether an open file still has its name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(file))
    except OSError:
        return False


class Phase:
    """A phase of work; call `advance` after every piece of work with the piece's cost."""

    def __init__(self, progress: Progress, name: str, cost: float) -> None:
        self.progress, self.name, self.cost = progress, name, cost
        self.done, self.start = 0.0, time.perf_counter()
        self.seconds = 0.0
        """Wall time, once the phase has ended."""
        self.last_line = self.start
        self.bar: tqdm | None = None
        if progress.has_bar:
            form = "{desc}: {percentage:3.0f}%|{bar}| {elapsed} (about {remaining} left)"
            self.bar = tqdm(
                total=cost, desc=name, bar_format=form, file=progress.stream, leave=False
            )
        else:
            progress.note(f"{name} ...")

    @property
    def timing(self) -> Seconds:
        """The phase's wall time, once it has ended, by its name."""
        return {self.name: self.seconds}

    def advance(self, cost: float) -> None:
        """Count a piece of this cost as done."""
        self.done += cost
        if self.bar is not None:
            self.bar.update(cost)
        else:
            self._line()
        self.progress.stop.check()

    def _line(self) -> None:
        now = time.perf_counter()
        if now - self.last_line < self.progress.line_seconds or not self.done:
            return
        self.last_line = now
        # The cost is an estimate, summed in another order: more may be done than was announced.
        share = min(self.done / self.cost, 1.0)
        left = (now - self.start) * (1 / share - 1)
        self.progress.note(f"{self.name}: {share:.0%}, about {left:.0f} s left")

    def close(self) -> None:
        """End the display; the time taken stays as a line."""
        self.seconds = time.perf_counter() - self.start
        if self.bar is not None:
            self.bar.close()
        self.progress.note(f"{self.name}: {self.seconds:.1f} s")
