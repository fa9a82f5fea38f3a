"""How each form of storage is read back, by the words of docs/format.md and without the code that
wrote it. What is stored in a form that has no reader here is *not checked*.
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
"""By the names below the layer; None: there is no such tensor."""


class Reader(ABC):
    """One form."""

    tensors: ClassVar[tuple[str, ...]]
    """What the tensors are called below the layer."""
    uncounted: ClassVar[tuple[str, ...]] = ()
    """The tensors whose entries are no parameters."""

    @abstractmethod
    def problem(self, shapes: Shapes) -> str | None:
        """What is wrong with a layer's shapes; None where they fit one another."""

    def numbers_problem(self, tensors: Mapping[str, Tensor]) -> str | None:
        """What is wrong with a layer's numbers."""
        return None

    @abstractmethod
    def entry(self, shapes: Shapes) -> dict[str, Any]:
        """What the layer table must say of tensors of these shapes, which fit one another."""

    @abstractmethod
    def shape(self, shapes: Shapes) -> list[int]:
        """[m, n] of the matrix."""

    @abstractmethod
    def dense(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Z (m, n), float64."""


class TwoFactors(Reader):
    """Z = up @ weight, with weight (r, n) and up (m, r); a convolution's are those, unrolled."""

    name: ClassVar[str] = "factors"
    tensors: ClassVar[tuple[str, ...]] = (WEIGHT, UP)

    def problem(self, shapes: Shapes) -> str | None:
        """The factors can be multiplied, and r is below m."""
        weight, up = shapes[WEIGHT], shapes[UP]
        if weight is None or up is None:
            return f"the tensor {WEIGHT if weight is None else UP} is missing"
        if len(weight) < 2 or len(weight) != len(up) or set(up[2:]) - {1} or weight[0] != up[1]:
            return f"factors of shape {weight} and {up} cannot be multiplied"
        return None

    def entry(self, shapes: Shapes) -> dict[str, Any]:
        """The form and the rank."""
        return {"storage": self.name, "rank": _known(shapes, WEIGHT)[0], "block": None}

    def shape(self, shapes: Shapes) -> list[int]:
        """A convolution's columns are what its kernel covers in all channels."""
        return [_known(shapes, UP)[0], math.prod(_known(shapes, WEIGHT)[1:])]

    def dense(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """up @ weight."""
        inner, outer = (tensors[name].double().flatten(1) for name in (WEIGHT, UP))
        return outer @ inner


class Interpolative(TwoFactors):
    """c is (weight, up @ weight) as m / block slabs of rows; slab i of Z is slab perm[i] of c."""

    name = "interpolative"
    tensors = (WEIGHT, UP, PERM)
    uncounted = (PERM,)

    def problem(self, shapes: Shapes) -> str | None:
        """As for two factors; the permutation makes whole blocks of the rows and of the rank."""
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
        """`perm` is a permutation."""
        perm = tensors[PERM]
        if perm.dtype != torch.int32:
            return f"the permutation is stored as {perm.dtype}"
        wanted = set(range(len(perm)))
        return None if set(perm.tolist()) == wanted else "perm is not a permutation"

    def entry(self, shapes: Shapes) -> dict[str, Any]:
        """The form, the rank, and the rows that the permutation moves together."""
        block = self.shape(shapes)[0] // _known(shapes, PERM)[0]
        return super().entry(shapes) | {"block": block}

    def shape(self, shapes: Shapes) -> list[int]:
        """The chosen rows count too."""
        others, n = super().shape(shapes)
        return [others + _known(shapes, WEIGHT)[0], n]

    def dense(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The slabs in their order."""
        inner = tensors[WEIGHT].double().flatten(1)
        slabs = torch.cat((inner, super().dense(tensors))).chunk(len(tensors[PERM]))
        return torch.cat([slabs[index] for index in tensors[PERM].tolist()])


READERS: dict[str, TwoFactors] = {form.name: form for form in (TwoFactors(), Interpolative())}
"""By what a layer table calls the form."""
TENSORS = tuple(dict.fromkeys(name for form in READERS.values() for name in form.tensors))
"""What the tensors of all these forms are called below a layer."""
UNCOUNTED = tuple(name for form in READERS.values() for name in form.uncounted)
"""The tensors whose entries are no parameters."""


def is_read(storage: object) -> bool:
    """Whether `lrc verify` knows a form; dense layers are read as they are."""
    return storage == "dense" or storage in READERS


def unread(storage: object) -> str:
    """Why nothing is said of a layer in a form that has no reader."""
    return f"lrc verify cannot read storage {storage}"


def reader_of(names: Container[str]) -> TwoFactors:
    """The reader that the names of a layer's tensors ask for, whatever a table says."""
    return READERS["interpolative" if PERM in names else "factors"]


def table_problem(shapes: Shapes, entry: Mapping[str, Any]) -> str | None:
    """What is wrong with a layer's shapes, given its table entry; None where they fit."""
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
