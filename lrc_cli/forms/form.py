"""The interface of a form: what its tensors are called, and which matrix they stand for.

Loaders, run-time modules and writers ask the form. How a matrix becomes tensors of a form is
decided in engine/storage. `lrc verify` reads what was written with code of its own.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

from torch import Tensor

DENSE = "dense"
"""The form of a layer that stays as it is."""

WEIGHT = "weight"
"""The tensor under the dense weight's key.

Every form but dense writes it in another shape than the dense weight's, so that a loader which
knows no lrc fails.
"""


@dataclass(frozen=True, kw_only=True)
class Packed:
    """Holds the tensors of one layer as a form takes them (docs/format.md)."""

    form: str
    """The form's name in `FORMS`."""
    shape: tuple[int, int]
    """(m, n) of the matrix."""
    tensors: Mapping[str, Tensor]
    """The tensors by their names below the layer."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """The facts that the tensors' shapes need not say: the rank, rows per row group, bits ..."""

    @property
    def rank(self) -> int | None:
        """The rank r; None for a form without a rank."""
        return self.parameters.get("rank")

    @property
    def num_bytes(self) -> int:
        """The bytes of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def on_host(self) -> "Packed":
        """Returns the same in CPU memory."""
        return replace(self, tensors={name: x.cpu() for name, x in self.tensors.items()})


class Orientation(Protocol):
    """Says how a layer's matrices lie in its tensors: a `Layout` of network/layouts.py."""

    def inner(self, factor: Tensor) -> Tensor:
        """Returns the inner factor (r, n) as it is stored."""

    def outer(self, factor: Tensor) -> Tensor:
        """Returns the outer factor (m, r) as it is stored."""


class Form(ABC):
    """Describes one form of storage."""

    name: ClassVar[str]
    """The name in layer tables and reports."""
    tensors: ClassVar[tuple[str, ...]]
    """The names below the layer of all that the form writes; `weight` is one of them."""
    uncounted: ClassVar[tuple[str, ...]] = ()
    """The tensors whose entries are no parameters of the network."""
    table_keys: ClassVar[tuple[str, ...]] = ()
    """The parameters that a checkpoint's layer table states."""

    @abstractmethod
    def dense(self, packed: Packed) -> Tensor:
        """Returns the matrix Z (m, n) that the tensors stand for, float64."""

    def on_disk(self, packed: Packed, layout: Orientation) -> Mapping[str, Tensor]:
        """Returns the tensors as they are written."""
        return packed.tensors

    def table_entry(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what a checkpoint's layer table says of a layer with these parameters."""
        return {"storage": self.name, **{key: parameters[key] for key in self.table_keys}}

    def largest_coefficient(self, packed: Packed) -> float | None:
        """Returns the largest entry of T, for forms that have one."""
        return None
