"""The processes of one job, found: torchrun has started several, or this process is alone."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from lrc_cli.runtime.processes import ALONE, Processes

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun tells every process in its environment."""


@contextmanager
def joined() -> Iterator[Processes]:
    """The processes that torchrun has started with this one, or one alone.

    Whatever ends one of them within it ends the others too: they leave by SystemExit, in silence
    and with the exit code of the one that failed first, whose error is raised there.
    """
    if any(name not in os.environ for name in TORCHRUN) or os.environ["WORLD_SIZE"] == "1":
        yield ALONE
        return
    from lrc_cli.runtime.torchrun import Group

    group = Group()
    try:
        yield group
    except BaseException as error:
        code = group.failed(error)
        if code is None:
            raise
        raise SystemExit(code) from error
    group.leave()
