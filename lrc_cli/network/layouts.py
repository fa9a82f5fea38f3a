"""A layout says how W (m, n) lies in a layer's weight, and rows in the layer's inputs and outputs.

A layer computes y = W x + b for every row x. A convolution is such a layer: the rows are the
patches under the kernel, n is channels * kernel, and m is the number of output channels. Only this
module knows: statistics, solvers and checks see W and rows.
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
    """The layout of `nn.Linear`: the weight is W, and rows lie along the last dimension."""

    picks_rows: ClassVar[bool] = False
    """Whether the module is given numbers of rows of W, and returns the rows."""

    @property
    def channels(self) -> int:
        """The dimension of an output that counts its m channels, from the end."""
        return -1

    def visible(self, m: int) -> Mapping[str, Any]:
        """Returns the dense module's attributes that a model may read, apart from its tensors."""
        return {}

    def matrix(self, weight: Tensor) -> Tensor:
        """Returns W (m, n) for the dense weight, as a view where possible."""
        return weight

    def weight(self, matrix: Tensor) -> Tensor:
        """Returns the dense weight for W (m, n)."""
        return matrix

    def inner(self, factor: Tensor) -> Tensor:
        """Returns the inner factor (r, n) in its stored shape."""
        return factor

    def outer(self, factor: Tensor) -> Tensor:
        """Returns the outer factor (m, r), or T (m - r, r), in its stored shape."""
        return factor

    def inputs(self, x: Tensor) -> Tensor:
        """Returns the rows (..., n) of the layer's input."""
        return x

    def outputs(self, y: Tensor) -> Tensor:
        """Returns the rows (..., m) of the layer's output, as a view."""
        return y.movedim(self.channels, -1)

    def returned(self, rows: Tensor) -> Tensor:
        """Returns the layer's output for rows (..., m): the reverse of `outputs`."""
        return rows.movedim(-1, self.channels)

    def apply(self, x: Tensor, inner: Tensor) -> Tensor:
        """Applies the inner factor, in its stored shape, to the layer's input: r channels."""
        return F.linear(x, inner)

    def inner_part(self, rank: int, n: int, **place: Any) -> nn.Module:
        """Returns a plain, uninitialised module that applies the inner factor."""
        return nn.Linear(n, rank, bias=False, **place)

    def outer_part(self, rows: int, rank: int, **place: Any) -> nn.Module:
        """Returns a plain, uninitialised module that applies the outer factor."""
        return nn.Linear(rank, rows, bias=False, **place)

    def dense(self, m: int, n: int, *, bias: bool, **place: Any) -> nn.Module:
        """Returns an uninitialised dense module of the kind that was factorised."""
        return nn.Linear(n, m, bias=bias, **place)


LINEAR = Layout()


@dataclass(frozen=True)
class Transposed(Layout):
    """The layout of transformers' `Conv1D` (GPT-2): the weight is W^T."""

    def matrix(self, weight: Tensor) -> Tensor:
        """Returns W (m, n) for the dense weight (n, m), as a view."""
        return weight.T

    def weight(self, matrix: Tensor) -> Tensor:
        """Returns the dense weight (n, m) for W (m, n)."""
        return matrix.T.contiguous()

    def dense(self, m: int, n: int, *, bias: bool, **place: Any) -> nn.Module:
        """Returns an uninitialised `Conv1D`, which always has a bias."""
        from transformers.pytorch_utils import Conv1D

        with torch.device(place.get("device", "cpu")):
            return Conv1D(m, n)


