"""torch's own attention layers have a fast path, which computes from weights past the layers.

In evaluation mode `nn.TransformerEncoderLayer` hands the weights of its linear layers to one fused
kernel and never calls the layers. A factorised layer has no dense weight to hand over.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def without_fast_paths() -> Iterator[None]:
    """A context in which torch's attention layers call the layers below them, on every machine.

    torch has one switch for the whole process. The switch has its former value when the context
    ends, also by an error.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def end_fast_paths(model: nn.Module, replaced: Iterable[nn.Module]) -> None:
    """Makes encoder layers of torch call their layers, where a module has replaced one of these.

    The fast path takes a ReLU or a GELU by a number that an encoder layer keeps beside its
    activation; without this number, the layer runs step by step. An encoder packs padded sequences
    only for the fast path.

    Args:
        model: the module tree; changed in place.
        replaced: the modules that have taken the place of dense layers.
    """
    new = {*replaced}
    for part in model.modules():
        if isinstance(part, nn.TransformerEncoder | nn.TransformerEncoderLayer):
            if new.isdisjoint(part.modules()):
                continue
            if isinstance(part, nn.TransformerEncoder):
                part.use_nested_tensor = False
            else:
                part.activation_relu_or_gelu = 0
