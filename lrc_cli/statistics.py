"""Streaming second moments: Gram matrices of layer inputs and of output gradients.

G = (1/T) sum x x^T and F = (1/T) sum g g^T over the T tokens that are not padding. A chunk is
multiplied in float32 (products of bfloat16 numbers are exact there) and added to a float64 sum.
"""

from collections.abc import Callable, Mapping, Sequence

import torch

from lrc_cli.calibration import Batch, Sequences
from lrc_cli.errors import RunError
from lrc_cli.losses import Loss, backward_scalars, num_scalars, prepare, unpadded
from lrc_cli.models import Layer, Network, hooked
from lrc_cli.precision import recast_in_backward

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
        for start in range(0, rows.shape[1], PANEL):
            stop = min(start + PANEL, rows.shape[1])
            panel = _product(rows[:, start:stop], rows[:, :stop])
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


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    if left.is_cuda and left.dtype == torch.bfloat16:
        return torch.mm(left.T, right, out_dtype=torch.float32)
    return left.float().T @ right.float()


def collect(
    network: Network,
    sequences: Sequences,
    *,
    inputs: Mapping[str, Sequence[Layer]],
    outputs: Sequence[Layer],
    loss: Loss | None,
    seed: int,
    micro_batch: int,
    advance: Callable[[int], None],
    center: bool = False,
) -> tuple[dict[str, GramSum], dict[str, GramSum]]:
    """One pass over the calibration data.

    Args:
        inputs: {group: layers that read the same input}; the first one's input is measured.
        outputs: layers whose output gradients are measured (needs `loss`).
        seed: of masked tokens, drawn labels and probes.
        micro_batch: sequences run together.
        advance: called with the number of sequences done.
        center: whether inputs are summed around their mean.

    Returns:
        Sums by group, and by layer name. A layer that was never reached has no entry.

    Raises:
        RunError: an activation or a gradient is NaN or infinite; names the layer.
    """
    grams: dict[str, GramSum] = {}
    fishers: dict[str, GramSum] = {}
    leaders = {layers[0].name: group for group, layers in inputs.items()}
    measured = {layer.name for layer in outputs}
    hooks = {layer.name: layer for layers in inputs.values() for layer in layers[:1]}
    hooks |= {layer.name: layer for layer in outputs}
    mask: torch.Tensor | None = None

    def after_layer(layer: Layer, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor | None:
        if layer.name in leaders:
            _add(grams, leaders[layer.name], x.detach(), mask, center=center)
        if layer.name not in measured or loss is None:
            return None
        if not y.requires_grad:
            # Parameters are frozen, so gradients begin here; a clone, because a leaf may not be
            # changed in place by what follows.
            y = y.requires_grad_().clone()
        y.register_hook(lambda gradient: _add(fishers, layer.name, gradient, mask))
        return y

    generator = torch.Generator().manual_seed(seed)
    with hooked(network, list(hooks.values()), after_layer):
        for batch in sequences.batches(micro_batch):
            mask = batch.get("attention_mask")
            _run(network, batch, loss, generator)
            advance(len(next(iter(batch.values()))))
    _check_finite("inputs", grams)
    _check_finite("output gradients", fishers)
    return grams, fishers


def _run(network: Network, batch: Batch, loss: Loss | None, generator: torch.Generator) -> None:
    if loss is None:
        with torch.no_grad():
            network(batch)
        return
    model_inputs, labels = prepare(loss, batch, generator)
    with recast_in_backward(network.casts):
        outputs = network(model_inputs)
        remaining = num_scalars(loss)
        mask = batch.get("attention_mask")
        for scalar in backward_scalars(loss, outputs, labels, generator, mask):
            remaining -= 1
            if scalar.requires_grad:  # else no measured layer has a say in the loss
                scalar.backward(retain_graph=remaining > 0)


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
