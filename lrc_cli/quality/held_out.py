"""Certificates are made of the values measured here, which tell sequence by sequence what changed.

The dense and the written network run over the same sequences. A sequence is a row of the batch;
padded positions count nowhere. Outputs of layers are compared in float32, sums are float64.
"""

import dataclasses
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrc_cli.data.draw import Batch, Sequences, micro_batch
from lrc_cli.engine.magnitudes import norms
from lrc_cli.errors import RunError
from lrc_cli.execution.chain import WHOLE, Chain, Segment
from lrc_cli.execution.hooks import watched
from lrc_cli.execution.losses import Loss, prepare
from lrc_cli.execution.network import Network
from lrc_cli.execution.segments import find_segments
from lrc_cli.execution.walk import Keep, Pair
from lrc_cli.network.experts import is_expert
from lrc_cli.network.layer import Layer
from lrc_cli.network.parts import part_of
from lrc_cli.quality.per_sequence import SequenceValues, by_sequence, ratio
from lrc_cli.runtime.processes import ALONE, Processes

MICRO_BATCH_TOKENS = 512
"""The number of tokens for which the dense outputs of a segment's layers are held."""
ERRORS = ("deployed", "inherited", "new", "same_input")


class NotFinite(RunError):
    """An output of one of both networks, or of a layer, is NaN or infinite on held-out data."""


