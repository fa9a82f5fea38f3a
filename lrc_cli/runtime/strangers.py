"""A stranger's code runs in lrc's process: it may raise anything, and must not end the process."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from lrc_cli.errors import Interrupted, Stray


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
