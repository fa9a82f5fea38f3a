"""Progress goes to standard error: a bar with a cost-weighted ETA on a terminal, else lines."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from lrc_cli.runtime.places import open_to_append
from lrc_cli.runtime.signals import Stop

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
        self.stop, self.quiet, self.stream = stop or Stop(), quiet, stream or sys.stderr
        self.line_seconds = 0.0 if verbose else LINE_SECONDS
        self.has_bar = not quiet and not verbose and self.stream.isatty()
        self._log: TextIO | None = None
        self._unlogged: list[str] = []

    def note(self, text: str) -> None:
        """Show one line to the user, unless quiet was asked for."""
        self._record(text)
        if not self.quiet:
            tqdm.write(text, file=self.stream)

    def say(self, text: str) -> None:
        """Show one line to the user, also if quiet was asked for."""
        self._record(text)
        tqdm.write(text, file=self.stream)

    def _record(self, text: str) -> None:
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n"
        if self._log is None:
            self._unlogged.append(line)
        else:
            self._log.write(line)

    @contextmanager
    def logged(self, file: Path) -> Iterator[None]:
        """A context in which every line is appended to a file too; earlier lines come first.

        Raises:
            InputError: a link, a pipe, a device or a directory has the name of the file.
        """
        descriptor = open_to_append("log", file)
        with os.fdopen(descriptor, "a", encoding="utf-8", buffering=1) as self._log:
            self._log.writelines(self._unlogged)
            self._unlogged.clear()
            try:
                yield
            except BaseException as error:
                self._record(f"{type(error).__name__}: {error}")
                raise
            finally:
                self._log = None

    @contextmanager
    def phase(self, name: str, cost: float) -> Iterator["Phase"]:
        """A phase of known total cost, in any unit that is proportional to its time."""
        self.stop.check()
        phase = Phase(self, name, cost)
        try:
            yield phase
        finally:
            phase.close()


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
