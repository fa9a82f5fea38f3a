"""Second moments are summed as data streams by: Gram matrices of inputs and output gradients.

G = (1/N) sum x x^T over the N rows that reach a layer. F = (1/T) sum g g^T over the same rows is
divided by the T calibration tokens. T is the same for all layers, so an error in F's metric is per
token of the data in every layer. A micro-batch is multiplied in float32 (products of bfloat16
numbers are exact there) and added to a float64 sum.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from lrc_cli.data.padding import Masks, unpadded
from lrc_cli.engine.magnitudes import column_scales, divided
from lrc_cli.errors import RunError
from lrc_cli.execution.hooks import hooked
from lrc_cli.execution.network import Network
from lrc_cli.network.layer import Layer
from lrc_cli.runtime.processes import Processes

PANEL = 256
"""Columns that are multiplied at once.

Only the lower triangle is needed, so panels spare up to 40 % of the products of a wide matrix.
Narrower panels would slow the matrix product itself.
"""


class GramSum:
    """A float64 sum of x x^T over rows x, and the number of rows.

    Args:
        center: whether (x - mean) (x - mean)^T is summed. Each call's rows are multiplied around
            their own mean, and the sums are combined (Chan, Golub and LeVeque 1979). The difference
            x x^T - mean mean^T would lose digits where the mean is larger than the deviations.
    """

    def __init__(self, width: int, device: torch.device, *, center: bool = False) -> None:
        # Apple's GPUs have no float64, so the CPU holds their sums.
        holder = torch.device("cpu") if device.type == "mps" else device
        self.total = torch.zeros(width, width, dtype=torch.float64, device=holder)
        self.num_rows = 0
        self._mean = self.total.new_zeros(width) if center else None

    def add(self, rows: torch.Tensor) -> "Added":
        """Adds rows of shape (t, n) in any floating dtype, and returns what was multiplied."""
        added = Added.scaled(rows)
        if self._mean is not None and len(rows):
            added = self._around_mean(added, self._mean)
            added.correct(self.total, added)
        rows = added.rows
        self.num_rows += len(rows)
        with _exact_bfloat16(rows) as factor:
            for start in range(0, rows.shape[1], PANEL):
                stop = min(start + PANEL, rows.shape[1])
                panel = _product(factor[:, start:stop], factor[:, :stop]).to(self.total.device)
                if added.scales is not None:
                    panel = panel * added.scales[start:stop, None] * added.scales[:stop]
                self.total[start:stop, :stop] += panel
        return added

    def _around_mean(self, added: "Added", mean: torch.Tensor) -> "Added":
        rows = added.rows.float()
        middle = rows.mean(dim=0)
        rows = rows - middle
        rest = rows.mean(dim=0, dtype=torch.float64).to(mean.device)
        middle = middle.to(mean)
        if added.scales is not None:
            rest, middle = rest * added.scales, middle * added.scales
        step = middle + rest - mean
        part = len(rows) / (self.num_rows + len(rows))
        mean += step * part
        # Deviations may be much smaller than the numbers themselves.
        own = Added.scaled(rows, added.scales)
        return replace(own, rest=rest, step=step, weight=self.num_rows * part)

    def sum_to(self, owner: int | None, processes: Processes) -> torch.Tensor | None:
        """Sums over all processes. The rank `owner` gets the sum; None: every process gets it.

        Returns:
            With `center` (n,), the mean of this process's rows less the mean of all rows.
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
        """Returns the Gram matrix divided by the number of rows: (n, n), float64, symmetric.

        With `center` the matrix is the covariance of the rows.

        Args:
            num: what to divide by in place of the number of rows.
        """
        lower = self.lower(num).tril()
        return lower + lower.tril(-1).T

    def lower(self, num: int | None = None) -> torch.Tensor:
        """Returns `mean`, of which only the lower triangle is valid."""
        return self.total / max(self.num_rows if num is None else num, 1)

    def mean_row(self) -> torch.Tensor:
        """Returns the mean of the rows (n,), float64. Only sums with `center` have it."""
        if self._mean is None:
            raise ValueError("the mean was not collected")
        return self._mean


