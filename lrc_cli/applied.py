"""Which layers can be factorised in this network: seen as it runs, not told by their class.

A class that derives from `nn.Linear` may compute something else, and a network may read a layer's
weight past the layer. Factors would change what comes out, and no error of the layer's would tell.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lrc_cli.calibration import Batch
from lrc_cli.layouts import Lookup
from lrc_cli.losses import floating_outputs
from lrc_cli.models import Layer, Network

TOLERANCE = 0.03
"""Of ||y||: a hundred times float32's rounding, several times bfloat16's."""
OTHER = "computes something else than a product with its weight"
READ = "the network reads its weight past the layer"
CALLED = "it is called with something beside its input, or with that by name"


def not_applied(network: Network, layers: Sequence[Layer], batch: Batch) -> dict[str, str]:
    """By name the layers that are no product y = W x + b, or not only, with the reason.

    Args:
        batch: one sequence. A layer that it does not reach is not judged by the first rule.
    """
    able = [x for x in layers if not isinstance(x.layout, Lookup) and x.tied_to is None]
    reasons: dict[str, str] = {}

    def attach(layer: Layer) -> Any:
        def look(part: nn.Module, given: tuple[Any, ...], named: dict[str, Any], y: Any) -> None:
            if len(given) != 1 or named:
                reasons[layer.name] = CALLED
            elif not _is_product(layer, part, _weight(part, type(part)), given[0], y):
                reasons[layer.name] = OTHER

        part = network.module.get_submodule(layer.name)
        return part.register_forward_hook(look, with_kwargs=True)

    handles = [attach(layer) for layer in able]
    try:
        with torch.no_grad():
            outputs = network(batch)
    finally:
        for handle in handles:
            handle.remove()
    able = [layer for layer in able if layer.name not in reasons]
    if _is_finite(outputs) and _reads_past(network, able, batch):
        # Those that have one place in blocks that are alike are used alike.
        groups: dict[str, list[Layer]] = {}
        for layer in able:
            groups.setdefault(re.sub(r"\d+", "#", layer.name), []).append(layer)
        past = [group for group in groups.values() if _reads_past(network, group, batch)]
        reasons |= {layer.name: READ for group in past for layer in group}
    return reasons


def _is_product(layer: Layer, part: nn.Module, weight: Tensor, x: Any, y: Any) -> bool:
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        return False
    wanted = _product(layer, part, weight, x)
    if wanted.shape != y.shape:
        return False
    off, size = (torch.linalg.vector_norm(t.float()) for t in (y - wanted, wanted))
    # Where numbers are not finite, others say so.
    return not bool(off > TOLERANCE * size)


def _product(layer: Layer, part: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    layout = layer.layout
    y = layout.apply(x, layout.inner(layout.matrix(weight)))
    bias = getattr(part, "bias", None)
    return y if bias is None else y + bias.view(-1, *(1,) * (-1 - layout.channels))


def _reads_past(network: Network, layers: Sequence[Layer], batch: Batch) -> bool:
    """Whether outputs depend on what anyone but the layers themselves finds in their weights."""
    with torch.no_grad(), _hidden(network, layers):
        return not _is_finite(network(batch))


@contextmanager
def _hidden(network: Network, layers: Sequence[Layer]) -> Iterator[None]:
    """Within it, the layers compute what they did, and whoever reads their weight finds NaN."""
    before = {}
    try:
        for layer in layers:
            part = network.module.get_submodule(layer.name)
            before[part] = type(part)
            part.__class__ = _disguised(layer, type(part))
        yield
    finally:
        for part, kind in before.items():
            part.__class__ = kind


def _disguised(layer: Layer, kind: type[nn.Module]) -> type[nn.Module]:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return _product(layer, self, _weight(self, kind), x)

    def weight(self: nn.Module) -> Tensor:
        true = _weight(self, kind)
        return true.new_full((), torch.nan).expand(true.shape)

    return type(kind.__name__, (kind,), {"forward": forward, "weight": property(weight)})


def _weight(part: nn.Module, kind: type[nn.Module]) -> Tensor:
    """The weight that a module of this class reads: a parametrized one through its property."""
    read = getattr(kind, "weight", None)
    if isinstance(read, property):
        assert read.fget is not None
        weight = read.fget(part)
    else:
        weight = part._parameters["weight"]
    assert isinstance(weight, Tensor)
    return weight


def _is_finite(outputs: Any) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in floating_outputs(outputs))
