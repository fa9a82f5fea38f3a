"""How a layer's matrix W (m, n) lies in its weight, and its rows in what the layer is given.

A layer is y = W x + b for every row x, whatever its module calls it. A convolution is one too: its
rows are the patches under its kernel, n = channels * kernel, and m is its output channels. Nothing
else needs to know that: statistics, solvers and checks see W and rows.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lrc_cli.network.embeddings import PLAIN, Scale, lookup_scale, new_embedding


@dataclass(frozen=True)
class Layout:
    """`nn.Linear`'s: the weight is W, and rows lie along the last dimension."""

    picks_rows: ClassVar[bool] = False
    """Whether the module is given numbers of rows of W, and returns these."""

    @property
    def channels(self) -> int:
        """The dimension of an output that counts its m channels, from the end."""
        return -1

    def visible(self, m: int) -> Mapping[str, Any]:
        """Attributes of the dense module that a model may read, apart from its tensors."""
        return {}

    def matrix(self, weight: Tensor) -> Tensor:
        """W (m, n) from the dense weight: a view where it can be."""
        return weight

    def weight(self, matrix: Tensor) -> Tensor:
        """The dense weight from W (m, n)."""
        return matrix

    def inner(self, factor: Tensor) -> Tensor:
        """The inner factor (r, n) as it is stored."""
        return factor

    def outer(self, factor: Tensor) -> Tensor:
        """The outer factor (m, r), or T (m - r, r), as it is stored."""
        return factor

    def inputs(self, x: Tensor) -> Tensor:
        """The rows (..., n) of what the layer is given."""
        return x

    def outputs(self, y: Tensor) -> Tensor:
        """The rows (..., m) of what the layer returns: a view."""
        return y.movedim(self.channels, -1)

    def returned(self, rows: Tensor) -> Tensor:
        """What the layer returns, from its rows (..., m): the reverse of `outputs`."""
        return rows.movedim(-1, self.channels)

    def apply(self, x: Tensor, inner: Tensor) -> Tensor:
        """The inner factor, as stored, applied to what the layer is given: r channels."""
        return F.linear(x, inner)

    def inner_part(self, rank: int, n: int, **place: Any) -> nn.Module:
        """A plain module that applies the inner factor, uninitialised."""
        return nn.Linear(n, rank, bias=False, **place)

    def outer_part(self, rows: int, rank: int, **place: Any) -> nn.Module:
        """A plain module that applies the outer factor, uninitialised."""
        return nn.Linear(rank, rows, bias=False, **place)

    def dense(self, m: int, n: int, *, bias: bool, **place: Any) -> nn.Module:
        """A dense module of the kind that was factorised, uninitialised."""
        return nn.Linear(n, m, bias=bias, **place)


LINEAR = Layout()


@dataclass(frozen=True)
class Transposed(Layout):
    """That of transformers' `Conv1D` (GPT-2): the weight is W^T."""

    def matrix(self, weight: Tensor) -> Tensor:
        """W (m, n) from the dense weight (n, m): a view."""
        return weight.T

    def weight(self, matrix: Tensor) -> Tensor:
        """The dense weight (n, m) from W (m, n)."""
        return matrix.T.contiguous()

    def dense(self, m: int, n: int, *, bias: bool, **place: Any) -> nn.Module:
        """A `Conv1D`, which always has a bias."""
        from transformers.pytorch_utils import Conv1D

        with torch.device(place.get("device", "cpu")):
            return Conv1D(m, n)


