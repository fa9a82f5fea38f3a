"""C3 bounds the worst output error of plain feed-forward networks by a product of norms.

For layers y_l = W_l x_l + b_l with elementwise activations between them, the compressed network's
error obeys, input by input,

    E_l <= ||(W_l - Z_l) x_l + b_l - b~_l|| + ||Z_l||_2 Lip_l E_(l-1)

with Lip_l the Lipschitz constant of what stands between layer l - 1 and layer l, because W x - Z x~
is (W - Z) x + Z (x - x~) (docs/theory.md, C3). The bound is loose by construction and vacuous for
deep networks. Networks with attention, normalisation, convolutions or skip connections get no such
bound.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lrc_cli.network.low_rank.stored import StoredLayer, affine
from lrc_cli.quality.records import OwnError, WorstCase

LIPSCHITZ: dict[type[nn.Module], Callable[[Any], float]] = {
    nn.Identity: lambda _: 1.0,
    nn.ReLU: lambda _: 1.0,
    nn.ReLU6: lambda _: 1.0,
    nn.Hardtanh: lambda _: 1.0,
    nn.Tanh: lambda _: 1.0,
    nn.Softsign: lambda _: 1.0,
    nn.LogSigmoid: lambda _: 1.0,
    nn.Sigmoid: lambda _: 0.25,
    nn.LeakyReLU: lambda part: max(1.0, abs(part.negative_slope)),
    nn.ELU: lambda part: max(1.0, abs(part.alpha)),
    nn.GELU: lambda _: 1.13,  # 1.1290, in the tanh form too
    nn.SiLU: lambda _: 1.1,  # 1.0999
}
"""The largest slope of an elementwise module, rounded up, as a function of the module."""


@dataclass
class _Chain:
    """Holds both networks' activations, input by input, and how far they can be apart."""

    dense: Tensor
    compressed: Tensor
    bound: Tensor
    """E_l of the inputs, (N,) float64."""
    lipschitz: float = 1.0
    """The Lipschitz constant of the steps since the last linear layer."""
    layers: list["_Linear"] = field(default_factory=list)


class _Linear(NamedTuple):
    """Holds a linear layer that both networks have passed."""

    error: float
    """The layer's largest own error."""
    factor: float
    """The factor by which the layer multiplies earlier errors."""


@torch.no_grad()
def worst_case(
    dense: nn.Module, compressed: nn.Module, inputs: Mapping[str, Tensor]
) -> WorstCase | None:
    """Returns the largest output error that the product bound allows on any of the inputs.

    Both networks are followed in float64 with their weights as they are read.

    Args:
        dense: in evaluation mode; only a (nested) `nn.Sequential` of linear layers, elementwise
            activations, dropout and flattening is bounded.
        compressed: the same network with factorised layers.
        inputs: one floating-point tensor whose first dimension counts the inputs.

    Returns:
        The bound, with what was measured beside it. None: the network is not of that kind, or not
        compressed.
    """
    parts = _paired(dense, compressed)
    if parts is None or len(inputs) != 1:
        return None
    (x,) = inputs.values()
    if not x.is_floating_point() or x.ndim < 2:
        return None
    x = x.to(next(dense.parameters()).device, torch.float64)
    chain = _Chain(dense=x.clone(), compressed=x.clone(), bound=x.new_zeros(len(x)))
    for old, new in parts:
        if _is_linear(old):
            _linear(chain, old, new)
        else:
            chain.lipschitz *= _constant(old)
            chain.dense, chain.compressed = old(chain.dense), new(chain.compressed)
    return WorstCase(
        label="worst case",
        inputs="calibration",
        num_inputs=len(x),
        bound=(chain.bound * chain.lipschitz).max().item(),
        measured=_norms(chain.dense - chain.compressed).max().item(),
        output_norm=_norms(chain.dense).max().item(),
        layers=_amplified(chain),
    )


def _linear(chain: _Chain, old: nn.Module, new: nn.Module) -> None:
    (weight, bias), (fitted, new_bias) = affine(old), affine(new)
    own = _norms(chain.dense @ (weight - fitted).T + (bias - new_bias))
    factor = chain.lipschitz * _spectral_norm(fitted)
    chain.bound = own + factor * chain.bound
    chain.dense = chain.dense @ weight.T + bias
    chain.compressed = chain.compressed @ fitted.T + new_bias
    chain.layers.append(_Linear(error=own.max().item(), factor=factor))
    chain.lipschitz = 1.0


def _amplified(chain: _Chain) -> tuple[OwnError, ...]:
    """Returns each layer's own error with the product of the factors behind it."""
    product, found = chain.lipschitz, []
    for layer in reversed(chain.layers):
        found.append(OwnError(error=layer.error, amplification=product))
        product *= layer.factor
    return tuple(reversed(found))


def _paired(dense: nn.Module, compressed: nn.Module) -> list[tuple[nn.Module, nn.Module]] | None:
    """Returns the steps of both networks side by side; None where they are not plain chains."""
    old, new = list(_steps(dense)), list(_steps(compressed))
    if len(old) != len(new) or not any(isinstance(part, StoredLayer) for part in new):
        return None
    pairs = list(zip(old, new, strict=True))
    return pairs if all(_matches(first, second) for first, second in pairs) else None


def _steps(module: nn.Module) -> Iterator[nn.Module]:
    """Yields the parts of nested sequences in the order in which they run."""
    plain = isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward
    if not plain or _has_hooks(module):
        yield module
        return
    for part in module._modules.values():  # `children` would skip a part that runs twice
        if part is not None:
            yield from _steps(part)


def _matches(old: nn.Module, new: nn.Module) -> bool:
    if _has_hooks(old) or _has_hooks(new):
        return False
    if _is_linear(old):
        return _is_linear(new)
    return type(old) is type(new) and _is_norm_bounded(old)


def _has_hooks(part: nn.Module) -> bool:
    return bool(part._forward_hooks or part._forward_pre_hooks)


def _is_linear(part: nn.Module) -> bool:
    # A parametrised layer is of another class and runs the same forward.
    plain = isinstance(part, nn.Linear) and type(part).forward is nn.Linear.forward
    return plain or isinstance(part, StoredLayer)


def _is_norm_bounded(part: nn.Module) -> bool:
    if type(part) is nn.Dropout:
        return not part.training
    if type(part) is nn.Flatten:
        return part.start_dim >= 1  # flattening from dimension 0 would mix inputs
    return type(part) in LIPSCHITZ


def _constant(part: nn.Module) -> float:
    known = LIPSCHITZ.get(type(part))
    return 1.0 if known is None else known(part)


def _spectral_norm(matrix: Tensor) -> float:
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    return torch.linalg.eigvalsh(gram)[-1].clamp(min=0.0).sqrt().item()


def _norms(rows: Tensor) -> Tensor:
    """Returns the 2-norm of each input's entries, (N,)."""
    return torch.linalg.vector_norm(rows.flatten(1), dim=1)
