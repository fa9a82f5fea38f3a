"""Layers followed by a ReLU: which they are, their inputs, and their fit.

Which they are is seen in one forward pass, at the level of torch's operations: no table of names or
of modules. What is in between may only look at the same numbers in another shape.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lrc_cli.checkpoint.headers import tensor_bytes
from lrc_cli.data.draw import Batch, Sequences
from lrc_cli.engine import FROBENIUS, RELU, Rectified, Solver, Unpolished
from lrc_cli.errors import InputError
from lrc_cli.execution.losses import Masks, floating_outputs, masks_of, unpadded
from lrc_cli.job.factors.fit import Fitted, Request, fit_layer
from lrc_cli.job.statistics.moments import micro_batch
from lrc_cli.network.opening import Layer, Network, hooked, watched

NOT_FOLLOWED = "not followed by ReLU: fitted with frobenius"
MICRO_BATCH_TOKENS = 2048

_RELU, _RELU_IN_PLACE = torch.ops.aten.relu.default, torch.ops.aten.relu_.default


class _Watch(TorchDispatchMode):
    """Follows tensors by their storage, to see what becomes of each."""

    def __init__(self) -> None:
        super().__init__()
        self.rectified: set[str] = set()
        self.otherwise: set[str] = set()
        self._owners: dict[int, str] = {}
        # A storage that was freed could lend its address to another one.
        self._alive: list[torch.Tensor] = []

    def follow(self, name: str, output: torch.Tensor) -> None:
        """From now on, see what `output` of the layer `name` is used for."""
        self._owners[_address(output)] = name
        self._alive.append(output)

    def returned(self, outputs: Sequence[torch.Tensor]) -> None:
        """The network's outputs: what is returned is used outside."""
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
        if function is _RELU_IN_PLACE:
            self.rectified.add(self._owners.pop(address))
        elif function is _RELU:
            self.rectified.add(self._owners[address])
        elif function._schema.is_mutable or given != {address}:  # else a view of it
            self.otherwise.add(self._owners[address])


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def followed_by_relu(network: Network, layers: Sequence[Layer], batch: Batch) -> set[str]:
    """The names of the layers whose outputs go into a ReLU and nowhere else, seen on one batch.

    Args:
        batch: a micro-batch; a layer that it does not reach is not among them.
    """
    watch = _Watch()
    with torch.no_grad(), watched(network, layers, lambda x, _, y: watch.follow(x.name, y)):
        with watch:
            outputs = network(batch)
        watch.returned(floating_outputs(outputs))
    return watch.rectified - watch.otherwise


def with_relu_where_followed(
    solvers: Mapping[str, Solver], network: Network, layers: Sequence[Layer], batch: Batch
) -> dict[str, Solver]:
    """The solvers by layer name, `relu` giving way to `frobenius` where no ReLU follows.

    Raises:
        InputError: none of the layers with method `relu` is followed by one.
    """
    asked = [layer for layer in layers if solvers[layer.name] is RELU]
    followed = followed_by_relu(network, asked, batch) if asked else set()
    if asked and not followed:
        raise InputError(
            "compression.method: relu: no selected layer is followed by a ReLU",
            "use frobenius or curvature",
        )
    return {
        name: FROBENIUS if solver is RELU and name not in followed else solver
        for name, solver in solvers.items()
    }


def read_inputs(
    network: Network, sequences: Sequences, layer: Layer, directory: Path
) -> torch.Tensor:
    """The layer's inputs on all sequences, by one pass: (T, n) float32 on the network's device.

    Padding is left out. They are the rows that its Gram matrix was summed over. On the CPU they are
    a view of a file without a name in `directory`, which goes with them: 4 T n bytes on the disk,
    whose pages are read as they are needed.
    """
    masks: Masks = ()
    with tempfile.NamedTemporaryFile(dir=directory, prefix="inputs-") as file:

        def take(_: Layer, x: torch.Tensor, __: torch.Tensor) -> None:
            rows = unpadded(x, masks).reshape(-1, x.shape[-1]).float()
            file.write(tensor_bytes(rows.cpu()))

        with torch.no_grad(), hooked(network, [layer], take):
            for batch in sequences.batches(micro_batch(sequences, MICRO_BATCH_TOKENS)):
                masks = masks_of(batch)
                network(batch)
        file.flush()
        size = file.tell() // torch.float32.itemsize
        rows = torch.from_file(file.name, size=size, dtype=torch.float32)
    return rows.view(-1, layer.shape[1]).to(network.device)


def fit_rectified(problem: Rectified, request: Request) -> Fitted:
    """The better one, as stored, of the polished solution and of what `frobenius` gives.

    So rounding cannot put the error behind the ReLU above `frobenius`'s at the same rank.
    """
    polished, plain = (fit_layer(p, request) for p in (problem, Unpolished(problem)))
    if polished.packed is None or plain.packed is None:
        return polished if plain.packed is None else plain
    errors = [x.facts["errors"]["metric"]["stored"] for x in (polished, plain)]
    return polished if errors[0] <= errors[1] else plain
