"""From a checkpoint's headers to slots in a dense module tree, and on to run-time modules."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from lrc_cli.checkpoint.headers import UPGRADE, TensorInfo
from lrc_cli.errors import InputError
from lrc_cli.network.disk_names import module_names
from lrc_cli.network.embeddings import lookup_scale
from lrc_cli.network.keys import BIAS, PERM, UP, WEIGHT, Keys
from lrc_cli.network.layouts import Layout, Lookup, Table, layout_of, linear_shape, table_layout
from lrc_cli.network.low_rank.modules import (
    LowRankLayer,
    LowRankModule,
    LowRankSlot,
    is_offloaded,
    low_rank_layers,
    replace_modules,
)
from lrc_cli.network.low_rank.shapes import FactorShapes, damaged
from lrc_cli.network.low_rank.tied import Tied, TiedEmbedding, TiedHead


def factorised_weights(headers: Mapping[str, TensorInfo]) -> list[str]:
    """Disk names of the inner factors, by what lies beside them."""
    ups = [key for key in headers if key.endswith(f".{UP}")]
    return [Keys.of(key.removesuffix(f".{UP}"), headers).weight for key in ups]


def find_factors(model: nn.Module, headers: Mapping[str, TensorInfo]) -> dict[str, FactorShapes]:
    """Module name -> shapes, for each layer that is factorised on disk and that the model has.

    Args:
        model: the dense module tree.
        headers: the checkpoint's.

    Raises:
        InputError: where a layer has no inner factor, or a permutation that is not int32.
    """
    weights = factorised_weights(headers)
    names = module_names(model, weights)
    modules = dict(model.named_modules(remove_duplicate=False))
    factors = {}
    for weight in weights:
        name = Keys(names.get(weight, "")).layer
        # A dense model may have a part of its own that is called `up`.
        if name and f"{name}.up" not in modules:
            factors[name] = _factor_shapes(Keys(weight), headers)
    return factors


def _factor_shapes(keys: Keys, headers: Mapping[str, TensorInfo]) -> FactorShapes:
    """One layer's shapes from the headers."""
    layer, weight, perm = keys.layer, headers.get(keys.weight), headers.get(keys.perm)
    if weight is None:
        raise damaged(f"layer {layer}: {keys.weight} is missing")
    if perm is not None and perm.dtype != torch.int32:
        raise damaged(f"layer {layer}: perm is stored as {perm.dtype}, not as int32")
    shapes = weight.shape, headers[keys.up].shape
    if any(len(shape) < 2 for shape in shapes):
        raise damaged(
            f"layer {layer}: factors of shape {shapes[0]} and {shapes[1]} are no matrices"
        )
    return FactorShapes(
        name=layer,
        weight=shapes[0],
        up=shapes[1],
        perm=None if perm is None else perm.shape,
        bias=keys.bias in headers,
    )


def check_table(model: nn.Module, table: Mapping[str, Mapping[str, Any]]) -> None:
    """Checks a checkpoint's layer table against the slots that its tensors' shapes asked for.

    They are compared by module name, because a model saved again as another class has other disk
    names. Entries for layers that this model does not have are passed over.

    Args:
        model: the module tree with slots.
        table: disk name -> storage, rank, block; empty: there is none, and nothing to check.

    Raises:
        InputError: naming the first layer for which the two differ.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    stated = set()
    names = module_names(model, [*table, *(Keys.of(layer, ()).weight for layer in table)])
    for key, name in names.items():
        layer, module = Keys(key).layer, modules.get(Keys(name).layer)
        if not isinstance(module, LowRankLayer):
            raise damaged(f"layer {layer}: {Keys(key).up} is missing")
        _check_entry(layer, table[layer], module.table_entry())
        stated.add(module)
    for name, module in low_rank_layers(model):
        if table and module not in stated:
            raise damaged(f"layer {name} is factorised, and the layer table does not say so")


def _check_entry(layer: str, stated: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Compares one entry; the block says something of interpolative storage only."""
    for key in ("storage", "rank", "block"):
        if stated.get(key) != found[key] and found[key] is not None:
            raise damaged(
                f"layer {layer}: the layer table says {key} {stated.get(key)}, "
                f"its tensors say {found[key]}"
            )