@dataclass(frozen=True)
class Patches(Layout):
    """The layout of `nn.Conv1d`, `nn.Conv2d` and `nn.Conv3d` with groups = 1.

    W is the weight (m, channels, *kernel) with its last dimensions put together. A row is the patch
    under the kernel at one position. The factors are a convolution with the layer's kernel to r
    channels, and a 1x1 convolution after it.
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
        """Returns the dense module's attributes that a model may read, apart from its tensors."""
        return vars(self) | {"groups": 1, "out_channels": m}

    def matrix(self, weight: Tensor) -> Tensor:
        """Returns W (m, n) for the dense weight (m, channels, *kernel), as a view."""
        return weight.flatten(1)

    def weight(self, matrix: Tensor) -> Tensor:
        """Returns the dense weight (m, channels, *kernel) for W (m, n)."""
        return matrix.reshape(len(matrix), self.in_channels, *self.kernel_size)

    def inner(self, factor: Tensor) -> Tensor:
        """Returns the inner factor (r, n) in its stored shape, (r, channels, *kernel)."""
        return self.weight(factor)

    def outer(self, factor: Tensor) -> Tensor:
        """Returns the outer factor in its stored shape, (m, r, 1, ...)."""
        return factor.reshape(*factor.shape, *(1 for _ in self.kernel_size))

    def inputs(self, x: Tensor) -> Tensor:
        """Returns the patches (..., *positions, n) of the layer's input (..., channels, *sizes)."""
        x = self._padded(x)
        first = self.channels + 1  # the first dimension of a position, counted from the end
        for axis, size in enumerate(self.kernel_size):
            span = self.dilation[axis] * (size - 1) + 1
            # Every unfolding puts a new dimension at the end.
            x = x.unfold(first, span, self.stride[axis])[..., :: self.dilation[axis]]
        channels = 2 * self.channels + 1
        return x.movedim(channels, self.channels).flatten(self.channels)

    def apply(self, x: Tensor, inner: Tensor) -> Tensor:
        """Applies the inner factor (r, channels, *kernel) to the layer's input."""
        convolve: Callable[..., Tensor] = (F.conv1d, F.conv2d, F.conv3d)[len(self.kernel_size) - 1]
        return convolve(self._padded(x), inner, None, self.stride, 0, self.dilation)

    def inner_part(self, rank: int, n: int, **place: Any) -> nn.Module:
        """Returns an uninitialised convolution with the layer's kernel."""
        return self.dense(rank, n, bias=False, **place)

    def outer_part(self, rows: int, rank: int, **place: Any) -> nn.Module:
        """Returns an uninitialised 1x1 convolution."""
        return self._class(rank, rows, 1, bias=False, **place)

    def dense(self, m: int, n: int, *, bias: bool, **place: Any) -> nn.Module:
        """Returns an uninitialised convolution of the kind that was factorised."""
        settings = {key: x for key, x in vars(self).items() if key != "in_channels"}
        return self._class(self.in_channels, m, bias=bias, **settings, **place)

    @property
    def _class(self) -> Callable[..., nn.Module]:
        return (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(self.kernel_size) - 1]

    def _padded(self, x: Tensor) -> Tensor:
        sides: list[int] = []
        for axis in reversed(range(len(self.kernel_size))):  # `pad` wants the last axis first
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
    """The layout of an `nn.Embedding`: rows are one-hot, and W (m, n) is the table's transpose.

    The inner factor has a column of length r for each of the n numbers, and `up` maps the column to
    m channels.
    """

    num_embeddings: int

    def visible(self, m: int) -> Mapping[str, Any]:
        """Returns the dense module's attributes that a model may read, apart from its tensors."""
        return {"num_embeddings": self.num_embeddings, "embedding_dim": m}

    def matrix(self, weight: Tensor) -> Tensor:
        """Returns W (m, n) for the table (n, m), as a view."""
        return weight.T

    def weight(self, matrix: Tensor) -> Tensor:
        """Returns the table (n, m) for W (m, n)."""
        return matrix.T.contiguous()

    def inputs(self, x: Tensor) -> Tensor:
        """Returns the one-hot rows (..., n) of numbers (...), as float32."""
        return F.one_hot(x, self.num_embeddings).float()

    def apply(self, x: Tensor, inner: Tensor) -> Tensor:
        """Returns the columns of the inner factor (r, n) with these numbers, as (..., r)."""
        return F.embedding(x, inner.T)

    def inner_part(self, rank: int, n: int, **place: Any) -> nn.Module:
        """Returns an uninitialised module that picks columns."""
        return Columns(rank, n, **place)

    def dense(self, m: int, n: int, *, bias: bool, **place: Any) -> nn.Module:
        """Returns an uninitialised embedding."""
        return nn.Embedding(n, m, **place)


