"""A layer that can carry the free bias of `compression.center` is found here, with the bias's cost.

lrc's own low-rank module reads a bias back under `<layer>.bias`. So a layer can carry a bias where
this name belongs to the layer in the running network, and to nothing else. A trial on the module
tells; there is no table of model names.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from lrc_cli.checkpoint.source import Source
from lrc_cli.errors import InputError
from lrc_cli.network.disk_names import module_names
from lrc_cli.network.keys import Keys
from lrc_cli.network.layer import Layer


def gained_bytes(layer: Layer, source: Source, dtype: torch.dtype) -> int:
    """Returns the bytes in `dtype` of the bias that a layer gains; 0 where it has a bias."""
    return 0 if layer.keys.bias in source.tensors else layer.shape[0] * dtype.itemsize


def check_bias(module: nn.Module, source: Source, layers: Sequence[Layer]) -> None:
    """Raises InputError for the first layer that cannot carry a new bias.

    Args:
        module: the dense network as it was built, before `make_network`.
        source: the checkpoint.
        layers: the layers to be factorised.
    """
    with _with_biases(module, layers):
        found = module_names(module, [layer.keys.bias for layer in layers])
        state = module.state_dict(keep_vars=True)
        owners = _owners(module)
    for layer in layers:
        key, name = layer.keys.bias, Keys.of(layer.name, state).bias
        bias = getattr(module.get_submodule(layer.name), "bias", None)
        whole = bias is None or tuple(bias.shape) == layer.shape[:1]
        stored = (bias is None) == (key not in source.tensors)
        shared = bias is not None and owners[id(bias)] > 1
        if found.get(key) != name or not whole or not stored or shared:
            raise InputError(
                f"compression.center: {layer.name} ({layer.kind}) cannot carry a new bias",
                "set center: false or exclude it",
            )


@contextmanager
def _with_biases(module: nn.Module, layers: Sequence[Layer]) -> Iterator[None]:
    """A context in which every layer without a bias has a bias that holds no numbers."""
    bare = [module.get_submodule(layer.name) for layer in layers]
    bare = [part for part in bare if part._parameters.get("bias", 0) is None]
    for part in bare:
        part.register_parameter("bias", nn.Parameter(torch.empty(0, device="meta")))
    try:
        yield
    finally:
        for part in bare:
            part.register_parameter("bias", None)


def _owners(module: nn.Module) -> Counter[int]:
    """Returns the number of modules that hold each parameter, by id."""
    return Counter(id(p) for part in module.modules() for p in part.parameters(recurse=False))
