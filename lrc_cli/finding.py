"""Which stored tensors are weights of layers that can be factorised, and why the others are not.

Layers are found by what they are (a module of a known layout that owns its weight), never by a
model's name.
"""

from dataclasses import dataclass

from torch import nn

from lrc_cli.checkpoint.source import Source
from lrc_cli.config import Compression
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
    owners = _owners(module)
    layers = [
        Layer(
            name=name,
            key=keys[f"{name}.weight"].removesuffix(".weight"),
            kind=type(part).__name__,
            shape=shape,
            layout=layout,
            dtype=source.tensors[keys[f"{name}.weight"]].dtype,
            unit=_unit(name, module),
        )
        for name, part in module.named_modules()
        if (layout := layout_of(part))
        and (shape := _shape(part, owners))
        and f"{name}.weight" in keys
        and selection.selects(name)
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
    if tensor.numel() == max(tensor.shape, default=1):
        return "a vector"
    if owners.get(id(tensor), 1) > 1:
        return "shared by several modules; not in this version"
    if _shape(part, owners) is not None and leaf == "weight":
        return "left out by include and exclude"
    if getattr(part, "groups", 1) > 1:
        return "a grouped convolution: its kernels are small already"
    if tensor.ndim == 3 and hasattr(part, "num_experts"):
        return "experts that the checkpoint holds as one tensor; not in this version"
    if isinstance(part, nn.RNNBase):
        return f"a matrix of {type(part).__name__}; not in this version"
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
