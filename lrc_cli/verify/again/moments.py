"""The layers' errors and moments on calibration data are measured once more.

Errors are direct sums of ||(W - Z) x||^2 over tokens. Second moments are summed for the optima
only, around an origin near their mean.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lrc_cli.data.draw import Batch, Sequences
from lrc_cli.data.padding import Masks, masks_of, unpadded
from lrc_cli.execution.chain import Chain
from lrc_cli.execution.glance import glance
from lrc_cli.execution.hooks import hooked, watched
from lrc_cli.execution.in_parts import InParts
from lrc_cli.execution.losses import Loss, backward_scalars, drawing, num_scalars, prepare
from lrc_cli.execution.network import Network
from lrc_cli.execution.precision import recast_in_backward
from lrc_cli.network.layer import Layer
from lrc_cli.verify.again.behind_relu import Behind
from lrc_cli.verify.again.magnitudes import energy, fits, narrowed, product

STATISTICS_TOKENS = 2048
"""The number of tokens that run together, as in the run: draws go batch by batch."""
PANEL = 256
DAMPING = 1e-3
"""The damping of F, as a share of its mean eigenvalue (docs/theory.md)."""
HELD_BYTES = 1 << 30
"""Differences W - Z are held in float32 if all of them together take no more bytes."""


@dataclass(frozen=True, kw_only=True)
class Checked:
    """Holds what was written for one factorised layer."""

    layer: Layer
    weight: Tensor
    """W (m, n), as in the original."""
    fitted: Callable[[], Tensor]
    """Z (m, n) float64, from the written tensors."""
    offset: Tensor | None
    """(m,) float64 old bias - new bias; None where the bias is unchanged."""
    bias: Tensor | None
    """The original's bias (m,)."""
    held: bool = True
    """Whether W - Z is computed once and kept."""

    def difference(self) -> Tensor:
        """Returns W - Z (m, n), float32; float64 where squares of its entries leave float32."""
        return self._kept_difference if self.held else self._subtracted()

    @cached_property
    def _kept_difference(self) -> Tensor:
        return self._subtracted()

    def _subtracted(self) -> Tensor:
        return narrowed(self.weight.double() - self.fitted().to(self.weight.device))


@dataclass(kw_only=True)
class Sums:
    """Sums a layer's error and energy over tokens."""

    checked: Checked
    """The layer."""
    error: float = 0.0
    """Sum over tokens of ||W x - Z x||^2, or of ||W x - Z x~||^2, with biases if they differ."""
    energy: float = 0.0
    """Sum over tokens of ||W x||^2."""
    num_tokens: int = 0

    @property
    def mean_error(self) -> float:
        """The error per token. Raises ZeroDivisionError where no token reached the layer."""
        return self.error / self.num_tokens

    @property
    def mean_energy(self) -> float:
        """||W x||^2 per token."""
        return self.energy / max(self.num_tokens, 1)

    def add_error(self, rows: Tensor) -> None:
        """Adds output differences (t, m) without biases; the biases' difference is added here."""
        if self.checked.offset is not None:
            rows = rows + self.checked.offset.to(rows)
        self.error += energy(rows)

    def add_energy(self, inputs: Tensor, outputs: Tensor) -> None:
        """Adds inputs (t, n) and outputs (t, m) of the dense layer."""
        # Outputs less a large bias would hold nothing but rounding.
        checked = self.checked
        has_digits = checked.bias is None and fits(inputs) and fits(checked.weight)
        rows = outputs if has_digits else product(inputs, checked.weight)
        self.energy += energy(rows)
        self.num_tokens += len(outputs)


