"""A checkpoint as a network that runs, and its layers as hooks see them."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lrc_cli.checkpoint.source import Source
from lrc_cli.data.draw import Batch
from lrc_cli.errors import InputError
from lrc_cli.execution.placement import Placement
from lrc_cli.execution.precision import LiveCasts, cast_on_read, fast_dtype
from lrc_cli.network.embeddings import merge_tables
from lrc_cli.network.experts import unfuse
from lrc_cli.network.fused_experts import take_apart
from lrc_cli.network.keys import Keys
from lrc_cli.network.layouts import LINEAR, Layout
from lrc_cli.network.loading import load_source
from lrc_cli.network.recurrent import observed, unroll
from lrc_cli.network.tensor_checks import copies


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A linear layer that can be factorised: y = W x + b with W of shape (m, n)."""

    name: str
    """Module name in the running network."""
    keys: Keys
    """Names of its tensors on disk."""
    kind: str
    """Class of the dense module."""
    shape: tuple[int, int]
    """(m, n), whatever the layout on disk."""
    layout: Layout = LINEAR
    """How W lies in the weight, and rows in inputs and outputs."""
    dtype: torch.dtype
    tied_to: str | None = None
    """The embedding whose table its weight is; it is factorised with the layer."""
    unit: str
    """The block it belongs to: an entry of the outermost list of modules, or the empty string."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the dense weight as stored."""
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

    @property
    def solve_cost(self) -> float:
        """Of an eigenproblem on the small side, and products with the large one: multiplications.

        It grows with n^3.
        """
        small, large = sorted(self.shape)
        return float(small**3 * 4 + small * large * (small + large))

    def weight(self, source: Source) -> torch.Tensor:
        """The matrix W (m, n): a view of the mapped file."""
        return self.layout.matrix(source.read(self.keys.weight))

    def bias(self, source: Source) -> torch.Tensor | None:
        """The bias (m,): a view of the mapped file; None where the layer has none."""
        key = self.keys.bias
        return source.read(key) if key in source.tensors else None


@dataclass(frozen=True, kw_only=True)
class Network:
    """A module in evaluation mode whose parameters are views of the checkpoint's files."""

    module: nn.Module
    device: torch.device
    dtype: torch.dtype
    """Of activations."""
    casts: LiveCasts
    placement: Placement

    @property
    def vocabulary(self) -> int:
        """Number of token ids the network takes, 0 where it takes none."""
        return vocabulary_of(self.module)

    def __call__(self, batch: Batch) -> Any:
        """Run a micro-batch; floating-point inputs are converted to the network's dtype."""
        inputs = {
            name: tensor.to(self.device, self.dtype if tensor.is_floating_point() else None)
            for name, tensor in batch.items()
        }
        with observed(self.module, batch):
            if not hasattr(self.module, "config") and len(inputs) == 1:
                return self.module(*inputs.values())
            return self.module(**inputs)


def token_embedding(module: nn.Module) -> Any:
    """What maps a transformers model's token ids to vectors; None where nothing does, or may."""
    getter = getattr(module, "get_input_embeddings", None)
    try:
        return None if getter is None else getter()
    except NotImplementedError:  # a model of several inputs may have no one table
        return None


def vocabulary_of(module: nn.Module) -> int:
    """Number of token ids a transformers model takes; 0 where it takes none or does not tell."""
    return int(getattr(token_embedding(module), "num_embeddings", 0))


def open_module(
    source: Source, *, factory: str | None, trust_remote_code: bool = False
) -> nn.Module:
    """Build the checkpoint's module on the CPU, its parameters views of the mapped files.

    Fused experts become lists of experts; where the checkpoint holds their matrices one by one,
    transformers has copied them. The matrices of LSTM and GRU become layers, and embeddings with
    one table, which do the same with it, one module.
    """
    if source.config is None and factory is None:
        raise InputError(
            f"{source.path}: not a transformers directory (it has no config.json)",
            "set model.factory to the function that builds the module",
        )
    module = load_source(source, factory=factory, trust_remote_code=trust_remote_code)
    source.keep_once(copies(module, source))
    unfuse(module)
    if factory is None:
        source.take_apart(take_apart(module, source.weights.tensors))
    unroll(module)
    merge_tables(module)
    return module


