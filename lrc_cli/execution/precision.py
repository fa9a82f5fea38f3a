"""A network runs in one dtype here, while its parameters stay mapped views in another dtype.

On a processor without fast bfloat16 products a bfloat16 checkpoint is computed in float32. A
conversion of the whole network would copy it into private memory. So each parameter is converted
when a module reads the parameter. The backward pass converts the parameter again instead of keeping
the converted copy.
"""

import mmap
import platform
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils import parametrize

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
"""The dtypes by their names in configs."""


def fast_dtype(device: torch.device, stored: torch.dtype) -> torch.dtype:
    """Returns the dtype of activations: the stored dtype where the device multiplies it natively.

    Otherwise activations are float32.
    """
    if stored not in (torch.bfloat16, torch.float16):
        return torch.float32
    if device.type == "cpu":
        return stored if stored == torch.bfloat16 and _multiplies_bfloat16() else torch.float32
    if device.type == "cuda" and stored == torch.bfloat16:
        with torch.cuda.device(device):  # torch asks the current device
            return stored if torch.cuda.is_bf16_supported(False) else torch.float32
    return stored


def _multiplies_bfloat16() -> bool:
    """Returns whether the CPU multiplies bfloat16: with AVX-512 alone, oneDNN emulates it."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return not is_x86 or (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )


class Mappings:
    """Memory mappings for converted copies; a mapping is used again once its tensor is gone.

    On the heap, such copies would leave holes between activations. The holes would stay resident,
    in the end as much as the whole network. Fresh mappings would cost page faults at every read.
    """

    def __init__(self) -> None:
        self._by_size: dict[int, list[mmap.mmap]] = {}

    def convert(self, stored: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Returns a converted copy of `stored`; on the CPU the copy has a mapping of its own."""
        if stored.device.type != "cpu" or not stored.numel():
            return stored.to(dtype)
        pages = self._free(stored.numel() * dtype.itemsize)
        return torch.frombuffer(pages, dtype=dtype).view(stored.shape).copy_(stored)

    def _free(self, num_bytes: int) -> mmap.mmap:
        mappings = self._by_size.setdefault(num_bytes, [])
        for pages in mappings:
            # The list, this name and the argument are three references; a tensor would be a fourth.
            if sys.getrefcount(pages) == 3:
                return pages
        mappings.append(mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        return mappings[-1]


class _Cast(nn.Module):
    """A parametrization with which every read of a parameter gives a converted copy."""

    def __init__(self, dtype: torch.dtype, live: "LiveCasts") -> None:
        super().__init__()
        self.dtype, self.live = dtype, live

    def forward(self, stored: torch.Tensor) -> torch.Tensor:
        cast = self.live.mappings.convert(stored, self.dtype)
        self.live.remember(cast, stored)
        return cast


class LiveCasts:
    """The converted copies that are alive, each with the stored tensor that was converted."""

    def __init__(self) -> None:
        self._stored: dict[int, torch.Tensor] = {}
        self.mappings = Mappings()

    def remember(self, cast: torch.Tensor, stored: torch.Tensor) -> None:
        """Notes that `cast` holds `stored` converted, for as long as `cast`'s storage lives."""
        storage = cast.untyped_storage()
        address = storage.data_ptr()
        self._stored[address] = stored.detach()
        weakref.finalize(storage, self._stored.pop, address, None)

    def find(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Returns the stored parameter that `tensor` is a converted view of, or None."""
        return self._stored.get(tensor.untyped_storage().data_ptr())


def cast_on_read(module: nn.Module, dtype: torch.dtype, live: LiveCasts | None = None) -> LiveCasts:
    """Makes a module's floating-point parameters, and buffers that go with them, read as `dtype`.

    Buffers are small and converted at once; parameters keep their stored tensors. Parameters that
    already have the dtype are left alone. An embedding converts the rows that it looks up, never
    the whole table. Buffers in half precision are converted. In a conversion from or to float64,
    buffers in the parameters' own dtype are converted too. A BatchNorm's statistics go with its
    weight. Other buffers in float32 stay: networks compute from them in more than half precision.

    Args:
        module: the module; changed in place.
        dtype: the dtype of what modules read.
        live: the casts of the network that the module becomes a part of; None: new casts.
    """
    live = live or LiveCasts()
    converted = {p.dtype for p in module.parameters() if p.is_floating_point()} - {dtype}
    if dtype != torch.float64:
        converted &= {torch.float64}
    converted |= {torch.bfloat16, torch.float16}
    for part in list(module.modules()):
        for name, parameter in list(part.named_parameters(recurse=False)):
            if parameter.is_floating_point() and parameter.dtype != dtype:
                parametrize.register_parametrization(part, name, _Cast(dtype, live), unsafe=True)
                if type(part).forward is nn.Embedding.forward and part.max_norm is None:
                    _gather_first(part, dtype)
        for name, buffer in list(part.named_buffers(recurse=False)):
            if buffer.dtype in converted or _goes_with_weight(part, buffer):
                setattr(part, name, buffer.to(dtype))
    return live


def _goes_with_weight(part: nn.Module, buffer: torch.Tensor) -> bool:
    """Returns whether a kernel takes the buffer only in the dtype of the part's weight."""
    return isinstance(part, _NormBase) and part.weight is not None and buffer.is_floating_point()


def _gather_first(embedding: Any, dtype: torch.dtype) -> None:
    """Makes an embedding look rows up in its stored table and convert only these rows."""

    def forward(input: torch.Tensor) -> torch.Tensor:
        # The other settings of an embedding concern gradients of the table, which is frozen.
        return functional.embedding(input, embedding.parametrizations.weight.original).to(dtype)

    embedding.forward = forward


@contextmanager
def recast_in_backward(live: LiveCasts) -> Iterator[None]:
    """A context in which autograd keeps no converted parameter: backward passes convert again."""

    def pack(tensor: torch.Tensor) -> Any:
        stored = live.find(tensor)
        if stored is None:
            return tensor
        return stored, tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset()

    def unpack(packed: Any) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        stored, dtype, shape, stride, offset = packed
        return live.mappings.convert(stored, dtype).as_strided(shape, stride, offset)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
