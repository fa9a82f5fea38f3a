"""This module puts slots into a dense module tree, and turns loaded slots into run-time modules."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from lrc_cli.checkpoint.headers import UPGRADE, TensorInfo
from lrc_cli.errors import InputError
from lrc_cli.forms import DENSE, FORMS, PERM, UP, LowRank
from lrc_cli.network.disk_names import module_names
from lrc_cli.network.embeddings import lookup_scale
from lrc_cli.network.keys import BIAS, WEIGHT, Keys
from lrc_cli.network.layouts import Layout, Lookup, Table, layout_of, linear_shape, table_layout
from lrc_cli.network.low_rank.modules import LowRankModule, LowRankSlot
from lrc_cli.network.low_rank.shapes import FactorShapes, damaged
from lrc_cli.network.low_rank.stored import (
    FormLayer,
    FormTensors,
    StoredLayer,
    is_offloaded,
    replace_modules,
    stored_layers,
)
from lrc_cli.network.low_rank.tied import Tied, TiedEmbedding, TiedHead

Entries = Mapping[str, Mapping[str, Any]]
"""A checkpoint's layer table: disk name -> storage, and the form's parameters."""


def stored_weights(headers: Mapping[str, TensorInfo], table: Entries) -> list[str]:
    """Returns the disk names of the tensors that take a dense weight's place.

    The outer factor beside a tensor tells a low-rank layer; the layer table tells all other forms.
    """
    ups = [key.removesuffix(f".{UP}") for key in headers if key.endswith(f".{UP}")]
    others = [layer for layer, entry in table.items() if not _is_low_rank(layer, entry)]
    return [Keys.of(layer, headers).weight for layer in dict.fromkeys([*ups, *others])]


def check_stated(headers: Mapping[str, TensorInfo], table: Entries) -> None:
    """Checks that a layer table and the tensors of its checkpoint speak of the same layers.

    Raises:
        InputError: a layer of the table has no tensor, or there are factors and the table is empty.
    """
    below = {key.rpartition(".")[0] for key in headers} | set(headers)
    below |= {key.removesuffix(f".{UP}") for key in headers}
    ghost = next((layer for layer in table if layer not in below), None)
    if ghost is not None:
        raise damaged(f"layer {ghost}: the layer table names it, and no tensor is its")
    factors = (key.removesuffix(f".{UP}") for key in headers if key.endswith(f".{UP}"))
    hidden = next((x for x in factors if Keys.of(x, headers).weight in headers), None)
    if hidden is not None and not table:
        raise damaged(f"layer {hidden} is factorised, and the layer table is empty")


def _is_low_rank(layer: str, entry: Mapping[str, Any]) -> bool:
    """Returns whether an entry of the layer table has a rank.

    Raises:
        InputError: this version does not know the form.
    """
    form = FORMS.get(entry.get("storage", ""))
    if form is None:
        known = " and ".join(name for name in FORMS if name != DENSE)
        raise InputError(
            f"layer {layer} is stored as {entry.get('storage')}, and this lrc knows {known}",
            UPGRADE,
        )
    return isinstance(form, LowRank)


def find_stored(
    model: nn.Module, headers: Mapping[str, TensorInfo], table: Entries
) -> dict[str, FactorShapes | FormTensors]:
    """Returns the shapes, by module name, of the model's layers that are not dense on disk.

    Args:
        model: the dense module tree.
        headers: the checkpoint's headers.
        table: the checkpoint's layer table; it may be empty.

    Raises:
        InputError: a layer's form is unknown, a tensor is missing, or a permutation is not int32.
    """
    weights = stored_weights(headers, table)
    names = module_names(model, weights)
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[str, FactorShapes | FormTensors] = {}
    for weight in weights:
        name, keys = Keys(names.get(weight, "")).layer, Keys(weight)
        entry = table.get(keys.layer)
        if name and entry is not None and not _is_low_rank(keys.layer, entry):
            found[name] = _form_tensors(keys, headers, entry)
        # A dense model may have a part that is called `up`.
        elif name and f"{name}.up" not in modules:
            found[name] = _factor_shapes(keys, headers)
    return found


def _form_tensors(
    keys: Keys, headers: Mapping[str, TensorInfo], entry: Mapping[str, Any]
) -> FormTensors:
    """Reads a layer's tensors in a form without a rank from the headers."""
    form = FORMS[entry["storage"]]
    ends = (*form.tensors, BIAS)
    here = {end: headers[keys.key(end)] for end in ends if keys.key(end) in headers}
    missing = [end for end in form.tensors if end not in here]
    if missing:
        raise damaged(f"layer {keys.layer}: {keys.key(missing[0])} is missing")
    unstated = [key for key in form.table_keys if key not in entry]
    if unstated:
        raise damaged(f"layer {keys.layer}: the layer table does not say its {unstated[0]}")
    return FormTensors.of(keys.layer, form, entry, here)


