"""A layer's inputs are written to a temporary file here, for a solver that reads inputs."""

import tempfile
from pathlib import Path

import torch

from lrc_cli.data.draw import Sequences, micro_batch
from lrc_cli.data.padding import Masks, masks_of, unpadded
from lrc_cli.execution.hooks import hooked
from lrc_cli.execution.network import Network
from lrc_cli.network.layer import Layer
from lrc_cli.runtime.files import tensor_bytes

MICRO_BATCH_TOKENS = 2048


def read_inputs(
    network: Network, sequences: Sequences, layer: Layer, directory: Path
) -> torch.Tensor:
    """Returns the layer's inputs on all sequences, from one pass, as (T, n) float32.

    The rows are the same as in the layer's Gram matrix: padding is left out. The tensor is on the
    network's device. On the CPU it is a view of a file without a name in `directory`, of 4 T n
    bytes. The file is gone with the tensor, and its pages are read on demand.
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