class Columns(nn.Module):
    """A module that maps numbers (...) to the columns (..., rank) of its weight (rank, n)."""

    def __init__(self, rank: int, n: int, **place: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rank, n, **place))

    def forward(self, x: Tensor) -> Tensor:
        """Picks columns."""
        return F.embedding(x, self.weight.T)


@dataclass(frozen=True)
class Table(Layout):
    """The layout of an embedding whose table (m, n) is also the weight W of a head.

    The head has the factors. The embedding picks rows of their product, and may scale the rows.
    """

    picks_rows: ClassVar[bool] = True
    scale: Scale = PLAIN

    def visible(self, m: int) -> Mapping[str, Any]:
        """Returns the dense module's attributes that a model may read, apart from its tensors."""
        return {"num_embeddings": m}

    def inner_part(self, rank: int, n: int, **place: Any) -> nn.Module:
        """Returns an uninitialised module that applies the inner factor."""
        return Product(n, rank, **place)

    def outer_part(self, rows: int, rank: int, **place: Any) -> nn.Module:
        """Returns an uninitialised module that applies the outer factor."""
        return Product(rank, rows, **place)

    def dense(self, m: int, n: int, *, bias: bool, **place: Any) -> nn.Module:
        """Returns an uninitialised embedding."""
        return new_embedding(m, n, self.scale, **place)


class Product(nn.Module):
    """A module that maps inputs (..., n) to (..., m) by its weight (m, n), and is no `nn.Linear`.

    An embedding reads rows of the weight without a call. An adapter that another library puts
    around every `nn.Linear` would reach the head alone.
    """

    def __init__(self, n: int, m: int, **place: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(m, n, **place))

    def forward(self, x: Tensor) -> Tensor:
        """Multiplies by the weight."""
        return F.linear(x, self.weight)


def layout_of(module: nn.Module) -> Layout | None:
    """Returns the layout of a dense layer that can be factorised, or None for any other module.

    Layers that can be factorised are `nn.Linear`, transformers' `Conv1D` (told by its `nx` and
    `nf`), convolutions that see all channels, and `nn.Embedding`. The output projection of
    `nn.MultiheadAttention` cannot: the attention reads its weight directly.
    """
    if isinstance(module, nn.Linear):
        return None if isinstance(module, NonDynamicallyQuantizableLinear) else LINEAR
    if isinstance(module, nn.Embedding):
        return Lookup(module.num_embeddings) if lookup_scale(module) == PLAIN else None
    for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        if isinstance(module, kind):
            # A class with another forward may do something else around the convolution.
            plain = type(module).forward is kind.forward and module.groups == 1
            return _patches(module) if plain else None
    nf, nx = getattr(module, "nf", None), getattr(module, "nx", None)
    known = nf is not None and nx is not None
    fits = known and tuple(getattr(module, "weight", torch.empty(0)).shape) == (nx, nf)
    return Transposed() if fits else None


def table_layout(embedding: nn.Module) -> Table | None:
    """Returns the layout of an embedding that owns a head's weight, or None for other embeddings.

    The embedding may only scale rows. A square table is refused: its shape would not tell which way
    round it was factorised.
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
    """Returns (m, n) of a dense layer that can be factorised, or None for any other module."""
    layout, weight = layout_of(module), getattr(module, "weight", None)
    if layout is None or weight is None:
        return None
    m, n = layout.matrix(weight).shape
    return m, n
