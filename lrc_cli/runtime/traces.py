"""Where an error came from: for run.log, and for whoever asks for it with LRC_TRACE=1."""

import os
import traceback
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from lrc_cli.errors import Interrupted, LrcError
from lrc_cli.text import told

VARIABLE = "LRC_TRACE"
"""With this variable set to anything but nothing, the trace is shown on standard error."""
_TRACED = "the trace is in "


def recorded(error: BaseException) -> Iterator[str]:
    """Yields the lines of an error for a log: its text in full, and its trace if that says more."""
    yield f"{type(error).__name__}: {told(error)}"
    is_clear = isinstance(error, Interrupted) or (
        isinstance(error, LrcError) and error.__cause__ is None
    )
    if not is_clear:
        yield from trace(error)


def trace(error: BaseException) -> list[str]:
    """Returns the lines of an error's trace."""
    try:
        return "".join(traceback.format_exception(error)).splitlines()
    except Interrupted:
        raise
    except BaseException:  # whatever a stranger's error raises when it is looked at
        return ["(its trace cannot be had)"]


def note_trace(error: BaseException, file: Path) -> None:
    """Notes on an error which log holds its trace."""
    with suppress(Exception):  # a stranger's error may take no notes
        error.add_note(f"{_TRACED}{file}")


def where_to_look(error: BaseException) -> str:
    """Returns the words that say where the trace of an error is to be found."""
    notes = getattr(error, "__notes__", None)
    for note in notes if isinstance(notes, list) else []:
        if isinstance(note, str) and note.startswith(_TRACED):
            return note
    return f"set {VARIABLE}=1 to see the trace"


def is_trace_asked() -> bool:
    """Returns whether traces are shown on standard error."""
    return bool(os.environ.get(VARIABLE))


def raised_at(error: BaseException) -> str | None:
    """Returns the file and the line that raised an error; None if no code of Python did."""
    frames = traceback.extract_tb(error.__traceback__, limit=-1)
    return f"{frames[0].filename}, line {frames[0].lineno}" if frames else None
