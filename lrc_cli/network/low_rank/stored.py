"""A stored layer is a layer without a dense weight; this module has the base class and `FormLayer`.

State dicts have the tensors under their disk names. This module is pure torch and does not know
transformers.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrc_cli.errors import InputError
from lrc_cli.forms import Form, Packed
from lrc_cli.network.fast_paths import end_fast_paths
from lrc_cli.network.layouts import Layout, Table, layout_of


class StoredLayer(nn.Module):
    """A module in the place of a dense layer (m, n); the base class of all forms.

    Args:
        in_features: n.
        out_features: m.
        layout: the layout of the dense layer.
    """

    bias: nn.Parameter | None

    def __init__(self, *, in_features: int, out_features: int, layout: Layout) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.layout = layout
        for name, value in layout.visible(out_features).items():
            setattr(self, name, value)

    @property
    def storage(self) -> str:
        """The name of the form."""
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n), the shape of the dense weight."""
        return self.out_features, self.in_features

    def table_entry(self) -> dict[str, Any]:
        """Returns the layer's entry in a checkpoint's layer table."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the dense weight's numbers, as far as the tensors tell."""
        raise NotImplementedError

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """Returns the weight (m, n) that the layer applies, in `dtype`."""
        raise NotImplementedError

    def product(self, x: Tensor) -> Tensor:
        """Applies the dense weight, and the bias, to inputs."""
        raise NotImplementedError

    def rows(self, numbers: Tensor) -> Tensor:
        """Returns the rows (..., n) of the dense weight with these numbers (...)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Maps inputs (..., n) to outputs (..., m), in the layer's layout."""
        layout = self.layout
        return layout.scale(self.rows(x)) if isinstance(layout, Table) else self.product(x)

    def biased(self, y: Tensor) -> Tensor:
        """Adds the bias to outputs, where the layer has a bias."""
        if self.bias is None:
            return y
        return y + self.bias.view(-1, *(1,) * (-1 - self.layout.channels))

    def extra_repr(self) -> str:
        """Returns the sizes that `print(model)` shows."""
        return f"{self.in_features}, {self.out_features}, storage={self.storage}"


@dataclass(frozen=True, kw_only=True)
class FormTensors:
    """The shapes and dtypes of a layer's tensors, in a form without a rank, in a checkpoint."""

    name: str
    """The layer's name in the checkpoint, for messages."""
    form: Form
    entry: Mapping[str, Any]
    """The layer's entry in the layer table."""
    infos: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    """The shapes and dtypes, by the tensors' names below the layer."""
    bias: bool = False
    """Whether the checkpoint has a bias for the layer."""

    @classmethod
    def of(
        cls, name: str, form: Form, entry: Mapping[str, Any], found: Mapping[str, Any]
    ) -> "FormTensors":
        """Returns the shapes and dtypes of a layer's tensors.

        Args:
            name: the layer's name in the checkpoint.
            form: the form.
            entry: the layer's entry in the layer table.
            found: headers or tensors, by their names below the layer.
        """
        infos = {
            end: (tuple(found[end].shape), found[end].dtype) for end in form.tensors if end in found
        }
        return cls(name=name, form=form, entry=entry, infos=infos, bias="bias" in found)


