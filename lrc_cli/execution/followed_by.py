"""This module finds the layers that are followed by an activation and by nothing else.

One forward pass shows them at the level of torch's operations: there is no table of names or
modules. Between a layer and its activation, operations may only change the shape of the numbers.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lrc_cli.data.draw import Batch
from lrc_cli.execution.hooks import watched
from lrc_cli.execution.network import Network
from lrc_cli.execution.outputs import floating_outputs
from lrc_cli.network.layer import Layer

ACTIVATIONS = {"ReLU": (torch.ops.aten.relu.default, torch.ops.aten.relu_.default)}
"""The operation of an activation, and its form in place, by the activation's name."""


class _Watch(TorchDispatchMode):
    """A mode that follows tensors by their storage, to see what each is used for."""

    def __init__(self, activation: str) -> None:
        super().__init__()
        self.activation, self.in_place = ACTIVATIONS[activation]
        self.activated: set[str] = set()
        self.otherwise: set[str] = set()
        self._owners: dict[int, str] = {}
        # A storage that was freed could lend its address to another one.
        self._alive: list[torch.Tensor] = []

    def follow(self, name: str, output: torch.Tensor) -> None:
        """Begins to see what `output` of the layer `name` is used for."""
        self._owners[_address(output)] = name
        self._alive.append(output)

    def returned(self, outputs: Sequence[torch.Tensor]) -> None:
        """Counts the network's outputs as used otherwise, because code outside reads them."""
        self.otherwise |= {self._owners.get(_address(tensor), "") for tensor in outputs}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        taken = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        addresses = {_address(x) for x in taken} & set(self._owners)
        result = function(*args, **(kwargs or {}))
        for address in addresses:
            self._used(function, address, result)
        return result

    def _used(self, function: Any, address: int, result: Any) -> None:
        given = {_address(x) for x in tree_leaves(result) if isinstance(x, torch.Tensor)}
        if function is self.in_place:
            self.activated.add(self._owners.pop(address))
        elif function is self.activation:
            self.activated.add(self._owners[address])
        elif function._schema.is_mutable or given != {address}:  # else the result is a view
            self.otherwise.add(self._owners[address])


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def followed_by(
    activation: str, network: Network, layers: Sequence[Layer], batch: Batch
) -> set[str]:
    """Returns the names of the layers whose outputs go into an activation and nowhere else.

    Args:
        activation: a name in ACTIVATIONS.
        network: the network.
        layers: the layers to look at.
        batch: a micro-batch; layers that the micro-batch does not reach are left out.
    """
    watch = _Watch(activation)
    with torch.no_grad(), watched(network, layers, lambda x, _, y: watch.follow(x.name, y)):
        with watch:
            outputs = network(batch)
        watch.returned(floating_outputs(outputs))
    return watch.activated - watch.otherwise
