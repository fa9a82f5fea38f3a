"""The processes that work on one job together: who does what, and what they tell each other.

A process alone is the same object, to whom every exchange hands back what it gave. So nothing that
takes part asks how many there are. `joined` gives the processes that torchrun has started.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeVar

from lrc_cli.errors import InputError

if TYPE_CHECKING:  # importing torch takes seconds
    import torch

Value = TypeVar("Value")


class Processes:
    """One process, alone.

    The methods that exchange something are called by all processes, in the same order.
    """

    rank, size, local_rank = 0, 1, 0
    """This process's number, how many there are, and its number on its machine."""

    @property
    def is_first(self) -> bool:
        """Whether this one speaks to the user and writes what there is one of."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Which of `count` equal pieces of work are this process's; neighbours stay together."""
        least, more = divmod(count, self.size)
        start = self.rank * least + min(self.rank, more)
        return range(start, start + least + (self.rank < more))

    def owners(self, costs: Mapping[str, float]) -> dict[str, int]:
        """The rank that does each piece of work: the dearest first, to whom has least to do."""
        load = [0.0] * self.size
        owners: dict[str, int] = {}
        for name in sorted(costs, key=lambda name: -costs[name]):
            owners[name] = load.index(min(load))
            load[owners[name]] += costs[name]
        return owners

    def gather(self, value: Value) -> list[Value]:
        """Every process's value, by rank, in each of them."""
        return [value]

    def from_first(self, compute: Callable[[], Value]) -> Value:
        """What `compute` returns in the first process; the others wait for it."""
        return compute()

    def sum_to(self, owner: int | None, tensor: "torch.Tensor") -> None:
        """Add up a tensor over the processes, in place.

        Args:
            owner: the rank that gets the sum, while the others keep nothing of use; None: all do.
        """

    def wait(self) -> None:
        """Return once every process has come here."""


ALONE = Processes()


def check_alone(command: str, processes: Processes) -> None:
    """Raise InputError where several processes have started a command that is one process's."""
    if processes.size > 1:
        raise InputError(
            f"lrc {command}: works in one process, and torchrun has started {processes.size}",
            "start it without torchrun",
        )
