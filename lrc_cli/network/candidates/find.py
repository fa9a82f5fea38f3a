"""This module finds the layers that can be factorised, and the reason for every other tensor.

A layer is a module of a known layout that owns its weight; no model's name decides.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from lrc_cli.checkpoint.source import Source
from lrc_cli.config import Compression, matches
from lrc_cli.network.disk_names import converted, module_names
from lrc_cli.network.embeddings import lookup_scale, only_scales
from lrc_cli.network.keys import Keys
from lrc_cli.network.layer import Layer
from lrc_cli.network.layouts import Lookup, layout_of, linear_shape, table_layout
from lrc_cli.network.opening import token_embedding

CONVERTED = "transformers merges or splits it as it loads the model; not in this version"


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A stored tensor that stays as it is, with the reason."""

    name: str
    reason: str
    num_bytes: int


def find_layers(
    module: nn.Module, source: Source, selection: Compression
) -> tuple[list[Layer], list[Skipped]]:
    """Returns every compressible layer in order, and every other stored tensor with the reason.

    Args:
        module: the dense network as it was built, before `make_network`.
        source: the checkpoint as the module sees it.
        selection: what `compression` includes and excludes.
    """
    # A tensor belongs to the module whose parameter it fills.
    names = module_names(module, source.tensors)
    owners, state = _owners(module), module.state_dict(keep_vars=True)
    stored = {id(state[name]): key for key, name in names.items()}
    table = _token_table(module)
    # All layers that can be factorised own their weight, alone or with an embedding.
    able = []
    for name, part in module.named_modules():
        layout, shape = layout_of(part), linear_shape(part)
        key = stored.get(id(getattr(part, "weight", None)))
        if layout is None or shape is None or key is None:
            continue
        alone = owners[id(part.weight)] == 1 and (part is table or not _is_table(part))
        tied_to = _tied_to(module, names[key], part, owners)
        if alone or tied_to:
            able.append(
                Layer(
                    name=name,
                    keys=Keys(key, stored.get(id(getattr(part, "bias", None)))),
                    kind=type(part).__name__,
                    shape=shape,
                    layout=layout,
                    dtype=source.tensors[key].dtype,
                    tied_to=tied_to,
                    unit=_unit(name, module),
                )
            )
    # The config may leave some of these layers out.
    head = _head_name(module)
    reasons = {layer.keys.weight: _left_out(layer, selection, head) for layer in able}
    layers = [layer for layer in able if reasons[layer.keys.weight] is None]
    taken = {layer.keys.weight for layer in layers}
    # All other tensors get a reason: the config, the module, or that the module has no such tensor.
    without = dict.fromkeys(source.tensors, "the network has no place for it")
    without |= dict.fromkeys(converted(module, source.tensors), CONVERTED)
    skipped = [
        Skipped(
            name=key,
            reason=reasons.get(key)
            or (_reason(module, names[key], state, owners) if key in names else without[key]),
            num_bytes=info.num_bytes,
        )
        for key, info in source.tensors.items()
        if key not in taken
    ]
    return layers, skipped


def _token_table(module: nn.Module) -> nn.Module | None:
    """Returns a transformers model's token embedding, if it does nothing but look rows up.

    A square table is left out: its shape would not tell which way round it was factorised.
    """
    table = token_embedding(module)
    if table is None or not _is_table(table) or not _does_as_it_says(table):
        return None
    return None if table.num_embeddings == table.embedding_dim else table


def _is_table(part: nn.Module) -> bool:
    return isinstance(layout_of(part), Lookup)


def _does_as_it_says(embedding: nn.Module) -> bool:
    scale = lookup_scale(embedding)
    return scale is not None and only_scales(embedding, scale)


def _tied_to(
    module: nn.Module, stored: str, part: nn.Module, owners: Mapping[int, int]
) -> str | None:
    """Returns the embedding's name, if only the embedding and the layer share the stored weight.

    Embeddings that do the same with a table are one module here. The weight must be tied by
    transformers, because only then does a loader tie it again.
    """
    name = stored.removesuffix(".weight")
    table = module.get_submodule(name)
    if not hasattr(module, "all_tied_weights_keys") or owners[id(part.weight)] != 2:
        return None
    if not isinstance(part, nn.Linear) or table_layout(table) is None:
        return None
    return name if _does_as_it_says(table) else None


def _head_name(module: nn.Module) -> str | None:
    """Returns the name of a transformers model's language-model head, or None."""
    getter = getattr(module, "get_output_embeddings", None)
    head = None if getter is None else getter()
    return next((name for name, part in module.named_modules() if part is head), None)


def _left_out(layer: Layer, selection: Compression, head: str | None) -> str | None:
    """Returns why a layer that can be factorised is left out; None: it is not left out."""
    if (layer.tied_to or isinstance(layer.layout, Lookup)) and not selection.embeddings:
        return "an embedding, and compression.embeddings is false"
    # A tied layer goes by the embedding's name, as on the disk.
    chosen = selection.selects(layer.tied_to or layer.name)
    # A pattern for "lm_head" means the head, also where the model calls the head otherwise.
    is_head = layer.name == head and layer.tied_to is None
    if is_head and any(matches(pattern, "lm_head") for pattern in selection.exclude):
        chosen = False
    return None if chosen else "left out by include and exclude"


def _owners(module: nn.Module) -> dict[int, int]:
    """Returns the number of modules that hold each parameter, by id."""
    count: dict[int, int] = {}
    for part in module.modules():
        for parameter in part.parameters(recurse=False):
            count[id(parameter)] = count.get(id(parameter), 0) + 1
    return count


def _reason(
    module: nn.Module, name: str, state: Mapping[str, Tensor], owners: Mapping[int, int]
) -> str:
    """Returns why a tensor is not the weight of a layer that can be factorised."""
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
    """Returns the entry of the outermost ModuleList on the way to `name`, or the empty string."""
    part, path = module, ""
    for piece in name.split("."):
        parent, part = part, part.get_submodule(piece)
        path = f"{path}.{piece}" if path else piece
        if isinstance(parent, nn.ModuleList):
            return path
    return ""