@dataclass(frozen=True, kw_only=True)
class LayerErrors:
    """Holds one layer's squared errors on N sequences, summed over a sequence's real tokens.

    With y = W x + b in the dense network and y~ = Z x~ + b~ in the compressed one:
    """

    energy: Tensor
    """||W x||^2, (N,) float64, as are the others."""
    deployed: Tensor
    """||y - y~||^2: the layer's error in the compressed network."""
    inherited: Tensor
    """||W x - W x~||^2: the error that the layer would have if it had stayed dense."""
    new: Tensor
    """||W x~ + b - y~||^2: the error that its own factors add.

    deployed <= inherited + new as norms.
    """
    same_input: Tensor
    """||y - (Z x + b~)||^2: the change by its factors on the dense network's inputs."""

    def relative(self, kind: str) -> Tensor:
        """Returns (N,) float64: each sequence's error relative to its ||W x||, see `ratio`."""
        return ratio(getattr(self, kind), self.energy)

    def overall(self, kind: str) -> float:
        """Returns the error over all sequences together, relative to their ||W x||."""
        return float(ratio(getattr(self, kind).sum(), self.energy.sum()))


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Holds everything measured on N sequences, in the order of the draw."""

    values: dict[str, list[float]]
    """The quantities, with one value per sequence; see `measure`."""
    layers: dict[str, LayerErrors]
    """The errors by layer name.

    A layer is absent where no token reached it, or where its tokens cannot be told apart by
    sequence (so for experts), or are not the same in both networks.
    """


def measure(
    before: Network,
    after: Network,
    sequences: Sequences,
    layers: Sequence[Layer],
    *,
    loss: Loss,
    seed: int,
    decompose: bool = True,
    advance: Callable[[float], None] = lambda _: None,
    keep: Keep = torch.Tensor.detach,
    only: Collection[str] | None = None,
    alike: bool = True,
    processes: Processes = ALONE,
) -> Measured:
    """Runs both networks over the same sequences and compares outputs, the layers' too.

    Args:
        layers: the factorised layers.
        loss: what `compare.scoring` returns.
        seed: the seed of masked tokens, where the network predicts masked tokens; they are drawn
            for all sequences at once.
        decompose: False leaves out `inherited` and `new`, and their product (they are 0 then).
        advance: called with the number of sequences done.
        keep: what becomes of hidden states between segments; see `HostMemory.keep`.
        only: names of segments to run in place of all, to see how long they take.
        alike: whether both networks have the same blocks; other networks run whole.
        processes: the processes that share the sequences; each of them calls this function.

    Returns:
        Values by quantity. With a likelihood of tokens: `kl`, the mean over scored tokens of the
        divergence KL(dense || compressed) of the predictions, nats; `top1_disagreement`, the share
        of scored tokens whose most likely prediction changed; `loss_difference`, the mean loss
        after less that before, nats per scored token. For any other network
        `relative_output_error`, ||f~(x) - f(x)|| / ||f(x)|| over the first output, and where that
        is called logits `kl` and `top1_disagreement` over a sequence's predictions; nothing where
        the output has no dimension for the sequences.

    Raises:
        NotFinite: an output, or a layer's output, is NaN or infinite.
    """
    # An expert may by chance get as many tokens as there are sequences.
    layers = [x for x in layers if not is_expert(before.module, x.name)]
    inputs, labels = prepare(loss, sequences.inputs, torch.Generator().manual_seed(seed))
    size = micro_batch(sequences, MICRO_BATCH_TOKENS)
    batches = list(dataclasses.replace(sequences, inputs=inputs).batches(size))
    cut = find_segments(before, layers, (), next(sequences.batches(1)))
    chain, all_segments = cut.chain, cut.segments
    if not alike:
        chain, all_segments = Chain(), [Segment(name=WHOLE, layers=list(layers))]
    pair = Pair(before, after, chain, batches, keep)
    comparison = _Comparison(before, after, layers, len(sequences), decompose=decompose)
    values: dict[str, list[float]] = {}
    own = processes.share(len(batches))
    segments = [s for s in all_segments if only is None or s.name in only]
    for segment in segments:
        for index in own:
            batch, start = batches[index], index * size
            each = SequenceValues(len(next(iter(batch.values()))))
            for part in pair.parts(segment, index):
                own_batch = part.cut(batch)
                watching = comparison.watching(segment, own_batch, start + part.start)
                outputs = pair.run(segment, index, watching, part=part)
                comparison.end()
                if outputs is not None:
                    wanted = None if labels is None else part.of(labels[start : start + size])
                    each.add(*outputs, own_batch, wanted, part.start)
            for name, found in each.values().items():
                values.setdefault(name, []).extend(found)
            advance(len(sequences) / len(own) / len(segments))
    comparison.unite(processes)
    return Measured(values=_united(values, processes), layers=comparison.layers())


class _Comparison:
    """Compares every layer's outputs while both networks run."""

    def __init__(
        self,
        before: Network,
        after: Network,
        layers: Sequence[Layer],
        num_sequences: int,
        *,
        decompose: bool,
    ) -> None:
        self.before, self.after, self.all, self.decompose = before, after, layers, decompose
        kinds = ("energy", *ERRORS)
        self.sums = {
            x.name: {kind: torch.zeros(num_sequences, dtype=torch.float64) for kind in kinds}
            for x in layers
        }
        self.reached: set[str] = set()
        self.lost: set[str] = set()
        self.outputs: dict[str, list[Tensor]] = {}
        self.batch: Batch = {}
        self.start = 0

    def watching(
        self, segment: Segment, batch: Batch, start: int
    ) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Returns what to enter around a run of the dense network, and then of the compressed one.

        Args:
            segment: the segment that they run.
            start: the number of the batch's first sequence.
        """
        layers = segment.layers
        self.batch, self.start, self.outputs = batch, start, {x.name: [] for x in layers}
        # Layers of either network are called on the other's inputs too.
        for network in (self.before, self.after):
            network.placement.occupy(segment.name)
        return (
            watched(self.before, layers, self._in_dense),
            watched(self.after, layers, self._in_compressed),
        )

    def end(self) -> None:
        """Notes as lost, after both networks have run, layers with dense outputs left over."""
        self.lost |= {name for name, left in self.outputs.items() if left}

    def unite(self, processes: Processes) -> None:
        """Adds what the other processes have compared; every sequence was one process's."""
        parts = processes.gather(self.sums)
        for name, kinds in self.sums.items():
            for kind in kinds:
                kinds[kind] = torch.stack([part[name][kind] for part in parts]).sum(dim=0)
        self.reached = set().union(*processes.gather(self.reached))
        self.lost = set().union(*processes.gather(self.lost))

    def layers(self) -> dict[str, LayerErrors]:
        """Returns the sums of every layer that could be followed through both networks."""
        followed = [x.name for x in self.all if x.name in self.reached - self.lost]
        for name in followed:
            if not all(bool(torch.isfinite(total).all()) for total in self.sums[name].values()):
                raise NotFinite(
                    f"{name}: NaN or infinity in its outputs on held-out data",
                    "set runtime.dtype: float32",
                )
        return {name: LayerErrors(**self.sums[name]) for name in followed}

    def _in_dense(self, layer: Layer, x: Tensor, y: Tensor) -> None:
        bias = getattr(_module(self.before, layer), "bias", None)
        rows = layer.layout.outputs(y).float()
        self._add(layer, "energy", rows if bias is None else rows - bias.float())
        self._add(layer, "same_input", _difference(layer, y, _module(self.after, layer)(x)))
        self.outputs[layer.name].append(y.clone())  # the next module may change it in place
        self.reached.add(layer.name)

    def _in_compressed(self, layer: Layer, x: Tensor, y: Tensor) -> None:
        if not self.outputs[layer.name] or self.outputs[layer.name][0].shape != y.shape:
            self.lost.add(layer.name)
            return
        dense = self.outputs[layer.name].pop(0)
        self._add(layer, "deployed", _difference(layer, dense, y))
        if self.decompose:
            between = _module(self.before, layer)(x)
            self._add(layer, "inherited", _difference(layer, dense, between))
            self._add(layer, "new", _difference(layer, between, y))

    def _add(self, layer: Layer, kind: str, rows: Tensor) -> None:
        squares = norms(rows).square()
        found = by_sequence(squares, self.batch)
        if found is None:
            self.lost.add(layer.name)
        else:
            self.sums[layer.name][kind][self.start : self.start + len(found)] += found.cpu()


def _module(network: Network, layer: Layer) -> Any:
    return part_of(network.module, layer.name)


def _difference(layer: Layer, first: Tensor, second: Tensor) -> Tensor:
    return layer.layout.outputs(first.float() - second.float())


def _united(values: dict[str, list[float]], processes: Processes) -> dict[str, list[float]]:
    """Returns all processes' values, in the order of the sequences. Raises NotFinite for NaN."""
    united: dict[str, list[float]] = {}
    for part in processes.gather(values):
        for name, found in part.items():
            united.setdefault(name, []).extend(found)
    for name, found in united.items():
        if not bool(torch.isfinite(torch.tensor(found)).all()):
            raise NotFinite(
                f"certification: the networks' outputs give no finite {name}",
                "set runtime.dtype: float32",
            )
    return united