class Moments:
    """Sums x and x x^T over rows x, around the mean of the rows that came first."""

    def __init__(self) -> None:
        self.count = 0
        self.origin = self.first = self.second = torch.zeros(0)

    def add(self, rows: Tensor) -> None:
        """Adds rows (t, n) in any floating dtype: products in float32, sums in float64.

        Products are in float64 too where squares of a column would leave float32.
        """
        rows = narrowed(rows)
        if not self.count:
            n = rows.shape[1]
            self.origin = rows.double().mean(dim=0).to(rows)
            self.first = torch.zeros(n, dtype=torch.float64, device=rows.device)
            self.second = torch.zeros(n, n, dtype=torch.float64, device=rows.device)
        self.count += len(rows)
        rows = narrowed(rows - self.origin)
        self.first += rows.sum(dim=0, dtype=torch.float64)
        for start in range(0, rows.shape[1], PANEL):
            stop = start + PANEL
            self.second[start:stop, :stop] += rows[:, start:stop].T @ rows[:, :stop]

    @property
    def mean(self) -> Tensor:
        """The mean row (n,), float64."""
        return self.origin.double() + self.first / self.count

    def covariance(self) -> Tensor:
        """Returns the second moments around the mean (n, n), float64."""
        lower = self.second.tril()
        near = (lower + lower.tril(-1).T) / self.count
        drift = self.first / self.count
        return near - torch.outer(drift, drift)

    def gram(self) -> Tensor:
        """Returns the second moments around zero (n, n), float64."""
        return self.covariance() + torch.outer(self.mean, self.mean)