@dataclass(frozen=True)
class Added:
    """What one call of `GramSum.add` multiplied."""

    rows: torch.Tensor
    """(t, n); with `center` less their mean as computed in float32."""
    scales: torch.Tensor | None = None
    """(n,) float64, powers of two by which the columns of `rows` were divided; None: by 1."""
    rest: torch.Tensor | None = None
    """With `center` the mean (n,) of `rows`, float64: rounding to float32 leaves one."""
    step: torch.Tensor | None = None
    """With `center` (n,), float64: the rows' mean less the mean of all rows before them."""
    weight: float = 0.0
    """The factor of the product of two steps in the combined sum."""

    @classmethod
    def scaled(cls, rows: torch.Tensor, scales: torch.Tensor | None = None) -> "Added":
        """Returns rows of which all products fit float32.

        Args:
            rows: (t, n) in any floating dtype.
            scales: what the columns were divided by already.
        """
        more = column_scales(rows)
        if more is None:
            return cls(rows, scales)
        return cls(divided(rows, more), more if scales is None else scales * more)

    def times(self, other: "Added") -> torch.Tensor:
        """Returns the products of the columns of two sums of the same tokens, (n, n') float64."""
        product = (self.rows.float().T @ other.rows.float()).double()
        if self.scales is not None:
            product *= self.scales[:, None]
        if other.scales is not None:
            product *= other.scales
        return product

    def correct(self, total: torch.Tensor, other: "Added") -> None:
        """Adds to `total`, with `center`, what products of `self.rows` and `other.rows` leave out.

        Args:
            total: (n, n'), the sum around the mean.
            other: rows of the same tokens, whose sum has had as many calls.
        """
        if self.rest is None or other.rest is None:
            return
        assert self.step is not None and other.step is not None
        total.addr_(self.rest, other.rest, alpha=-len(self.rows))
        total.addr_(self.step, other.step, alpha=self.weight)


@contextmanager
def _exact_bfloat16(rows: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yields the rows in the dtype to multiply; products of bfloat16 rows are exact and fast.

    A CPU has no product of bfloat16 matrices that keeps float32 sums. A product of float32 matrices
    may round its factors to bfloat16, which changes nothing in rows that were bfloat16.
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
    """The Gram matrices of inputs and output gradients, for layers that run together.

    Args:
        leaders: {layer: first layer that reads the same input}; the leader's input is measured.
        graded: layers whose output gradients are measured too.
        device: the device of the network.
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
        """{leader: sum over inputs}; a layer that was never reached has no entry."""
        self.fishers: dict[str, GramSum] = {}
        """{layer: sum over output gradients}; a layer without effect on the loss has no entry."""
        self.num_tokens = 0
        """Tokens that ran backwards. A token counts once for each of its backward passes."""
        self.center = center

    @contextmanager
    def watching(self, network: Network, layers: Sequence[Layer], masks: Masks) -> Iterator[None]:
        """Adds everything that passes through `layers` inside the context, forwards and backwards.

        Args:
            masks: the masks of the micro-batch that runs.
        """

        def after_layer(layer: Layer, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor | None:
            if self.leaders.get(layer.name) == layer.name:
                _add(self.grams, layer.name, x.detach(), masks, center=self.center)
            if layer.name not in self.graded or not torch.is_grad_enabled():
                return None
            if not y.requires_grad:
                # Parameters are frozen, so gradients begin here. The clone may be changed in place
                # by what follows, and a leaf may not.
                y = y.requires_grad_().clone()
            y.register_hook(lambda gradient: _add(self.fishers, layer.name, gradient, masks))
            return y

        with hooked(network, layers, after_layer):
            yield

    def sum_to(self, owners: Mapping[str, int], processes: Processes) -> None:
        """Sums every layer over all processes; the layer's owner gets the sum.

        The other processes get the number of rows only. They get it for every layer that some
        process has reached.

        Args:
            owners: {layer: rank of its owner}.
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
        """Raises RunError if an activation or a gradient of these layers is NaN or infinite."""
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
