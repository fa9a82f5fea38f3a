"""The processes of one job share out the work and exchange values here.

A single process is the same kind of object, and every exchange returns its own value. So no other
code asks how many processes there are. `join.joined` gives the processes that torchrun has started.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeVar

from lrc_cli.errors import InputError, RunError

if TYPE_CHECKING:  # importing torch takes seconds
    import torch

Value = TypeVar("Value")


class LostProcess(RunError):
    """An exchange broke because another process has ended.

    Args:
        rank: this process.
        size: the number of processes.
        first: the process that is known to have failed first; None: another was killed or cut off.
    """

    def __init__(self, rank: int, size: int, first: int | None) -> None:
        self.first = first
        if first is not None:
            super().__init__(f"process {first} of {size} failed first", "see what it says")
            return
        super().__init__(
            f"process {rank} of {size} lost another one, which was killed or cut off",
            "the same command goes on where it stopped",
        )


class Processes:
    """One process, alone.

    The methods that exchange something are called by all processes, in the same order.
    """

    rank, size, local_rank = 0, 1, 0
    """This process's number, the number of processes, and this process's number on its machine."""

    @property
    def is_first(self) -> bool:
        """Whether this process speaks to the user and writes the files that are written once."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """This process's pieces of `count` equal pieces of work; neighbours stay together."""
        least, more = divmod(count, self.size)
        start = self.rank * least + min(self.rank, more)
        return range(start, start + least + (self.rank < more))

    def owners(self, costs: Mapping[str, float]) -> dict[str, int]:
        """The rank that does each piece of work.

        The dearest pieces are given away first, always to the process that has least to do.
        """
        load = [0.0] * self.size
        owners: dict[str, int] = {}
        for name in sorted(costs, key=lambda name: -costs[name]):
            owners[name] = load.index(min(load))
            load[owners[name]] += costs[name]
        return owners

    def gather(self, value: Value) -> list[Value]:
        """The values of all processes, by rank; every process gets the list."""
        return [value]

    def from_first(self, compute: Callable[[], Value]) -> Value:
        """The value that `compute` returns in the first process; the others wait for the value."""
        return compute()

    def sum_to(self, owner: int | None, tensor: "torch.Tensor") -> None:
        """Add up a tensor over the processes, in place.

        Args:
            owner: the rank that gets the sum; the others keep nothing of use. None: all get the
                sum.
        """

    def wait(self) -> None:
        """Return once every process has come here."""


ALONE = Processes()


def check_alone(command: str, processes: Processes) -> None:
    """Raise InputError where several processes have started a command for one process."""
    if processes.size > 1:
        raise InputError(
            f"lrc {command}: works in one process, and torchrun has started {processes.size}",
            "start it without torchrun",
        )
