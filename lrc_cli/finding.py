"""Which stored tensors are weights of layers that can be factorised, and why the others are not.

Layers are found by what they are (a module of a known layout that owns its weight), never by a
model's name.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from lrc_cli.checkpoint.source import Source
from lrc_cli.config import Compression
from lrc_cli.keys import Keys
from lrc_cli.layouts import layout_of, linear_shape
from lrc_cli.models import Layer
from lrc_cli.names import module_names


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A stored tensor that stays as it is, and why."""

    name: str
    reason: str
    num_bytes: int


def find_layers(
    module: nn.Module, source: Source, selection: Compression
) -> tuple[list[Layer], list[Skipped]]:
    """Every compressible layer in order, and every other stored tensor with the reason.

    Must see the module as it was built, before `make_network`.
    """
    names = module_names(module, source.tensors)
    keys = {name: key for key, name in names.items()}
    owners, state = _owners(module), module.state_dict(keep_vars=True)
    able = []
    for name, part in module.named_modules():
        layout, shape = layout_of(part), _shape(part, owners)
        weight = Keys.of(name, state).weight
        if layout is not None and shape is not None and weight in keys:
            able.append(
                Layer(
                    name=name,
                    keys=Keys(keys[weight]),
                    kind=type(part).__name__,
                    shape=shape,
                    layout=layout,
                    dtype=source.tensors[keys[weight]].dtype,
                    unit=_unit(name, module),
                )
            )
    layers = [layer for layer in able if selection.selects(layer.name)]
    taken = {layer.keys.weight for layer in layers}
    reasons = {layer.keys.weight: "left out by include and exclude" for layer in able}
    skipped = [
        Skipped(
            name=key,
            reason=reasons.get(key) or _reason(module, names.get(key), state, owners),
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
    module: nn.Module, name: str | None, state: Mapping[str, Tensor], owners: Mapping[int, int]
) -> str:
    """Why a tensor is no layer's weight, or that of one that cannot be factorised."""
    if name is None:
        return "the network has no place for it"
    parent, _, leaf = name.rpartition(".")
    part, tensor = module.get_submodule(parent), state[name]
    if tensor.numel() == max(tensor.shape, default=1):
        return "a vector"
    if owners.get(id(tensor), 1) > 1:
        return "shared by several modules; not in this version"
    if getattr(part, "groups", 1) > 1:
        return "a grouped convolution: its kernels are small already"
    if tensor.ndim == 3 and hasattr(part, "num_experts"):
        return "experts that the checkpoint holds as one tensor; not in this version"
    if isinstance(part, nn.RNNBase):
        kind = type(part).__name__ + (" with proj_size" if part.proj_size else "")
        return f"a matrix of {kind}; not in this version"
    if isinstance(part, nn.Embedding):
        return "an embedding; not in this version"
    if leaf == "weight":
        return f"{type(part).__name__}; not in this version"
    return f"a parameter of {type(part).__name__}, no layer's weight"


def _unit(name: str, module: nn.Module) -> str:
    """The entry of the outermost ModuleList on the way to `name`, or the empty string."""
    part, path = module, ""
    for piece in name.split("."):
        parent, part = part, part.get_submodule(piece)
        path = f"{path}.{piece}" if path else piece
        if isinstance(parent, nn.ModuleList):
            return path
    return ""
