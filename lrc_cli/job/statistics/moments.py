"""Streaming second moments: Gram matrices of layer inputs and of output gradients.

G = (1/N) sum x x^T over the N rows that reach a layer, and F = (1/T) sum g g^T over as many, but
divided by the T calibration tokens, which is the same T for all layers: an error in F's metric is
then per token of the data, whichever layer makes it. A micro-batch is multiplied in float32
(products of bfloat16 numbers are exact there) and added to a float64 sum.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from lrc_cli.data.padding import Masks, unpadded
from lrc_cli.errors import RunError
from lrc_cli.execution.hooks import hooked
from lrc_cli.execution.network import Network
from lrc_cli.network.layer import Layer
from lrc_cli.runtime.processes import Processes

# Only the lower triangle is needed: wide matrices are multiplied panel by panel, which spares up
# to 40 % of the products. Narrower panels would slow the matrix product itself.
PANEL = 256


class GramSum:
    """A float64 sum of x x^T over rows x, and the number of rows.

    Args:
        center: sum (x - mean) (x - mean)^T. Rows are multiplied less the mean of those that came
            with them, and the sums put together (Chan, Golub and LeVeque 1979): x x^T - mean mean^T
            would lose as many digits as the mean is larger than the deviations.
    """

    def __init__(self, width: int, device: torch.device, *, center: bool = False) -> None:
        # float64 is missing on Apple's GPUs; their sums are held on the CPU.
        holder = torch.device("cpu") if device.type == "mps" else device
        self.total = torch.zeros(width, width, dtype=torch.float64, device=holder)
        self.num_rows = 0
        self._mean = self.total.new_zeros(width) if center else None

    def add(self, rows: torch.Tensor) -> "Added":
        """Add rows of shape (t, n) in any floating dtype.

        Returns:
            What was multiplied.
        """
        added = Added(rows)
        if self._mean is not None and len(rows):
            added = self._around_mean(rows.float(), self._mean)
            added.correct(self.total, added)
        rows = added.rows
        self.num_rows += len(rows)
        with _exact_bfloat16(rows) as factor:
            for start in range(0, rows.shape[1], PANEL):
                stop = min(start + PANEL, rows.shape[1])
                panel = _product(factor[:, start:stop], factor[:, :stop])
                self.total[start:stop, :stop] += panel.to(self.total.device)
        return added

    def _around_mean(self, rows: torch.Tensor, mean: torch.Tensor) -> "Added":
        middle = rows.mean(dim=0)
        rows = rows - middle
        rest = rows.mean(dim=0, dtype=torch.float64).to(mean.device)
        step = middle.to(mean) + rest - mean
        share = len(rows) / (self.num_rows + len(rows))
        mean += step * share
        return Added(rows, rest, step, weight=self.num_rows * share)

    def sum_to(self, owner: int | None, processes: Processes) -> torch.Tensor | None:
        """Bring what all processes have added together at the rank `owner`; None: at each.

        Returns:
            With `center` (n,), by how much the mean of this process's rows was off that of all.
        """
        num_rows, step = sum(processes.gather(self.num_rows)), None
        if self._mean is not None:
            overall = self._mean * (self.num_rows / max(num_rows, 1))
            processes.sum_to(None, overall)
            step = self._mean - overall
            self.total.addr_(step, step, alpha=self.num_rows)
            self._mean = overall
        self.num_rows = num_rows
        processes.sum_to(owner, self.total)
        return step

    def mean(self, num: int | None = None) -> torch.Tensor:
        """The Gram matrix divided by the number of rows: (n, n), float64, symmetric.

        With `center` it is that of x - mean(x).

        Args:
            num: what to divide by in place of the number of rows.
        """
        lower = self.lower(num).tril()
        return lower + lower.tril(-1).T

    def lower(self, num: int | None = None) -> torch.Tensor:
        """As `mean`, but of what is above the diagonal nothing counts."""
        return self.total / max(self.num_rows if num is None else num, 1)

    def mean_row(self) -> torch.Tensor:
        """The mean of the rows (n,), float64; with `center` only."""
        if self._mean is None:
            raise ValueError("the mean was not collected")
        return self._mean


@dataclass(frozen=True)
class Added:
    """What one call of `GramSum.add` multiplied."""

    rows: torch.Tensor
    """(t, n); with `center` less their mean in float32, which is not quite their mean."""
    rest: torch.Tensor | None = None
    """With `center` the mean (n,) of `rows`, float64."""
    step: torch.Tensor | None = None
    """With `center` how far the rows' mean is from that of all rows before them (n,), float64."""
    weight: float = 0.0
    """Of a product of two steps."""

    def correct(self, total: torch.Tensor, other: "Added") -> None:
        """Make up for what sums of `self.rows` x `other.rows` leave out, with `center`, in place.

        Args:
            total: (n, n'), the sum around the mean.
            other: of rows that came with these, and were added to their sum as often.
        """
        if self.rest is None or other.rest is None:
            return
        assert self.step is not None and other.step is not None
        total.addr_(self.rest, other.rest, alpha=-len(self.rows))
        total.addr_(self.step, other.step, alpha=self.weight)


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
        device: the network's.
        center: whether inputs are summed around their mean.
    """

    def __init__(
        self,
        leaders: Mapping[str, str],
        graded: Sequence[Layer],
        device: torch.device,
        *,
        center: bool = False,
    ) -> None:
        self.leaders, self.graded = leaders, {layer.name for layer in graded}
        self.device = device
        self.grams: dict[str, GramSum] = {}
        """By leader; a layer that was never reached has no entry."""
        self.fishers: dict[str, GramSum] = {}
        """By layer; one that the loss does not depend on has no entry."""
        self.num_tokens = 0
        """Of the micro-batches that ran backwards, as often as they did."""
        self.center = center

    @contextmanager
    def watching(self, network: Network, layers: Sequence[Layer], masks: Masks) -> Iterator[None]:
        """Within it, what passes through `layers` is added, forwards and backwards.

        Args:
            masks: of the micro-batch that runs.
        """

        def after_layer(layer: Layer, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor | None:
            if self.leaders.get(layer.name) == layer.name:
                _add(self.grams, layer.name, x.detach(), masks, center=self.center)
            if layer.name not in self.graded or not torch.is_grad_enabled():
                return None
            if not y.requires_grad:
                # Parameters are frozen, so gradients begin here; a clone, because a leaf may not
                # be changed in place by what follows.
                y = y.requires_grad_().clone()
            y.register_hook(lambda gradient: _add(self.fishers, layer.name, gradient, masks))
            return y

        with hooked(network, layers, after_layer):
            yield

    def sum_to(self, owners: Mapping[str, int], processes: Processes) -> None:
        """Bring every layer's sums together at its owner.

        The others keep the number of tokens only, of layers too that reached other processes alone.

        Args:
            owners: ranks by layer.
        """
        self.num_tokens = sum(processes.gather(self.num_tokens))
        for sums, center in ((self.grams, self.center), (self.fishers, False)):
            widths: dict[str, int] = {}
            for found in processes.gather({name: len(gram.total) for name, gram in sums.items()}):
                widths |= found
            for name, width in widths.items():
                if name not in sums:
                    sums[name] = GramSum(width, self.device, center=center)
                sums[name].sum_to(owners[name], processes)

    def check_finite(self, names: Sequence[str]) -> None:
        """Raise RunError if an activation or a gradient of these layers is NaN or infinite."""
        for what, sums in (("inputs", self.grams), ("output gradients", self.fishers)):
            for name in names:
                if name in sums and not bool(torch.isfinite(sums[name].total.diagonal().sum())):
                    raise RunError(
                        f"{name}: NaN or infinity in its {what} on the calibration data",
                        "set runtime.dtype: float32, or look for a damaged weight before it",
                    )


def _add(
    sums: dict[str, GramSum],
    name: str,
    tensor: torch.Tensor,
    masks: Masks,
    *,
    center: bool = False,
) -> None:
    rows = unpadded(tensor, masks).reshape(-1, tensor.shape[-1])
    if name not in sums:
        sums[name] = GramSum(tensor.shape[-1], tensor.device, center=center)
    sums[name].add(rows)
