"""A reader for each form of storage reads a layer back, by the words of docs/format.md.

The readers share no code with the writers. A layer in a form without a reader is *not checked*.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Container, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

WEIGHT, UP, PERM = "weight", "up.weight", "perm"

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape | None]
"""A layer's tensors by their names below the layer; None: there is no such tensor."""


class Reader(ABC):
    """Reads one form."""

    tensors: ClassVar[tuple[str, ...]]
    """The names of the tensors below the layer."""
    uncounted: ClassVar[tuple[str, ...]] = ()
    """The tensors whose entries are no parameters."""

    @abstractmethod
    def problem(self, shapes: Shapes) -> str | None:
        """Returns what is wrong with a layer's shapes; None where they fit one another."""

    def numbers_problem(self, tensors: Mapping[str, Tensor]) -> str | None:
        """Returns what is wrong with a layer's numbers; None where nothing is."""
        return None

    @abstractmethod
    def entry(self, shapes: Shapes) -> dict[str, Any]:
        """Returns what the layer table must say of tensors with these shapes, which must fit."""

    @abstractmethod
    def shape(self, shapes: Shapes) -> list[int]:
        """Returns [m, n] of the matrix."""

    @abstractmethod
    def dense(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Returns Z (m, n), float64."""


class TwoFactors(Reader):
    """Reads Z = up @ weight, with weight (r, n) and up (m, r); a convolution's are unrolled."""

    name: ClassVar[str] = "factors"
    tensors: ClassVar[tuple[str, ...]] = (WEIGHT, UP)

    def problem(self, shapes: Shapes) -> str | None:
        """Returns why the factors cannot be multiplied; None where they can."""
        weight, up = shapes[WEIGHT], shapes[UP]
        if weight is None or up is None:
            return f"the tensor {WEIGHT if weight is None else UP} is missing"
        if len(weight) < 2 or len(weight) != len(up) or set(up[2:]) - {1} or weight[0] != up[1]:
            return f"factors of shape {weight} and {up} cannot be multiplied"
        return None

    def entry(self, shapes: Shapes) -> dict[str, Any]:
        """Returns the form and the rank."""
        return {"storage": self.name, "rank": _known(shapes, WEIGHT)[0], "block": None}

    def shape(self, shapes: Shapes) -> list[int]:
        """Returns [m, n]; a convolution's columns are what its kernel covers in all channels."""
        return [_known(shapes, UP)[0], math.prod(_known(shapes, WEIGHT)[1:])]

    def dense(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Returns up @ weight."""
        inner, outer = (tensors[name].double().flatten(1) for name in (WEIGHT, UP))
        return outer @ inner


class Interpolative(TwoFactors):
    """Reads c = (weight, up @ weight) as slabs of m / len(perm) rows.

    Slab i of Z is slab perm[i] of c.
    """

    name = "interpolative"
    tensors = (WEIGHT, UP, PERM)
    uncounted = (PERM,)

    def problem(self, shapes: Shapes) -> str | None:
        """As for two factors; the permutation must cut rows and rank into whole groups."""
        problem = super().problem(shapes)
        if problem is not None:
            return problem
        perm, rank, (rows, _) = _known(shapes, PERM), _known(shapes, WEIGHT)[0], self.shape(shapes)
        if len(perm) != 1 or not perm[0] or rows % perm[0]:
            return f"a permutation of shape {perm} does not divide {rows} rows"
        if rank % (rows // perm[0]):
            return f"rank {rank} is not whole blocks of {rows // perm[0]}"
        return None

    def numbers_problem(self, tensors: Mapping[str, Tensor]) -> str | None:
        """Returns why `perm` is no permutation; None where it is."""
        perm = tensors[PERM]
        if perm.dtype != torch.int32:
            return f"the permutation is stored as {perm.dtype}"
        wanted = set(range(len(perm)))
        return None if set(perm.tolist()) == wanted else "perm is not a permutation"

    def entry(self, shapes: Shapes) -> dict[str, Any]:
        """Returns the form, the rank, and the number of rows in a group of the permutation."""
        block = self.shape(shapes)[0] // _known(shapes, PERM)[0]
        return super().entry(shapes) | {"block": block}

    def shape(self, shapes: Shapes) -> list[int]:
        """Returns [m, n]; the chosen rows count too."""
        others, n = super().shape(shapes)
        return [others + _known(shapes, WEIGHT)[0], n]

    def dense(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Returns Z: the slabs in their order."""
        inner = tensors[WEIGHT].double().flatten(1)
        slabs = torch.cat((inner, super().dense(tensors))).chunk(len(tensors[PERM]))
        return torch.cat([slabs[index] for index in tensors[PERM].tolist()])


READERS: dict[str, TwoFactors] = {form.name: form for form in (TwoFactors(), Interpolative())}
"""The readers by the form's name in a layer table."""
TENSORS = tuple(dict.fromkeys(name for form in READERS.values() for name in form.tensors))
"""The names of the tensors of all these forms below a layer."""
UNCOUNTED = tuple(name for form in READERS.values() for name in form.uncounted)
"""The tensors whose entries are no parameters."""


def is_read(storage: object) -> bool:
    """Returns whether `lrc verify` knows a form; dense layers are read as they are."""
    return storage == "dense" or storage in READERS


def unread(storage: object) -> str:
    """Returns why nothing is said of a layer in a form that has no reader."""
    return f"lrc verify cannot read storage {storage}"


def reader_of(names: Container[str]) -> TwoFactors:
    """Returns the reader that a layer's tensors ask for by name, even where a table disagrees."""
    return READERS["interpolative" if PERM in names else "factors"]


def table_problem(shapes: Shapes, entry: Mapping[str, Any]) -> str | None:
    """Returns what is wrong with a layer's shapes, given its table entry; None where they fit."""
    reader = reader_of({name for name, shape in shapes.items() if shape is not None})
    problem = reader.problem(shapes)
    if problem is not None:
        return problem
    stated, found = {k: entry.get(k) for k in ("storage", "rank", "block")}, reader.entry(shapes)
    if stated != found:
        return f"the table says {stated}, the tensors {found}"
    rank, (rows, _) = found["rank"], reader.shape(shapes)
    return None if 0 < rank < rows else f"rank {rank} is not below {rows} rows"


def _known(shapes: Shapes, name: str) -> Shape:
    shape = shapes[name]
    assert shape is not None
    return shape
