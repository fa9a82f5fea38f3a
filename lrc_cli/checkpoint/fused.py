"""A fused tensor holds a matrix, or a bias, for each expert of a layer; it is taken apart here.

Each expert is factorised alone, so each expert's matrix counts as a tensor. The written checkpoint
has a tensor for each expert, and a mark under the fused tensor's key. The mark is a vector: the
rank of every expert, 0 for a dense expert and NO_RANK for a form without a rank. No fused tensor is
a vector, so a loader that does not know the format fails.
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
    """A `Fused` says how a fused tensor is taken apart."""

    experts: str
    """The module of the experts, whose entries are numbered."""
    part: str
    """The name of a part of the tensor below its expert, e.g. `down_proj.weight`."""
    is_transposed: bool = False
    """Whether each expert's matrix lies transposed in the fused tensor."""

    @property
    def has_mark(self) -> bool:
        """Whether ranks are written in the tensor's place: only for matrices."""
        return self.part.endswith("weight")

    def keys(self, num_experts: int) -> list[str]:
        """Returns the keys of the parts, in order."""
        return [f"{self.experts}.{index}.{self.part}" for index in range(num_experts)]

    def info(self, whole: TensorInfo) -> TensorInfo:
        """Returns the shape, dtype and file of each part; all parts are alike."""
        shape = whole.shape[:0:-1] if self.is_transposed else whole.shape[1:]
        return TensorInfo(file=whole.file, shape=shape, dtype=whole.dtype)

    def take(self, whole: Tensor, index: int) -> Tensor:
        """Returns a part of the tensor, as a view."""
        return whole[index].T if self.is_transposed else whole[index]


def is_mark(info: TensorInfo) -> bool:
    """Returns whether a stored tensor is a mark: ranks in the place of a fused tensor."""
    return len(info.shape) == 1 and info.dtype == MARK_DTYPE