def _factor_shapes(keys: Keys, headers: Mapping[str, TensorInfo]) -> FactorShapes:
    """Reads the shapes of a layer's factors from the headers."""
    layer, weight, perm = keys.layer, headers.get(keys.weight), headers.get(keys.key(PERM))
    if weight is None:
        raise damaged(f"layer {layer}: {keys.weight} is missing")
    if perm is not None and perm.dtype != torch.int32:
        raise damaged(f"layer {layer}: perm is stored as {perm.dtype}, not as int32")
    shapes = weight.shape, headers[keys.key(UP)].shape
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
    """Checks a checkpoint's layer table against the slots, which follow from the tensors' shapes.

    Layers are compared by module name, because a model that is saved again as another class has
    other disk names. Entries for layers that this model does not have are passed over.

    Args:
        model: the module tree with slots.
        table: disk name -> storage, rank, block; empty: there is nothing to check.

    Raises:
        InputError: the table and a slot differ; the message names the first such layer.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    stated = set()
    names = module_names(model, [*table, *(Keys.of(layer, ()).weight for layer in table)])
    for key, name in names.items():
        layer, module = Keys(key).layer, modules.get(Keys(name).layer)
        if not isinstance(module, StoredLayer):
            raise damaged(f"layer {layer}: {Keys(key).key(UP)} is missing")
        _check_entry(layer, table[layer], module.table_entry())
        stated.add(module)
    for name, module in stored_layers(model):
        if table and module not in stated:
            raise damaged(f"layer {name} is factorised, and the layer table does not say so")


def _check_entry(layer: str, stated: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Raises InputError if an entry differs; a None in `found` is not compared."""
    for key, value in found.items():
        if stated.get(key) != value and value is not None:
            raise damaged(
                f"layer {layer}: the layer table says {key} {stated.get(key)}, "
                f"its tensors say {value}"
            )


def insert_slots(
    model: nn.Module,
    found: Mapping[str, FactorShapes | FormTensors],
    stored: Collection[str] = (),
) -> None:
    """Puts a slot in the place of each named dense layer, with the layer's device and dtype.

    Args:
        model: the dense module tree, usually on the meta device; changed in place.
        found: the shapes of each layer's tensors, by module name.
        stored: the names of the model's tensors that the checkpoint holds. A head among these
            tensors is not tied, even if the config ties the head.

    Raises:
        InputError: the module is no linear layer, or the shapes do not make its matrix.
    """
    slots: dict[nn.Module, nn.Module] = {}
    for name, shapes in found.items():
        dense = model.get_submodule(name)
        layout, shape = layout_of(dense), linear_shape(dense)
        if isinstance(dense, nn.Embedding) and _is_table(model, name, dense, shapes):
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


def _is_table(
    model: nn.Module, name: str, embedding: nn.Embedding, found: FactorShapes | FormTensors
) -> bool:
    """Returns whether the matrix is the table, as for a tied head, and not its transpose."""
    if isinstance(found, FactorShapes):
        return found.out_features == embedding.num_embeddings
    ties = getattr(model, "all_tied_weights_keys", {})
    return f"{name}.weight" in {*ties, *ties.values()}


def _untied(model: nn.Module, table: str, stored: Collection[str]) -> list[nn.Module]:
    """Unties a table in `all_tied_weights_keys`, and returns the other modules of the tie.

    Otherwise transformers would tie their weights to the table after loading.
    """
    ties = getattr(model, "all_tied_weights_keys", {})
    source = ties.get(f"{table}.weight", f"{table}.weight")
    group = {source, *(key for key in ties if ties[key] == source)}
    for key in group & {*ties}:
        del ties[key]
    names = (key.rpartition(".") for key in sorted(group - {*stored}))
    parts = (model.get_submodule(name) for name, _, parameter in names if parameter == "weight")
    return [part for part in parts if part is not model.get_submodule(table)]


def _tied(part: nn.Module, slot: StoredLayer) -> Tied:
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
    dense: nn.Module, found: FactorShapes | FormTensors, layout: Layout, shape: tuple[int, int]
) -> LowRankSlot | FormLayer:
    """Returns the module that holds a layer's tensors while they load.

    In a form without a rank, the same module also runs.
    """
    m, n = shape
    if isinstance(found, FormTensors):
        return FormLayer(dense, found, layout, out_features=m, in_features=n)
    found.check(layout, m, n)
    return LowRankSlot(dense, found, layout, out_features=m, in_features=n)


def stored_module(
    replaced: nn.Module,
    tensors: Mapping[str, torch.Tensor],
    layout: Layout,
    shape: tuple[int, int],
    entry: Mapping[str, Any],
) -> StoredLayer:
    """Returns the run-time module of a layer, holding the given tensors.

    Args:
        replaced: the module whose place the new module will take; gives the training mode.
        tensors: the tensors, by their names below the layer.
        layout: the layout of the dense layer.
        shape: (m, n), the shape of the dense matrix.
        entry: the form and its parameters, as in a layer table.

    Raises:
        InputError: the tensors do not fit one another.
    """
    if _is_low_rank(str(replaced), entry):
        return low_rank_module(replaced, tensors, layout, shape)
    found = FormTensors.of("", FORMS[entry["storage"]], entry, tensors)
    module = _slot(replaced, found, layout, shape)
    module.load_state_dict(dict(tensors), assign=True)
    return module


def low_rank_module(
    replaced: nn.Module,
    tensors: Mapping[str, torch.Tensor],
    layout: Layout,
    shape: tuple[int, int],
) -> LowRankModule:
    """Returns the run-time module of a factorised layer (see `stored_module`).

    Args:
        replaced: the module whose place the new module will take; gives the training mode.
        tensors: weight, up.weight, perm and bias; perm and bias may be missing.
        layout: the layout of the dense layer.
        shape: (m, n), the shape of the dense matrix.

    Raises:
        InputError: the tensors do not fit one another.
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
    assert isinstance(slot, LowRankSlot)
    slot.load_state_dict(dict(tensors), assign=True)
    return LowRankModule(slot)


def finish_slots(model: nn.Module) -> None:
    """Turns every slot with its tensors in memory into a run-time module that shares the tensors.

    Raises:
        InputError: a tensor has the wrong shape, or `perm` is not a permutation.
    """
    finished: dict[nn.Module, Any] = {}
    for name, layer in stored_layers(model):
        if isinstance(layer, LowRankSlot) and not is_offloaded(layer):
            layer.check(name)
            finished[layer] = LowRankModule(layer)
    for part in model.modules():
        if isinstance(part, Tied):
            part.share(finished.get(part.table, part.table))
    replace_modules(model, finished)
