"""Both networks read the calibration data, and a layer's inputs in both are compared."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lrc_cli.data.draw import Sequences
from lrc_cli.data.padding import Masks, masks_of
from lrc_cli.execution.chain import Chain
from lrc_cli.execution.hooks import hooked
from lrc_cli.execution.in_parts import InParts
from lrc_cli.execution.network import Network
from lrc_cli.network.layer import Layer
from lrc_cli.verify.again.magnitudes import product
from lrc_cli.verify.again.moments import Checked, Moments, Sums, batch_size, real_rows

PAIR_TOKENS = 512
"""The number of tokens for which the inputs of all layers are held."""


class PairMoments:
    """Collects second moments of x~, a layer's input in the compressed network, and of x - x~."""

    def __init__(self) -> None:
        self.joint: Moments = Moments()

    def add(self, x: Tensor, compressed: Tensor) -> None:
        """Adds rows (t, n) of the same tokens in both networks."""
        self.joint.add(torch.cat([x.float() - compressed.float(), compressed.float()], dim=1))

    def means(self) -> tuple[Tensor, Tensor]:
        """Returns the mean x and the mean x~, (n,) float64 each."""
        drift, compressed = self.joint.mean.chunk(2)
        return drift + compressed, compressed

    def moments(self, *, center: bool) -> "Pair":
        """Returns the moments per token, around the means where the bias is free."""
        whole = self.joint.covariance() if center else self.joint.gram()
        n = len(whole) // 2
        return Pair(drift=whole[:n, :n], cross=whole[:n, n:], compressed=whole[n:, n:])


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Holds V = E E^T / T, S = E X~^T / T, C = X~ X~^T / T with E = X - X~; (n, n) float64 each."""

    drift: Tensor
    cross: Tensor
    compressed: Tensor

    @cached_property
    def gram(self) -> Tensor:
        """X X^T / T."""
        return self.compressed + self.cross + self.cross.T + self.drift


def measure_pairs(
    before: Network,
    after: Network,
    chain: Chain,
    sequences: Sequences,
    layers: Sequence[Checked],
    *,
    groups: Mapping[str, str],
    errors: bool,
    advance: Callable[[int], None],
) -> tuple[dict[str, Sums], dict[str, PairMoments]]:
    """Runs both networks over calibration data.

    Args:
        chain: the blocks of both networks.
        layers: the layers that were fitted to the compressed network's inputs; each runs once in a
            pass.
        groups: the leader of each layer, which is the first layer that reads the same input.
        errors: whether the layers' errors on these sequences are summed.

    Returns:
        The errors by layer, and the moments of input pairs by leader.
    """
    pairs: dict[str, PairMoments] = {}
    seen: dict[str, Tensor] = {}
    by_name = {checked.layer.name: Sums(checked=checked) for checked in layers}
    masks: Masks = ()

    def in_dense(layer: Layer, x: Tensor, y: Tensor) -> None:
        rows = real_rows(x, masks)
        if groups[layer.name] == layer.name:
            seen[layer.name] = rows.clone()
        if errors:
            by_name[layer.name].add_energy(rows, real_rows(y, masks))

    def in_compressed(layer: Layer, x: Tensor, _: Tensor) -> None:
        sums, compressed = by_name[layer.name], real_rows(x, masks).float()
        leader, checked = groups[layer.name], sums.checked
        drift = seen[leader].float() - compressed
        if errors:
            sums.add_error(
                product(compressed, checked.difference()) + product(drift, checked.weight)
            )
        if leader == layer.name:
            pairs.setdefault(layer.name, PairMoments()).add(drift + compressed, compressed)

    own = [checked.layer for checked in layers]
    with torch.no_grad(), hooked(before, own, in_dense), hooked(after, own, in_compressed):
        for batch in sequences.batches(batch_size(sequences, PAIR_TOKENS)):
            masks = masks_of(batch)
            runs = [InParts(network, chain, batch) for network in (before, after)]
            for part in runs[0].parts:
                masks = masks_of(part.cut(batch))
                for run in runs:
                    run.outputs(part)
            advance(len(next(iter(batch.values()))))
    return by_name, pairs
