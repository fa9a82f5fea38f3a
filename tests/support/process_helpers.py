"""These helpers run `lrc` in processes that are forked after torch was imported, so in no time."""

import functools
import multiprocessing
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from lrc_cli.cli import lrc
from lrc_cli.commands.exits import run_command
from lrc_cli.job.statistics import sweep
from lrc_cli.job.work import WorkDirectory

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    [
        "lrc_cli.job.run",
        "lrc_cli.hf",
        "lrc_cli.runtime.torchrun",
        "transformers.models.llama.modeling_llama",
    ]
)
PATIENCE = 300.0
"""The seconds to wait for anything."""


@dataclass(frozen=True, kw_only=True)
class Running:
    """Holds a started command, whose outputs go to files."""

    process: BaseProcess
    log: Path

    def wait(self) -> int:
        """Returns the exit code once the command has ended, as a shell gives it."""
        self.process.join(PATIENCE)
        code = self.process.exitcode
        assert code is not None, "the command does not end"
        return code if code >= 0 else 128 - code

    def stop_when(self, condition: Callable[[], bool], number: int) -> int:
        """Sends a signal as soon as `condition` holds; returns the exit code."""
        self.wait_until(condition)
        assert self.process.pid is not None
        os.kill(self.process.pid, number)
        return self.wait()

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Returns as soon as `condition` holds, while the command runs."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert self.process.is_alive(), f"ended too early: {self.err}"
            assert time.monotonic() < deadline, "the moment to stop at never came"
            time.sleep(0.001)

    @property
    def err(self) -> str:
        """The text that the command wrote on standard error."""
        return self.log.read_text()


def fork(function: Callable[..., None], *arguments: object) -> BaseProcess:
    """Starts a function of an importable module in a process of its own."""
    process = _FORKS.Process(target=function, args=arguments)
    process.start()
    return process


def start(
    arguments: Sequence[object],
    log: Path,
    *,
    largest_file: int | None = None,
    environment: Mapping[str, str] | None = None,
    store_every: float | None = None,
    puts: Path | None = None,
) -> Running:
    """Starts `lrc` with arguments.

    Args:
        log: file for its standard output and error.
        largest_file: bytes beyond which writing to a file fails, as on a full disk.
        environment: variables to set.
        store_every: seconds, see `sweep.STORE_EVERY`.
        puts: file for "<stage>/<unit>" of all that it puts into the work directory, a line each.
    """
    strings = [str(argument) for argument in arguments]
    given = strings, str(log), largest_file, environment, store_every, puts
    process = _FORKS.Process(target=_main, args=given)
    process.start()
    return Running(process=process, log=log)


def start_many(
    arguments: Sequence[object],
    folder: Path,
    size: int,
    *,
    full_disk: tuple[int, int] | None = None,
    store_every: float | None = None,
) -> list[Running]:
    """Starts `lrc` as torchrun starts it, in `size` processes.

    Args:
        folder: for a log of each, `log-<rank>`, and what each puts, `puts-<rank>`.
        full_disk: a rank and its `largest_file`.
        store_every: as for `start`.
    """
    limits = dict([full_disk]) if full_disk else {}
    return [
        start(
            arguments,
            folder / f"log-{environment['RANK']}",
            largest_file=limits.get(int(environment["RANK"])),
            environment=environment,
            store_every=store_every,
            puts=folder / f"puts-{environment['RANK']}",
        )
        for environment in environments(size)
    ]


def environments(size: int) -> list[dict[str, str]]:
    """Returns what torchrun tells each of `size` processes on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    ranks = [{"RANK": str(i), "LOCAL_RANK": str(i), "WORLD_SIZE": str(size)} for i in range(size)]
    return [address | rank for rank in ranks]


def _main(
    arguments: list[str],
    log: str,
    largest_file: int | None,
    environment: Mapping[str, str] | None,
    store_every: float | None,
    puts: Path | None,
) -> None:
    if store_every is not None:
        sweep.STORE_EVERY = store_every
    if puts is not None:
        _note_puts(puts)
    os.environ.update(environment or {})
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    if largest_file is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    sys.exit(run_command(functools.partial(lrc, args=arguments)))


def _note_puts(file: Path) -> None:
    put = WorkDirectory.put

    def noted(work: WorkDirectory, stage: str, unit: str, *rest: Any) -> None:
        put(work, stage, unit, *rest)
        with file.open("a") as lines:
            lines.write(f"{stage}/{unit}\n")

    WorkDirectory.put = noted  # type: ignore[method-assign]