class FormLayer(StoredLayer):
    """A layer in a form without a rank: it holds the form's tensors under their disk names.

    The layer runs with the dense matrix that the form returns, or with the form's own product.
    """

    def __init__(
        self,
        dense: nn.Module,
        found: FormTensors,
        layout: Layout,
        *,
        out_features: int,
        in_features: int,
    ) -> None:
        super().__init__(in_features=in_features, out_features=out_features, layout=layout)
        self.form, self.names = found.form, tuple(found.infos)
        self.parameters_stated = {k: found.entry[k] for k in found.form.table_keys}
        assert isinstance(dense.weight, Tensor)
        device = dense.weight.device
        for name, (shape, dtype) in found.infos.items():
            _hold(self, name, torch.empty(shape, dtype=dtype, device=device))
        has_bias = found.bias or getattr(dense, "bias", None) is not None
        place: dict[str, Any] = {"device": device, "dtype": dense.weight.dtype}
        self.bias = nn.Parameter(torch.empty(out_features, **place)) if has_bias else None
        self.train(dense.training)

    @property
    def storage(self) -> str:
        """The name of the form."""
        return self.form.name

    def table_entry(self) -> dict[str, Any]:
        """Returns the layer's entry in a checkpoint's layer table."""
        return self.form.table_entry(self.parameters_stated)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the bias, or of the first tensor whose numbers are not whole."""
        tensors = [*([] if self.bias is None else [self.bias]), *self.packed().tensors.values()]
        found = (tensor.dtype for tensor in tensors if tensor.is_floating_point())
        return next(found, torch.get_default_dtype())

    def packed(self) -> Packed:
        """Returns the layer's tensors, as the form takes them."""
        return Packed(
            form=self.form.name,
            shape=self.shape,
            tensors={name: attrgetter(name)(self) for name in self.names},
            parameters=self.parameters_stated,
        )

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """Returns the weight (m, n) that the layer applies, in `dtype`."""
        return self.form.dense(self.packed()).to(dtype)

    def product(self, x: Tensor) -> Tensor:
        """Applies the dense weight, and the bias, to inputs."""
        layout = self.layout
        dtype = x.dtype if x.is_floating_point() else self.dtype
        return self.biased(layout.apply(x, layout.inner(self.matrix(dtype))))

    def rows(self, numbers: Tensor) -> Tensor:
        """Returns the rows (..., n) of the dense weight with these numbers (...)."""
        return F.embedding(numbers, self.matrix(self.dtype))


def _hold(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Registers a tensor under a name with dots: whole numbers as a buffer, else a parameter."""
    first, dot, rest = name.partition(".")
    if dot:
        if first not in module._modules:
            module.add_module(first, nn.Module())
        _hold(module.get_submodule(first), rest, tensor)
    elif tensor.is_floating_point():
        module.register_parameter(first, nn.Parameter(tensor, requires_grad=False))
    else:
        module.register_buffer(first, tensor)


def stored_layers(model: nn.Module) -> Iterator[tuple[str, StoredLayer]]:
    """Yields the layers of a model that are not stored as a dense weight, with their names."""
    for name, module in model.named_modules():
        if isinstance(module, StoredLayer):
            yield name, module


def replace_modules(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Puts `new[old]` wherever `old` hangs below `model`, under every name of a shared module."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in new:
                setattr(parent, name, new[child])
    end_fast_paths(model, (part for part in new.values() if isinstance(part, StoredLayer)))


@torch.no_grad()
def dense_weight(module: nn.Module) -> Tensor:
    """Returns the weight (m, n) that a layer applies, multiplied out where it is not stored.

    Products are computed in float32, or in the tensors' dtype if it is wider.

    Raises:
        InputError: the layer is offloaded, or the module is no linear layer.
    """
    if isinstance(module, StoredLayer):
        if is_offloaded(module):
            raise InputError("a layer is offloaded", "load the model without offloading first")
        return module.matrix(torch.promote_types(module.dtype, torch.float32)).contiguous()
    layout = layout_of(module)
    if layout is None:
        raise InputError(f"{type(module).__name__} is not a linear layer")
    return layout.matrix(module.get_parameter("weight").detach())


def dense_module(
    layout: Layout, weight: Tensor, bias: Tensor | None, *, training: bool
) -> nn.Module:
    """Returns a dense module of the kind that a layout belongs to.

    Args:
        layout: the layout.
        weight: W (m, n).
        bias: (m,), or None for a layer without a bias.
        training: whether the module is in training mode.
    """
    m, n = weight.shape
    dense = layout.dense(m, n, bias=bias is not None, device="meta")
    dense.weight = nn.Parameter(layout.weight(weight))
    if bias is not None:
        dense.bias = nn.Parameter(bias)
    return dense.train(training)


def affine(module: nn.Module) -> tuple[Tensor, Tensor]:
    """Returns the matrix (m, n) and the bias (m,) that a linear layer applies, in float64."""
    if isinstance(module, StoredLayer):
        weight = module.matrix(torch.float64)
    else:
        assert isinstance(module.weight, Tensor)
        weight = module.weight.double()
    bias = module.bias
    return weight, bias.double() if isinstance(bias, Tensor) else weight.new_zeros(len(weight))


def is_offloaded(layer: nn.Module) -> bool:
    """Returns whether a layer's tensors are elsewhere, so that hooks fetch them for a run."""
    return any(parameter.is_meta for parameter in layer.parameters())
