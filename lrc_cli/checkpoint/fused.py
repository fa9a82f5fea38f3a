"""Tensors of a checkpoint that hold a matrix, or a bias, for each of a layer's experts.

Each expert is factorised on its own, so that its matrix is taken for a tensor of its own. What is
written has these tensors, and a mark under the fused tensor's key: the rank of every expert, 0 for
one that is dense. A vector never has a fused tensor's shape, so that a loader that does not know
the format fails.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lrc_cli.checkpoint.headers import TensorInfo
from lrc_cli.runtime.json_records import JsonRecord

MARK_DTYPE = torch.int32
NO_RANK = -1
"""The mark of an expert that is stored in a form without a rank."""


@dataclass(frozen=True, kw_only=True)
class Fused(JsonRecord):
    """How a fused tensor is taken apart."""

    experts: str
    """The module of the experts, whose entries are numbered."""
    part: str
    """The name of a part of the tensor below its expert, e.g. `down_proj.weight`."""
    is_transposed: bool = False
    """Whether each expert's matrix lies transposed in it."""

    @property
    def has_mark(self) -> bool:
        """Whether ranks are written in the tensor's place: only for matrices."""
        return self.part.endswith("weight")

    def keys(self, num_experts: int) -> list[str]:
        """The keys of the parts, in order."""
        return [f"{self.experts}.{index}.{self.part}" for index in range(num_experts)]

    def info(self, whole: TensorInfo) -> TensorInfo:
        """The header of each part."""
        shape = whole.shape[:0:-1] if self.is_transposed else whole.shape[1:]
        return TensorInfo(file=whole.file, shape=shape, dtype=whole.dtype)

    def take(self, whole: Tensor, index: int) -> Tensor:
        """A part of the tensor: a view."""
        return whole[index].T if self.is_transposed else whole[index]


def is_mark(info: TensorInfo) -> bool:
    """Whether ranks stand where a fused tensor stood."""
    return len(info.shape) == 1 and info.dtype == MARK_DTYPE
