"""A stranger's code runs in lrc's process: it may raise anything, and must not end the process."""

import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, _GeneratorContextManager, contextmanager

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


def blaming_input(cause: str, remedy: str) -> AbstractContextManager[None]:
    """Returns a context in which every failure of a stranger's code is an InputError with a cause.

    Errors of lrc's own, signals and the end of memory stay what they are.

    Args:
        cause: what fails, and on what; the error's type and text follow.
        remedy: the user's next step.
    """
    return _turned(lambda error: InputError(f"{cause}: {named(error)}", remedy))


def answering_with(kind: type[LrcError]) -> _GeneratorContextManager[None]:
    """Returns a context, and a decorator, in which all failures are errors of lrc's own.

    Programs call what it decorates. Signals and the end of memory stay what they are.

    Args:
        kind: the error that whatever nobody has foreseen becomes.
    """
    return _turned(lambda error: kind(named(error), "see the trace of its cause"))


@contextmanager
def _turned(into: Callable[[Exception], LrcError]) -> Iterator[None]:
    """A context in which an error of a stranger's code is turned into one of lrc's own."""
    try:
        with contained():
            yield
    except LrcError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise into(error) from error
