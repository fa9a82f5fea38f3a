"""This module sees which layers can be factorised while the network runs: no class name decides.

A class that derives from `nn.Linear` may compute something else, and a network may read a layer's
weight past the layer. Factors would then change the network's outputs, and the layer's own errors
would not show it.
"""

import re
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lrc_cli.data.draw import Batch
from lrc_cli.errors import is_out_of_memory
from lrc_cli.execution.constancy import DIRECTIONS, TOLERANCE, Trace, noting, state_of
from lrc_cli.execution.glance import glance
from lrc_cli.execution.network import Network, NetworkError
from lrc_cli.execution.outputs import all_finite, floating_outputs
from lrc_cli.network.layer import Layer
from lrc_cli.network.layouts import Lookup
from lrc_cli.network.parts import part_of

FINE_TOLERANCE = 2.0**-7
"""As TOLERANCE, in a network with more digits, whose layers may compute in bfloat16 inside."""
HOLDERS = (dict, list, set, OrderedDict, defaultdict)
"""Kinds of attributes in which a module may keep something."""
OTHER = "computes something else than a product with its weight"
READ = "the network reads its weight past the layer"
COARSE = "computes in {y}, coarser than its weight in {w}, as under torch.autocast"
CALLED = "it is called with more than its input, or with its input by name"


@dataclass(frozen=True, kw_only=True)
class Use:
    """A `Use` says how a network has used its layers in one run."""

    trace: Trace
    """What the run did, on which micro-batch."""
    wrong: Mapping[str, str]
    """The names of the layers that were no product y = W x + b, each with the reason."""
    is_suspect: bool
    """Whether the outputs depend on a weight that was read past a layer."""


def observe(network: Network, layers: Sequence[Layer], batch: Batch) -> tuple[Any, Use]:
    """Runs a network, and sees which of its layers are used as products with their weight.

    Returns:
        The network's outputs, and how the network has used the layers.

    Raises:
        Whatever the network raises where no weight is hidden.
    """
    wrong: dict[str, str] = {}
    judged, is_suspect = _with_product(layers), False
    state = state_of(network.module)
    with noting(network, layers) as did:
        outputs = _run_hidden(network, judged, batch, wrong) if judged else glance(network, batch)
        if outputs is None:
            with _kept(network.module):
                outputs = glance(network, batch)
            # Outputs that are not finite without a hidden weight say nothing of the layers.
            is_suspect = all_finite(floating_outputs(outputs))
    trace = Trace(batch=batch, layers=layers, did=did, state=state)
    return outputs, Use(trace=trace, wrong=wrong, is_suspect=is_suspect)


def reasons_of(network: Network, layers: Sequence[Layer], uses: Sequence[Use]) -> dict[str, str]:
    """Returns the names of the layers that are not only a product y = W x + b, with the reason.

    A layer that was never reached is not judged by what it computes.

    Args:
        network: the network.
        layers: the layers to judge.
        uses: what `observe` has seen of these layers.
    """
    wrong = {name: reason for use in uses for name, reason in use.wrong.items()}
    able = [layer for layer in _with_product(layers) if layer.name not in wrong]

    def reads_past(hidden: Sequence[Layer], batch: Batch) -> bool:
        """Returns whether outputs depend on the layers' weights past the layers."""
        with torch.no_grad():
            return _run_hidden(network, hidden, batch, wrong) is None

    reasons: dict[str, str] = {}
    for batch in [use.trace.batch for use in uses if use.is_suspect]:
        if not reads_past(able, batch):
            continue
        # Layers with the same place in blocks that are alike are used alike.
        groups: dict[str, list[Layer]] = {}
        for layer in able:
            groups.setdefault(re.sub(r"\d+", "#", layer.name), []).append(layer)
        past = [group for group in groups.values() if reads_past(group, batch)]
        reasons |= {layer.name: READ for group in past for layer in group}
    # What these layers feed was judged only in runs in which they were not hidden.
    return reasons | wrong


def _with_product(layers: Sequence[Layer]) -> list[Layer]:
    """Returns the layers that should be products: no table, and no head that is tied to a table."""
    return [x for x in layers if not isinstance(x.layout, Lookup) and not x.tied_to]


def _run_hidden(
    network: Network, layers: Sequence[Layer], batch: Batch, wrong: dict[str, str]
) -> Any:
    """Returns the outputs with hidden weights; None where they are not finite, or the code fails.

    Args:
        network: the network.
        layers: the layers whose weights are hidden from all other code.
        batch: a micro-batch.
        wrong: gains the layers that are no product.
    """
    try:
        with _kept(network.module), _hidden(network.module, layers, wrong):
            outputs = glance(network, batch)
    except NetworkError:
        return None  # the caller sees whether a run with nothing hidden fails too
    return outputs if all_finite(floating_outputs(outputs)) else None