@dataclass(frozen=True)
class Patches(Layout):
    """That of `nn.Conv1d`, `nn.Conv2d` and `nn.Conv3d` with groups = 1.

    W is the weight (m, channels, *kernel) with its last dimensions put together, and a row is what
    lies under the kernel at one position. Factors are a convolution with the layer's kernel to r
    channels, and a 1x1 one behind it.
    """

    in_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    padding_mode: str

    @property
    def channels(self) -> int:
        """The dimension of an output that counts its m channels, from the end."""
        return -1 - len(self.kernel_size)

    def visible(self, m: int) -> Mapping[str, Any]:
        """Attributes of the dense module that a model may read, apart from its tensors."""
        return vars(self) | {"groups": 1, "out_channels": m}

    def matrix(self, weight: Tensor) -> Tensor:
        """W (m, n) from the dense weight (m, channels, *kernel): a view."""
        return weight.flatten(1)

    def weight(self, matrix: Tensor) -> Tensor:
        """The dense weight (m, channels, *kernel) from W (m, n)."""
        return matrix.reshape(len(matrix), self.in_channels, *self.kernel_size)

    def inner(self, factor: Tensor) -> Tensor:
        """The inner factor (r, n) as it is stored: (r, channels, *kernel)."""
        return self.weight(factor)

    def outer(self, factor: Tensor) -> Tensor:
        """The outer factor as it is stored: (m, r, 1, ...)."""
        return factor.reshape(*factor.shape, *(1 for _ in self.kernel_size))

    def inputs(self, x: Tensor) -> Tensor:
        """The patches (..., *positions, n) of what the layer is given, (..., channels, *sizes)."""
        x = self._padded(x)
        first = self.channels + 1  # the first dimension of a position, counted from the end
        for axis, size in enumerate(self.kernel_size):
            span = self.dilation[axis] * (size - 1) + 1
            # Every unfolding puts a new dimension at the end.
            x = x.unfold(first, span, self.stride[axis])[..., :: self.dilation[axis]]
        channels = 2 * self.channels + 1
        return x.movedim(channels, self.channels).flatten(self.channels)

    def apply(self, x: Tensor, inner: Tensor) -> Tensor:
        """The inner factor (r, channels, *kernel) applied to what the layer is given."""
        convolve: Callable[..., Tensor] = (F.conv1d, F.conv2d, F.conv3d)[len(self.kernel_size) - 1]
        return convolve(self._padded(x), inner, None, self.stride, 0, self.dilation)

    def inner_part(self, rank: int, n: int, **place: Any) -> nn.Module:
        """A convolution with the layer's kernel, uninitialised."""
        return self.dense(rank, n, bias=False, **place)

    def outer_part(self, rows: int, rank: int, **place: Any) -> nn.Module:
        """A 1x1 convolution, uninitialised."""
        return self._class(rank, rows, 1, bias=False, **place)

    def dense(self, m: int, n: int, *, bias: bool, **place: Any) -> nn.Module:
        """A convolution of the kind that was factorised, uninitialised."""
        settings = {key: x for key, x in vars(self).items() if key != "in_channels"}
        return self._class(self.in_channels, m, bias=bias, **settings, **place)

    @property
    def _class(self) -> Callable[..., nn.Module]:
        return (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(self.kernel_size) - 1]

    def _padded(self, x: Tensor) -> Tensor:
        sides: list[int] = []
        for axis in reversed(range(len(self.kernel_size))):  # as `pad` wants: the last one first
            before = after = 0
            if self.padding == "same":
                total = self.dilation[axis] * (self.kernel_size[axis] - 1)
                before, after = total // 2, total - total // 2
            elif not isinstance(self.padding, str):
                before = after = self.padding[axis]
            sides += [before, after]
        if not any(sides):
            return x
        return F.pad(x, sides, "constant" if self.padding_mode == "zeros" else self.padding_mode)