def make_network(module: nn.Module, *, device: torch.device, dtype: torch.dtype | None) -> Network:
    """Prepare a module to run: frozen, in evaluation mode, on its device, in its dtype.

    Args:
        dtype: of activations; None picks the stored dtype where the device multiplies it natively.
    """
    module.requires_grad_(False).eval()
    if hasattr(module, "config") and hasattr(module.config, "use_cache"):
        module.config.use_cache = False
    stored = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    dtype = dtype or fast_dtype(device, stored)
    casts = cast_on_read(module, dtype)
    placement = Placement(module, device)
    return Network(module=module, device=device, dtype=dtype, casts=casts, placement=placement)


@contextmanager
def watched(
    network: Network,
    layers: Sequence[Layer],
    look: Callable[[Layer, torch.Tensor, torch.Tensor], Any],
) -> Iterator[None]:
    """Within it, `look(layer, x, y)` runs after each layer, on what it was given and has returned;
    what it returns replaces y, unless it is None."""

    def attach(layer: Layer) -> Any:
        return network.module.get_submodule(layer.name).register_forward_hook(
            lambda _, given, named, y: look(layer, [*given, *named.values()][0], y),
            with_kwargs=True,
        )

    handles = [attach(layer) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def hooked(
    network: Network,
    layers: Sequence[Layer],
    hook: Callable[[Layer, torch.Tensor, torch.Tensor], Any],
) -> Iterator[None]:
    """Within it, `hook(layer, inputs, outputs)` runs after each layer, on rows (..., n) and
    (..., m); rows that it returns replace the outputs."""

    def look(layer: Layer, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor | None:
        layout = layer.layout
        rows: torch.Tensor | None = hook(layer, layout.inputs(x), layout.outputs(y))
        if rows is None or layout.channels == -1:
            return rows
        # A change in place of a view would pass by the gradient's hooks on the rows.
        return layout.returned(rows).clone()

    with watched(network, layers, look):
        yield


@contextmanager
def grouping(network: Network, layers: Sequence[Layer]) -> Iterator[dict[str, str]]:
    """Sees, in what runs within it, which layers read the very same rows of one input tensor.

    Yields:
        Filled at the end: {layer name: name of the first layer with the same input}; layers that
        were not reached are absent.
    """
    groups: dict[str, str] = {}
    seen: dict[str, list[tuple[Any, ...]]] = {}
    alive = []  # a tensor that was freed could lend its address to another one

    def look(layer: Layer, x: torch.Tensor, _: torch.Tensor) -> None:
        alive.append(x)
        # The version tells a tensor from itself after a change in place, and the layout one
        # convolution's patches from another's.
        identity = (x.data_ptr(), x._version, *x.shape, *x.stride(), layer.layout)
        seen.setdefault(layer.name, []).append(identity)

    with watched(network, layers, look):
        yield groups
    # A layer may be called several times: only the same inputs in every call are one group.
    first: dict[tuple[tuple[Any, ...], ...], str] = {}
    groups |= {name: first.setdefault(tuple(calls), name) for name, calls in seen.items()}


def input_groups(network: Network, layers: Sequence[Layer], batch: Batch) -> dict[str, str]:
    """As `grouping`, of one forward pass."""
    with torch.no_grad(), grouping(network, layers) as groups:
        network(batch)
    return groups


def check_inputs(module: nn.Module, purpose: str, batch: Batch) -> None:
    """Raise InputError if the data does not offer what the module's forward needs."""
    parameters = inspect.signature(module.forward).parameters
    if len(batch) == 1 and not hasattr(module, "config"):
        # It is handed over by position, whatever its name.
        batch = dict(zip(parameters, batch.values(), strict=False))
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    unknown = sorted(set(batch) - set(parameters))
    if unknown and not takes_any:
        raise InputError(
            f"{purpose}: the data offers {unknown[0]!r}, which the model does not take",
            f"name the tensors after its inputs: {', '.join(parameters)}",
        )
    needed = [
        name
        for name, p in parameters.items()
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    missing = sorted(set(needed) - set(batch))
    if missing:
        raise InputError(
            f"{purpose}: the model needs the input {missing[0]!r}", "add it to the data"
        )