def batch_size(sequences: Sequences, num_positions: int) -> int:
    """Returns how many sequences have about `num_positions` positions together, at least one."""
    sizes = [
        tensor[0].numel() // (tensor.shape[-1] if tensor.is_floating_point() else 1)
        for tensor in sequences.inputs.values()
    ]
    return max(1, num_positions // max(1, *sizes))


def shared_inputs(network: Network, layers: Sequence[Layer], batch: Batch) -> dict[str, str]:
    """Returns {layer reached: first layer that reads the same rows in every call}."""
    layouts = {layer.name: layer.layout for layer in layers}
    seen: dict[str, list[Tensor]] = {}
    versions: dict[str, list[int]] = {}

    def look(layer: Layer, x: Tensor, _: Tensor) -> None:
        seen.setdefault(layer.name, []).append(x)
        versions.setdefault(layer.name, []).append(x._version)

    with torch.no_grad(), watched(network, layers, look):
        glance(network, batch)
    groups: dict[str, str] = {}
    for name in seen:
        same = (
            other
            for other in dict.fromkeys(groups.values())
            if (versions[other], layouts[other]) == (versions[name], layouts[name])
            and len(seen[other]) == len(seen[name])
            and all(_is_same(a, b) for a, b in zip(seen[other], seen[name], strict=True))
        )
        groups[name] = next(same, name)
    return groups


def _is_same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.stride() == b.stride() and a.data_ptr() == b.data_ptr()


def measure_inputs(
    network: Network,
    chain: Chain,
    sequences: Sequences,
    layers: Sequence[Checked],
    graded: Sequence[Checked],
    *,
    groups: Mapping[str, str],
    behind: Mapping[str, Behind],
    loss: Loss | None,
    seed: int,
    advance: Callable[[int], None],
) -> tuple[dict[str, Sums], dict[str, Moments], dict[str, Tensor]]:
    """Runs the dense network once over the calibration data.

    Args:
        chain: the blocks of the network in the run.
        layers: the layers that were fitted to the dense network's inputs.
        graded: the layers whose output gradients are wanted; needs `loss`.
        groups: the leader of each layer, which is the first layer that reads the same input.
        behind: sums behind a ReLU, by layer; this pass adds to them.

    Returns:
        The errors of `layers` by layer, moments of inputs by leader, and F (m, m) float64, damped,
        by layer of `graded`.
    """
    inputs: dict[str, Moments] = {}
    gradients: dict[str, Moments] = {}
    num_tokens = 0
    by_name = {checked.layer.name: Sums(checked=checked) for checked in layers}
    wanted = {checked.layer.name for checked in graded}
    masks: Masks = ()

    def begin(given: Masks) -> None:
        nonlocal masks
        masks = given

    def after_layer(layer: Layer, x: Tensor, y: Tensor) -> Tensor | None:
        if layer.name in by_name:
            sums = by_name[layer.name]
            rows, outputs = (real_rows(tensor.detach(), masks) for tensor in (x, y))
            sums.add_error(product(rows, sums.checked.difference()))
            sums.add_energy(rows, outputs)
            if layer.name in behind:
                behind[layer.name].add(rows, sums.checked.weight, sums.checked.difference())
            if groups[layer.name] == layer.name:
                inputs.setdefault(layer.name, Moments()).add(rows)
        if layer.name not in wanted or loss is None:
            return None
        if not y.requires_grad:
            y = y.requires_grad_().clone()
        moments = gradients.setdefault(layer.name, Moments())
        y.register_hook(lambda gradient: moments.add(real_rows(gradient, masks)))
        return y

    masking = torch.Generator().manual_seed(seed)
    hooks = {checked.layer.name: checked.layer for checked in (*layers, *graded)}
    with hooked(network, list(hooks.values()), after_layer):
        for index, batch in enumerate(sequences.batches(batch_size(sequences, STATISTICS_TOKENS))):
            run_batch(network, chain, batch, loss, masking, drawing(seed, index), begin)
            num_tokens += _num_tokens(batch) * (1 if loss is None else num_scalars(loss))
            advance(len(next(iter(batch.values()))))
    reached = {name: sums for name, sums in gradients.items() if sums.count}
    return by_name, inputs, {name: damped(sums, num_tokens) for name, sums in reached.items()}


def damped(gradients: Moments, num_tokens: int) -> Tensor:
    """Returns F (m, m) float64, damped: a sum over a layer's rows, per token of the data."""
    fisher = gradients.gram() * (gradients.count / num_tokens)
    identity = torch.eye(len(fisher), dtype=fisher.dtype, device=fisher.device)
    return fisher + DAMPING * fisher.diagonal().mean() * identity


def _num_tokens(batch: Batch) -> int:
    """Returns the number of tokens (a decoder's first) without padding, else of sequences."""
    for prefix in ("decoder_", ""):
        ids = batch.get(f"{prefix}input_ids")
        if ids is not None:
            mask = batch.get(f"{prefix}attention_mask", torch.ones_like(ids))
            return int(mask.count_nonzero())
    return len(next(iter(batch.values())))


def real_rows(tensor: Tensor, masks: Masks) -> Tensor:
    """Returns the entries (t, width) of the tokens that are not padding."""
    return unpadded(tensor, masks).reshape(-1, tensor.shape[-1])


def run_batch(
    network: Network,
    chain: Chain,
    batch: Batch,
    loss: Loss | None,
    masking: torch.Generator,
    generator: torch.Generator,
    begin: Callable[[Masks], None],
) -> None:
    """Runs a micro-batch forwards and, given a loss, backwards.

    Args:
        chain: the blocks of the network in the run.
        masking: draws which tokens are masked.
        generator: draws labels or probes.
        begin: called with the masks of the positions that run next.
    """
    inputs, labels = (batch, None) if loss is None else prepare(loss, batch, masking)
    with torch.set_grad_enabled(loss is not None), recast_in_backward(network.casts):
        begin(masks_of(batch))
        run = InParts(network, chain, inputs)
        for part in run.parts:
            masks = masks_of(part.cut(batch))
            begin(masks)
            outputs = run.outputs(part)
            if loss is not None:
                scored = None if labels is None else part.of(labels)
                scalars = backward_scalars(loss, outputs, scored, generator, masks)
                for probe, scalar in enumerate(scalars):
                    if scalar.requires_grad:
                        scalar.backward(retain_graph=probe + 1 < num_scalars(loss))
                    run.collect(probe)
        begin(masks_of(batch))
        run.backward()
