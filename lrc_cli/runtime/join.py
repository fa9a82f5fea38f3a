"""This module finds the processes of one job: several that torchrun has started, or this one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from lrc_cli.errors import RunError
from lrc_cli.runtime.processes import ALONE, Processes

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""The variables that torchrun sets in the environment of every process."""


class EndedElsewhere(RunError):
    """Another process failed first, and says why; this process ends without a word.

    Args:
        code: the exit code of the process that failed first.
    """

    def __init__(self, code: int) -> None:
        self.exit_code = code
        super().__init__("another process has failed", "see what it says")


@contextmanager
def joined() -> Iterator[Processes]:
    """The processes that torchrun has started with this process, or this process alone.

    An error that ends one process within the context ends the others too. The process that failed
    first raises its error. The others raise EndedElsewhere with the exit code of the first.
    """
    if any(name not in os.environ for name in TORCHRUN) or os.environ["WORLD_SIZE"] == "1":
        yield ALONE
        return
    # torch would write a trace of C++ for a lost connection, which lrc answers in a sentence.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from lrc_cli.runtime.torchrun import Group

    group = Group()
    try:
        yield group
    except BaseException as error:
        code = group.failed(error)
        if code is None:
            raise
        raise EndedElsewhere(code) from error
    group.leave()