@dataclass(frozen=True)
class Lookup(Layout):
    """That of an `nn.Embedding`: its rows are one-hot, and W (m, n) is the table's transpose.

    Factors are m rows of length r for every number, which `up` maps on.
    """

    num_embeddings: int

    def visible(self, m: int) -> Mapping[str, Any]:
        """Attributes of the dense module that a model may read, apart from its tensors."""
        return {"num_embeddings": self.num_embeddings, "embedding_dim": m}

    def matrix(self, weight: Tensor) -> Tensor:
        """W (m, n) from the table (n, m): a view."""
        return weight.T

    def weight(self, matrix: Tensor) -> Tensor:
        """The table (n, m) from W (m, n)."""
        return matrix.T.contiguous()

    def inputs(self, x: Tensor) -> Tensor:
        """The one-hot rows (..., n) of numbers (...), float32."""
        return F.one_hot(x, self.num_embeddings).float()

    def apply(self, x: Tensor, inner: Tensor) -> Tensor:
        """The columns of the inner factor (r, n) with these numbers: (..., r)."""
        return F.embedding(x, inner.T)

    def inner_part(self, rank: int, n: int, **place: Any) -> nn.Module:
        """A module that picks columns, uninitialised."""
        return Columns(rank, n, **place)

    def dense(self, m: int, n: int, *, bias: bool, **place: Any) -> nn.Module:
        """An embedding, uninitialised."""
        return nn.Embedding(n, m, **place)


class Columns(nn.Module):
    """Maps numbers (...) to the columns (..., rank) of its weight (rank, n)."""

    def __init__(self, rank: int, n: int, **place: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rank, n, **place))

    def forward(self, x: Tensor) -> Tensor:
        """Picks columns."""
        return F.embedding(x, self.weight.T)


@dataclass(frozen=True)
class Table(Layout):
    """That of an embedding whose table (m, n) is the weight W of a head too.

    The factors are the head's; the embedding picks rows of their product, and may scale them.
    """

    picks_rows: ClassVar[bool] = True
    scale: Scale = PLAIN

    def visible(self, m: int) -> Mapping[str, Any]:
        """Attributes of the dense module that a model may read, apart from its tensors."""
        return {"num_embeddings": m}

    def dense(self, m: int, n: int, *, bias: bool, **place: Any) -> nn.Module:
        """An embedding, uninitialised."""
        return new_embedding(m, n, self.scale, **place)


def layout_of(module: nn.Module) -> Layout | None:
    """How a dense layer that can be factorised lies in memory; None for any other module.

    Those are `nn.Linear`, transformers' `Conv1D`, known by its `nx` and `nf`, whose weight is
    (n, m), convolutions that see all channels, and `nn.Embedding`. The output projection of
    `nn.MultiheadAttention` is none: its weight is read directly.
    """
    if isinstance(module, nn.Linear):
        return None if isinstance(module, NonDynamicallyQuantizableLinear) else LINEAR
    if isinstance(module, nn.Embedding):
        return Lookup(module.num_embeddings) if lookup_scale(module) == PLAIN else None
    for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        if isinstance(module, kind):
            # A class with a forward of its own may do something else around the convolution.
            plain = type(module).forward is kind.forward and module.groups == 1
            return _patches(module) if plain else None
    nf, nx = getattr(module, "nf", None), getattr(module, "nx", None)
    known = nf is not None and nx is not None
    fits = known and tuple(getattr(module, "weight", torch.empty(0)).shape) == (nx, nf)
    return Transposed() if fits else None


def table_layout(embedding: nn.Module) -> Table | None:
    """Of an embedding as the owner of a head's weight; None where it does more than scale rows.

    A square table would not tell in which way round it was factorised.
    """
    scale = lookup_scale(embedding)
    if scale is None or embedding.num_embeddings == embedding.embedding_dim:
        return None
    return Table(scale)


def _patches(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> Patches:
    padding = module.padding
    return Patches(
        in_channels=module.in_channels,
        kernel_size=tuple(module.kernel_size),
        stride=tuple(module.stride),
        padding=padding if isinstance(padding, str) else tuple(padding),
        dilation=tuple(module.dilation),
        padding_mode=module.padding_mode,
    )


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(m, n) of a dense layer that can be factorised, None for any other module."""
    layout, weight = layout_of(module), getattr(module, "weight", None)
    if layout is None or weight is None:
        return None
    m, n = layout.matrix(weight).shape
    return m, n