def insert_slots(
    model: nn.Module, factors: Mapping[str, FactorShapes], stored: Collection[str] = ()
) -> None:
    """Puts a slot in the place of each named dense layer, on that layer's device and in its dtype.

    Args:
        model: the dense module tree, usually on the meta device; changed in place.
        factors: module name -> shapes of its tensors.
        stored: the model's tensors that the checkpoint holds. A head among them is not tied,
            whatever the config says.

    Raises:
        InputError: where the module is no linear layer, or the shapes do not make its matrix.
    """
    slots: dict[nn.Module, nn.Module] = {}
    for name, shapes in factors.items():
        dense = model.get_submodule(name)
        layout, shape = layout_of(dense), linear_shape(dense)
        if isinstance(dense, nn.Embedding) and shapes.out_features == dense.num_embeddings:
            layout, shape = table_layout(dense), (dense.num_embeddings, dense.embedding_dim)
        if layout is None or shape is None:
            raise InputError(
                f"layer {shapes.name} is factorised, and {type(dense).__name__} cannot be",
                UPGRADE,
            )
        slots[dense] = slot = _slot(dense, shapes, layout, shape)
        if isinstance(layout, Table | Lookup):
            slots |= {part: _tied(part, slot) for part in _untied(model, name, stored)}
    replace_modules(model, slots)


def _untied(model: nn.Module, table: str, stored: Collection[str]) -> list[nn.Module]:
    """The modules to whose weight transformers would tie the table's after loading: no more."""
    ties = getattr(model, "all_tied_weights_keys", {})
    source = ties.get(f"{table}.weight", f"{table}.weight")
    group = {source, *(key for key in ties if ties[key] == source)}
    for key in group & {*ties}:
        del ties[key]
    names = (key.rpartition(".") for key in sorted(group - {*stored}))
    parts = (model.get_submodule(name) for name, _, parameter in names if parameter == "weight")
    return [part for part in parts if part is not model.get_submodule(table)]


def _tied(part: nn.Module, slot: LowRankSlot) -> Tied:
    scale = lookup_scale(part)
    if scale is not None:
        return TiedEmbedding(slot, scale)
    if slot.layout.picks_rows and isinstance(part, nn.Linear):
        return TiedHead(slot, part.bias)
    raise InputError(
        f"{type(part).__name__} would use the table of an embedding that was compressed without it",
        "load the class that was compressed, or compress the checkpoint of this one",
    )


def _slot(
    dense: nn.Module, shapes: FactorShapes, layout: Layout, shape: tuple[int, int]
) -> LowRankSlot:
    m, n = shape
    shapes.check(layout, m, n)
    return LowRankSlot(dense, shapes, layout, out_features=m, in_features=n)


def low_rank_module(
    replaced: nn.Module,
    tensors: Mapping[str, torch.Tensor],
    layout: Layout,
    shape: tuple[int, int],
) -> LowRankModule:
    """The run-time form of one layer, holding the given tensors.

    Args:
        replaced: the module whose place it will take, for the mode it is in.
        tensors: by their names below the layer: weight, up.weight, perm and bias; the last two may
            be missing.
        layout: of the dense layer.
        shape: (m, n) of its matrix.

    Raises:
        InputError: where the tensors do not fit one another.
    """
    perm = tensors.get(PERM)
    shapes = FactorShapes(
        name="",
        weight=tuple(tensors[WEIGHT].shape),
        up=tuple(tensors[UP].shape),
        perm=None if perm is None else tuple(perm.shape),
        bias=BIAS in tensors,
    )
    slot = _slot(replaced, shapes, layout, shape)
    slot.load_state_dict(dict(tensors), assign=True)
    return LowRankModule(slot)


def finish_slots(model: nn.Module) -> None:
    """Turns every slot whose tensors are in memory into its run-time form, sharing the tensors.

    Raises:
        InputError: where a tensor has the wrong shape or a permutation is none.
    """
    finished: dict[nn.Module, Any] = {}
    for name, layer in low_rank_layers(model):
        if isinstance(layer, LowRankSlot) and not is_offloaded(layer):
            layer.check(name)
            finished[layer] = LowRankModule(layer)
    for part in model.modules():
        if isinstance(part, Tied):
            part.share(finished.get(part.table, part.table))
    replace_modules(model, finished)
