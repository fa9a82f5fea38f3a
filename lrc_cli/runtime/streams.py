"""What people and programs read goes through here: no full disk, closed stream or name disturbs it.

Standard output carries results, standard error everything else. A result that cannot be written is
an error. Whatever else cannot be written is lost, and the work goes on.
"""

import errno
import io
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from lrc_cli.errors import RunError
from lrc_cli.text import cut, visible

LONGEST = 2000
"""The characters of a line for people; the middle of a longer line is left out."""


class NotDelivered(RunError):
    """Standard output could not be written.

    Args:
        error: the system's error; None: standard output is closed.
    """

    def __init__(self, error: OSError | ValueError | None) -> None:
        self.is_quiet = isinstance(error, OSError) and error.errno == errno.EPIPE
        """Whether the reader has gone, who wants no more."""
        why = getattr(error, "strerror", None) or "it is closed"
        super().__init__(
            f"standard output cannot be written: {why}", "give a file or a pipe that takes it"
        )


class Lenient(io.TextIOBase):
    """A stream of text that never fails: what cannot be written is dropped, and the error noted.

    Args:
        stream: the stream to write to; None: it is closed, as `sys.stderr` then is.
        is_raw: whether control characters are written as they are, for the bar on a terminal.
    """

    def __init__(self, stream: Any, *, is_raw: bool = False) -> None:
        super().__init__()
        self.stream, self.is_raw = stream, is_raw
        self.is_lost = stream is None
        """Whether something was dropped."""
        self.error: OSError | ValueError | None = None
        """Why the first text was dropped; None also where the stream was closed from the start."""

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The encoding of the stream; what it cannot hold is written escaped."""
        return getattr(self.stream, "encoding", None) or "utf-8"

    def __getattr__(self, name: str) -> Any:
        """Returns what else the stream has, such as its `buffer`."""
        return getattr(self.__dict__["stream"], name)

    def isatty(self) -> bool:
        """Returns whether people watch."""
        try:
            return self.stream is not None and bool(self.stream.isatty())
        except (OSError, ValueError):
            return False

    def writable(self) -> bool:
        """Returns True."""
        return True

    def fileno(self) -> int:
        """Returns the descriptor of the stream.

        Raises:
            OSError: there is none.
        """
        if self.stream is None:
            raise io.UnsupportedOperation("fileno")
        return int(self.stream.fileno())

    def write(self, text: str) -> int:
        """Writes a text; control characters other than tabs and ends of lines are escaped."""
        shown = text if self.is_raw else visible(text, keep="\t\r\n")
        shown = shown.encode(self.encoding, "backslashreplace").decode(self.encoding)
        self._try("write", shown)
        return len(text)

    def flush(self) -> None:
        """Hands on what was written."""
        self._try("flush")

    def _try(self, name: str, *arguments: str) -> None:
        if self.stream is None:
            return
        try:
            getattr(self.stream, name)(*arguments)
        except (OSError, ValueError) as error:
            self._lose(error)
        except RuntimeError as error:  # a signal came while the stream was written to
            if "reentrant" not in str(error):
                raise

    def _lose(self, error: OSError | ValueError) -> None:
        self.error = self.error or error
        self.is_lost = True


def lenient(stream: TextIO | None, *, is_raw: bool = False) -> Lenient:
    """Returns a stream that never fails."""
    inner = stream.stream if isinstance(stream, Lenient) else stream
    return Lenient(inner, is_raw=is_raw)


@contextmanager
def lenient_streams() -> Iterator[None]:
    """A context in which nothing that writes to standard output or error fails by writing."""
    before = sys.stdout, sys.stderr
    if all(isinstance(stream, Lenient) for stream in before):
        yield
        return
    sys.stdout, sys.stderr = Lenient(before[0]), Lenient(before[1])
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def tell(line: str) -> None:
    """Shows people a line on standard error, cut where it is long."""
    stream = lenient(sys.stderr)
    stream.write(cut(visible(line), LONGEST) + "\n")
    stream.flush()


def deliver(text: str) -> None:
    """Writes a result on standard output, which may have several lines.

    Raises:
        NotDelivered: standard output is closed or full, or its reader has gone.
    """
    with lenient_streams():
        sys.stdout.write(visible(text, keep="\n") + "\n")
        check_delivered()


def check_delivered() -> None:
    """Checks that all that was written on standard output within `lenient_streams` has arrived.

    Raises:
        NotDelivered: something was lost.
    """
    stream = sys.stdout
    assert isinstance(stream, Lenient)
    stream.flush()
    if stream.is_lost:
        raise NotDelivered(stream.error)


def deliver_json(value: Any) -> None:
    """Writes a result on standard output as JSON; control characters are escaped as JSON does.

    Raises:
        NotDelivered: see `deliver`.
    """
    # JSON leaves one control character as it is.
    deliver(json.dumps(value, indent=2).replace("\x7f", "\\u007f"))


def occupy_descriptors() -> None:
    """Opens /dev/null for each closed descriptor of 0, 1 and 2.

    Else the first file that is opened gets the descriptor, and messages would be written into it.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)


def settle_streams() -> None:
    """Lets the interpreter end without a complaint of its own about a stream that failed."""
    for stream in (sys.stdout, sys.stderr):
        if stream is None:
            continue
        try:
            stream.flush()
        except (OSError, ValueError):
            _drop(stream)


def _drop(stream: TextIO) -> None:
    """Lets what waits in a stream's buffer go nowhere."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)
    stream.flush()
