"""A stranger's code runs in lrc's process: it may raise anything, and must not end the process."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from lrc_cli.errors import InputError, Interrupted, LrcError, Stray, is_out_of_memory
from lrc_cli.text import named


def is_interrupt(error: BaseException) -> bool:
    """Whether an error comes from a signal.

    `lrc` handles signals itself. Where lrc is a library and Python's own handler is in place,
    KeyboardInterrupt is taken for Ctrl-C.
    """
    if isinstance(error, Interrupted):
        return True
    default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    return isinstance(error, KeyboardInterrupt) and default


@contextmanager
def contained() -> Iterator[None]:
    """A context in which a stranger's code can neither end the process nor pass for Ctrl-C.

    Raises:
        Stray: the code raised SystemExit, KeyboardInterrupt or another error that is no
            `Exception`.
    """
    try:
        yield
    except Exception:
        raise
    except BaseException as error:
        if is_interrupt(error):
            raise
        raise Stray(error) from error


@contextmanager
def blaming_input(cause: str, remedy: str) -> Iterator[None]:
    """A context in which every failure of a stranger's code is an InputError with this cause.

    Errors of lrc's own, signals and the end of memory stay what they are.

    Args:
        cause: what fails, and on what; the error's type and text follow.
        remedy: the user's next step.

    Raises:
        InputError: the code raised anything else.
    """
    try:
        with contained():
            yield
    except LrcError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise InputError(f"{cause}: {named(error)}", remedy) from error


@contextmanager
def answering_with(kind: type[LrcError]) -> Iterator[None]:
    """A context, and a decorator, for what programs call: all failures are errors of lrc's own.

    Signals and the end of memory stay what they are.

    Args:
        kind: the error that whatever nobody has foreseen becomes.

    Raises:
        LrcError: the code raised anything else.
    """
    try:
        with contained():
            yield
    except LrcError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise kind(named(error), "see the trace of its cause") from error
