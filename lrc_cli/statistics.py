"""Streaming second moments: Gram matrices of layer inputs and of output gradients.

G = (1/T) sum x x^T and F = (1/T) sum g g^T over the T tokens that are not padding. A micro-batch is
multiplied in float32 (products of bfloat16 numbers are exact there) and added to a float64 sum.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from lrc_cli.calibration import Sequences
from lrc_cli.errors import RunError
from lrc_cli.losses import unpadded
from lrc_cli.models import Layer, Network, hooked

# Only the lower triangle is needed: wide matrices are multiplied panel by panel, which spares up
# to 40 % of the products. Narrower panels would slow the matrix product itself.
PANEL = 256


def micro_batch(sequences: Sequences, num_positions: int) -> int:
    """How many sequences have about `num_positions` positions together, at least one.

    A position is a token, or a row of features of a floating-point input.
    """
    widest = max(
        tensor[0].numel() // (tensor.shape[-1] if tensor.is_floating_point() else 1)
        for tensor in sequences.inputs.values()
    )
    return max(1, num_positions // max(widest, 1))


class GramSum:
    """A float64 sum of x x^T over rows x, and the number of rows.

    Args:
        center: sum (x - c) (x - c)^T, for c the mean of the rows that come first, and x - c. The
            mean then leaves the Gram matrix by a small correction, where x x^T - mean mean^T
            would lose as many digits as the mean is larger than the deviations.
    """

    def __init__(self, width: int, device: torch.device, *, center: bool = False) -> None:
        # float64 is missing on Apple's GPUs; their sums are held on the CPU.
        holder = torch.device("cpu") if device.type == "mps" else device
        self.total = torch.zeros(width, width, dtype=torch.float64, device=holder)
        self.num_rows = 0
        self._center = center
        self._pivot: torch.Tensor | None = None
        self._deviation = self.total.new_zeros(width)

    def add(self, rows: torch.Tensor) -> torch.Tensor:
        """Add rows of shape (t, n) in any floating dtype.

        Returns:
            What was multiplied: the rows, with `center` less c.
        """
        self.num_rows += len(rows)
        if self._center and len(rows):
            rows = self._around_pivot(rows)
        with _exact_bfloat16(rows) as factor:
            for start in range(0, rows.shape[1], PANEL):
                stop = min(start + PANEL, rows.shape[1])
                panel = _product(factor[:, start:stop], factor[:, :stop])
                self.total[start:stop, :stop] += panel.to(self.total.device)
        return rows

    def _around_pivot(self, rows: torch.Tensor) -> torch.Tensor:
        if self._pivot is None:
            self._pivot = rows.float().mean(dim=0)
        rows = rows.float() - self._pivot
        self._deviation += rows.sum(dim=0, dtype=torch.float64).to(self._deviation.device)
        return rows

    def mean(self) -> torch.Tensor:
        """The Gram matrix divided by the number of rows: (n, n), float64, symmetric.

        With `center` it is that of x - mean(x).
        """
        lower = self.total.tril()
        gram = (lower + lower.tril(-1).T) / max(self.num_rows, 1)
        return gram - torch.outer(self.deviation, self.deviation) if self._center else gram

    @property
    def deviation(self) -> torch.Tensor:
        """The mean of x - c (n,), float64; zeros without `center`."""
        return self._deviation / max(self.num_rows, 1)

    def mean_row(self) -> torch.Tensor:
        """The mean of the rows (n,), float64; with `center` only."""
        if not self._center:
            raise ValueError("the mean was not collected")
        mean = self.deviation
        return mean if self._pivot is None else mean + self._pivot.to(mean)


@contextmanager
def _exact_bfloat16(rows: torch.Tensor) -> Iterator[torch.Tensor]:
    """The rows in the dtype to multiply. Within it, products of bfloat16 rows are exact and fast.

    A CPU has no product of bfloat16 matrices that keeps float32 sums. But float32 matrices may be
    rounded to bfloat16 on the way into it, and to rows that are bfloat16 this does nothing.
    """
    if rows.is_cuda and rows.dtype == torch.bfloat16:
        yield rows
        return
    backend: Any = torch.backends.mkldnn
    settings = backend.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "bf16" if rows.dtype == torch.bfloat16 else "ieee"
    try:
        yield rows.float()
    finally:
        settings.fp32_precision = before


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    if left.dtype == torch.bfloat16:
        return torch.mm(left.T, right, out_dtype=torch.float32)
    return left.T @ right


class Moments:
    """Gram matrices of the layers that run together: of their inputs and output gradients.

    Args:
        leaders: {layer: first layer that reads the same input}; the leader's input is measured.
        graded: layers whose output gradients are measured too.
        center: whether inputs are summed around their mean.
    """

    def __init__(
        self, leaders: Mapping[str, str], graded: Sequence[Layer], *, center: bool = False
    ) -> None:
        self.leaders, self.graded = leaders, {layer.name for layer in graded}
        self.grams: dict[str, GramSum] = {}
        """By leader; a layer that was never reached has no entry."""
        self.fishers: dict[str, GramSum] = {}
        """By layer; one that the loss does not depend on has no entry."""
        self.center = center

    @contextmanager
    def watching(
        self, network: Network, layers: Sequence[Layer], mask: torch.Tensor | None
    ) -> Iterator[None]:
        """Within it, what passes through `layers` is added, forwards and backwards.

        Args:
            mask: (sequences, tokens), true where a token is real; None: all are.
        """

        def after_layer(layer: Layer, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor | None:
            if self.leaders.get(layer.name) == layer.name:
                _add(self.grams, layer.name, x.detach(), mask, center=self.center)
            if layer.name not in self.graded or not torch.is_grad_enabled():
                return None
            if not y.requires_grad:
                # Parameters are frozen, so gradients begin here; a clone, because a leaf may not
                # be changed in place by what follows.
                y = y.requires_grad_().clone()
            y.register_hook(lambda gradient: _add(self.fishers, layer.name, gradient, mask))
            return y

        with hooked(network, layers, after_layer):
            yield

    def check_finite(self) -> None:
        """Raise RunError, naming the layer, if an activation or a gradient is NaN or infinite."""
        _check_finite("inputs", self.grams)
        _check_finite("output gradients", self.fishers)


def _add(
    sums: dict[str, GramSum],
    name: str,
    tensor: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    center: bool = False,
) -> None:
    rows = unpadded(tensor, mask).reshape(-1, tensor.shape[-1])
    if name not in sums:
        sums[name] = GramSum(tensor.shape[-1], tensor.device, center=center)
    sums[name].add(rows)


def _check_finite(what: str, sums: dict[str, GramSum]) -> None:
    for name, gram in sums.items():
        if not bool(torch.isfinite(gram.total.diagonal().sum())):
            raise RunError(
                f"{name}: NaN or infinity in its {what} on the calibration data",
                "set runtime.dtype: float32, or look for a damaged weight before this layer",
            )