@contextmanager
def _hidden(module: nn.Module, layers: Sequence[Layer], wrong: dict[str, str]) -> Iterator[None]:
    """A context in which layers are judged as they run, and all other code reads NaN weights."""
    before = {}
    try:
        for layer in layers:
            part = part_of(module, layer.name)
            before[part] = type(part)
            part.__class__ = _disguised(layer, type(part), wrong)
        yield
    finally:
        for part, kind in before.items():
            part.__class__ = kind


def _disguised(layer: Layer, kind: type[nn.Module], wrong: dict[str, str]) -> type[nn.Module]:
    computing: list[bool] = []

    def judged(run: Callable[..., Any]) -> Callable[..., Any]:
        def call(part: nn.Module, *given: Any, **named: Any) -> Any:
            is_called = not computing  # from outside: hooks are a part of the layer
            computing.append(True)
            try:
                y = run(part, *given, **named)
            finally:
                computing.pop()
            if is_called:
                reason = _judge(layer, part, _weight(part, kind), given, named, y)
                if reason is not None:
                    wrong[layer.name] = reason
            return y

        return call

    def weight(part: nn.Module) -> Tensor:
        true = _weight(part, kind)
        return true if computing else true.new_full((), torch.nan).expand(true.shape)

    calls = {"__call__": judged(kind.__call__), "forward": judged(kind.forward)}
    return type(kind.__name__, (kind,), {**calls, "weight": property(weight)})


def _judge(
    layer: Layer,
    part: nn.Module,
    weight: Tensor,
    given: Sequence[Any],
    named: Mapping[str, Any],
    y: Any,
) -> str | None:
    """Returns why a call of the layer is no product with its weight; None for a product."""
    if len(given) != 1 or named:
        return CALLED
    if isinstance(y, Tensor) and _digits(y) > _digits(weight):
        return COARSE.format(y=told_dtype(y), w=told_dtype(weight))
    return None if _is_product(layer, part, weight, given[0], y) else OTHER


def _digits(tensor: Tensor) -> float:
    """Returns the rounding of a tensor's dtype; 0 for whole numbers."""
    return torch.finfo(tensor.dtype).eps if tensor.is_floating_point() else 0.0


def told_dtype(tensor: Tensor) -> str:
    """Returns a tensor's dtype in words."""
    return str(tensor.dtype).removeprefix("torch.")


@contextmanager
def _kept(network: nn.Module) -> Iterator[None]:
    """A context at whose end modules' attributes and buffers are again as they were before.

    A network may keep what it derives from its weights when it runs for the first time. Where a
    network keeps such results in another object, its outputs stay NaN, and `probe` says so.
    """
    own = {"_parameters", "_modules"}  # a run moves their entries, and makes none
    kept: list[tuple[Any, Any]] = []
    for module in network.modules():
        attributes = vars(module)
        holders = [value for name, value in attributes.items() if name not in own]
        kept += [(x, x.copy()) for x in (attributes, *holders) if type(x) in HOLDERS]
    try:
        yield
    finally:
        for holder, before in kept:
            holder.clear()
            holder.extend(before) if isinstance(holder, list) else holder.update(before)


def _is_product(layer: Layer, part: nn.Module, weight: Tensor, x: Any, y: Any) -> bool:
    """Returns whether y is the product of the layer's weight with x, plus the bias.

    Outputs are compared on a few random directions (Freivalds 1977): a product with all of W would
    take as long as the layer itself.
    """
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        return False
    layout, matrix = layer.layout, layer.layout.matrix(weight).float()
    if y.ndim < -layout.channels or y.shape[layout.channels] != len(matrix):
        return False
    directions = torch.randn(
        len(matrix), DIRECTIONS, generator=torch.Generator().manual_seed(0)
    ).to(matrix)
    bias = getattr(part, "bias", None)
    try:
        wanted = layout.outputs(layout.apply(x.float(), layout.inner(directions.T @ matrix)))
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        return False  # the layer takes an input that a product with its weight does not take
    found = layout.outputs(y).float() @ directions
    if bias is not None:
        wanted = wanted + bias.float() @ directions
    if wanted.shape != found.shape:
        return False
    size = max(t.abs().amax().item() if t.numel() else 0.0 for t in (wanted, found))
    off, whole = (torch.linalg.vector_norm(t / size) for t in (found - wanted, wanted))
    # Numbers that are not finite pass here: `probe` reports them.
    is_fine = _digits(weight) < torch.finfo(torch.bfloat16).eps
    return not bool(off > (FINE_TOLERANCE if is_fine else TOLERANCE) * whole)


def _weight(part: nn.Module, kind: type[nn.Module]) -> Tensor:
    """Returns the weight that a module of this class reads, also through a parametrization."""
    read = getattr(kind, "weight", None)
    if isinstance(read, property):
        assert read.fget is not None
        weight = read.fget(part)
    else:
        weight = part._parameters["weight"]
    assert isinstance(weight, Tensor)
    return weight
