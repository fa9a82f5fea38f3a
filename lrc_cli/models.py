"""A checkpoint as a network that runs: its module, its compressible layers, its units.

Layers are found by what they are (an `nn.Linear` that owns its weight), never by a model's name.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lrc_cli.calibration import Batch
from lrc_cli.checkpoint.source import Source
from lrc_cli.config import Compression
from lrc_cli.errors import InputError
from lrc_cli.layers import linear_shape
from lrc_cli.loading import load
from lrc_cli.names import module_names
from lrc_cli.placement import Placement
from lrc_cli.precision import LiveCasts, cast_on_read, fast_dtype


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A linear layer that can be factorised: y = W x + b with W of shape (m, n)."""

    name: str
    """Module name in the running network."""
    key: str
    """Prefix of its tensors on disk: `key + ".weight"`."""
    kind: str
    """Class of the dense module."""
    shape: tuple[int, int]
    """(m, n), whatever the orientation on disk."""
    dtype: torch.dtype
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
        """The dense weight (m, n): a view of the mapped file."""
        stored = source.read(f"{self.key}.weight")
        # GPT-2's Conv1D stores (n, m); nothing but the class tells for a square matrix.
        return stored.T if self.kind == "Conv1D" else stored

    def bias(self, source: Source) -> torch.Tensor | None:
        """The bias (m,): a view of the mapped file; None where the layer has none."""
        key = f"{self.key}.bias"
        return source.read(key) if key in source.tensors else None


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A stored tensor that stays as it is, and why."""

    name: str
    reason: str
    num_bytes: int


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
        """Number of token ids the network takes."""
        module: Any = self.module
        return int(module.get_input_embeddings().num_embeddings)

    def __call__(self, batch: Batch) -> Any:
        """Run a micro-batch; floating-point inputs are converted to the network's dtype."""
        inputs = {
            name: tensor.to(self.device, self.dtype if tensor.is_floating_point() else None)
            for name, tensor in batch.items()
        }
        if not hasattr(self.module, "config") and len(inputs) == 1:
            return self.module(*inputs.values())
        return self.module(**inputs)


def open_module(
    source: Source, *, factory: str | None, trust_remote_code: bool = False
) -> nn.Module:
    """Build the checkpoint's module on the CPU, its parameters views of the mapped files."""
    if source.config is None and factory is None:
        raise InputError(
            f"{source.path}: not a transformers directory (it has no config.json)",
            "set model.factory to the function that builds the module",
        )
    return load(source.path, factory=factory, trust_remote_code=trust_remote_code)


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


def find_layers(
    module: nn.Module, source: Source, selection: Compression
) -> tuple[list[Layer], list[Skipped]]:
    """Every compressible layer in order, and every other stored tensor with the reason.

    Must see the module as it was built, before `make_network`.
    """
    names = module_names(module, source.tensors)
    keys = {name: key for key, name in names.items()}
    owners = _owners(module)
    layers = [
        Layer(
            name=name,
            key=keys[f"{name}.weight"].removesuffix(".weight"),
            kind=type(part).__name__,
            shape=shape,
            dtype=source.tensors[keys[f"{name}.weight"]].dtype,
            unit=_unit(name, module),
        )
        for name, part in module.named_modules()
        if (shape := _shape(part, owners)) and f"{name}.weight" in keys and selection.selects(name)
    ]
    taken = {f"{layer.key}.weight" for layer in layers}
    skipped = [
        Skipped(
            name=key,
            reason=_reason(module, names.get(key), owners, selection),
            num_bytes=info.num_bytes,
        )
        for key, info in source.tensors.items()
        if key not in taken
    ]
    return layers, skipped


def _owners(module: nn.Module) -> dict[int, int]:
    """How many modules hold each parameter, by id."""
    count: dict[int, int] = {}
    for part in module.modules():
        for parameter in part.parameters(recurse=False):
            count[id(parameter)] = count.get(id(parameter), 0) + 1
    return count


def _shape(part: nn.Module, owners: dict[int, int]) -> tuple[int, int] | None:
    """(m, n) of a layer that can be factorised and owns its weight alone, else None."""
    shape = linear_shape(part)
    return shape if shape is not None and owners[id(part.weight)] == 1 else None


def _reason(
    module: nn.Module, name: str | None, owners: dict[int, int], selection: Compression
) -> str:
    if name is None:
        return "the network has no place for it"
    parent, _, leaf = name.rpartition(".")
    part = module.get_submodule(parent)
    tensor = getattr(part, leaf)
    if tensor.ndim < 2:
        return "a vector"
    if owners.get(id(tensor), 1) > 1:
        return "shared by several modules; not in this version"
    if _shape(part, owners) is None:
        return f"{type(part).__name__}; not in this version"
    return "left out by include and exclude" if not selection.selects(parent) else "not a weight"


def _unit(name: str, module: nn.Module) -> str:
    """The entry of the outermost ModuleList on the way to `name`, or the empty string."""
    part, path = module, ""
    for piece in name.split("."):
        parent, part = part, part.get_submodule(piece)
        path = f"{path}.{piece}" if path else piece
        if isinstance(parent, nn.ModuleList):
            return path
    return ""


@contextmanager
def hooked(
    network: Network,
    layers: Sequence[Layer],
    hook: Callable[[Layer, torch.Tensor, torch.Tensor], Any],
) -> Iterator[None]:
    """Within it, `hook(layer, input, output)` runs after each layer; a tensor it returns replaces
    the output."""

    def attach(layer: Layer) -> Any:
        return network.module.get_submodule(layer.name).register_forward_hook(
            lambda _, inputs, named, output: hook(layer, [*inputs, *named.values()][0], output),
            with_kwargs=True,
        )

    handles = [attach(layer) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def input_groups(network: Network, layers: Sequence[Layer], batch: Batch) -> dict[str, str]:
    """Which layers read the very same input tensor, seen in one forward pass.

    Returns:
        {layer name: name of the first layer with the same input}; layers that were not reached
        are absent.
    """
    seen: dict[str, list[tuple[int, ...]]] = {}
    alive = []  # a tensor that was freed could lend its address to another one

    def look(layer: Layer, x: torch.Tensor, _: torch.Tensor) -> None:
        alive.append(x)
        # The version tells a tensor from itself after a change in place.
        identity = (x.data_ptr(), x._version, *x.shape, *x.stride())
        seen.setdefault(layer.name, []).append(identity)

    with torch.no_grad(), hooked(network, layers, look):
        network(batch)
    # A layer may be called several times: only the same inputs in every call are one group.
    first: dict[tuple[tuple[int, ...], ...], str] = {}
    return {name: first.setdefault(tuple(calls), name) for name, calls in seen.items()}


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
