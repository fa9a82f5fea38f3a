"""torch.distributed connects processes: gloo for CPU tensors and objects, NCCL for CUDA tensors.

A process that fails writes its exit code into the store that all processes share. The others see
the code in their main thread when an exchange breaks, or else in a thread that keeps looking. The
thread is needed because a process that waits inside NCCL, or computes for long, would not notice.
"""

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from lrc_cli.runtime.processes import LostProcess, Processes

Value = TypeVar("Value")

FAILED, ENDED = "lrc: the first failure", "lrc: how many have failed"
FOREVER = timedelta(days=30)
"""The longest time of an exchange: a process waits as long as the slowest process works."""
LOOK_SECONDS, GRACE_SECONDS = 1.0, 15.0
"""The time between two looks for a failed process, and the time that the main thread then has."""
OUTLAST_SECONDS = 3.0
"""The time that the process with the store waits for other processes to fail too."""


class Group(Processes):
    """The processes that torchrun has started, seen from one process."""

    def __init__(self) -> None:
        self.local_rank = int(os.environ["LOCAL_RANK"])
        self.store, self.rank, self.size = next(rendezvous("env://"))
        # The thread needs a client of its own: a blocking call of the main thread locks others out.
        self._watched = self.store.clone()
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if dist.is_nccl_available() else "gloo",
            store=self.store,
            rank=self.rank,
            world_size=self.size,
            timeout=FOREVER,
        )
        self._left = threading.Event()
        self._seen: int | None = None
        """The exit code of the first process that failed, once it was seen."""
        threading.Thread(target=self._watch, daemon=True).start()

    def gather(self, value: Value) -> list[Value]:
        """See Processes."""
        values: list[Any] = [None] * self.size
        self._exchange(dist.all_gather_object, values, value)
        return values

    def from_first(self, compute: Callable[[], Value]) -> Value:
        """See Processes."""
        value = [compute() if self.is_first else None]
        self._exchange(dist.broadcast_object_list, value, src=0)
        return value[0]  # type: ignore[return-value]

    def sum_to(self, owner: int | None, tensor: torch.Tensor) -> None:
        """See Processes."""
        if owner is None:
            self._exchange(dist.all_reduce, tensor)
        else:
            self._exchange(dist.reduce, tensor, dst=owner)

    def wait(self) -> None:
        """See Processes."""
        self.gather(None)  # a barrier of NCCL would choose a device of its own

    def _exchange(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except RuntimeError as error:  # gloo and NCCL have no types of their own
            raise LostProcess(self.rank, self.size, self._first_to_fail()) from error

    def _first_to_fail(self) -> int | None:
        """The rank of the process that said first that it fails; None: no other has said so.

        Only the first process asks: the store is its own, and it alone tells the user.
        """
        if not self.is_first or not self.store.check([FAILED]):
            return None
        return int(self.store.get(FAILED).decode().split()[0])

    def failed(self, error: BaseException) -> int | None:
        """Tell the others that this process ends with an error.

        Returns:
            None if this process is the first to fail, so that its error is shown; else the exit
            code of the process that failed first.
        """
        code = getattr(error, "exit_code", 130 if isinstance(error, KeyboardInterrupt) else 1)
        mine = f"{self.rank} {code}"
        try:
            first = self.store.compare_set(FAILED, "", mine).decode()
        except RuntimeError:  # the store is gone with the process or the machine that held it
            return self._seen
        with suppress(RuntimeError):
            self._outlast()
        return None if first == mine else int(first.split()[1])

    def _outlast(self) -> None:
        """Wait a little for the others if the store ends with this process.

        Without the store every process would print its own error.
        """
        ended, deadline = self.store.add(ENDED, 1), time.monotonic() + OUTLAST_SECONDS
        if not self.is_first or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            return
        while ended < self.size and time.monotonic() < deadline:
            time.sleep(0.01)
            ended = self.store.add(ENDED, 0)

    def leave(self) -> None:
        """End the exchange, with nothing left to tell."""
        self._left.set()
        dist.destroy_process_group()

    def _watch(self) -> None:
        """End this process if another one failed and the main thread does not notice."""
        code = None
        while code is None:
            if self._left.wait(LOOK_SECONDS):
                return
            code = self._look()
        if not self._left.wait(GRACE_SECONDS):
            os._exit(code)

    def _look(self) -> int | None:
        try:
            if not self._watched.check([FAILED]):
                return None
            self._seen = int(self._watched.get(FAILED).decode().split()[1])
            return self._seen
        except RuntimeError:
            return 1
