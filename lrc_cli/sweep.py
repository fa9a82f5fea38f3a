"""One pass over the calibration data, segment by segment, that stops and goes on anywhere.

Without gradients a segment's layers are measured as the network walks forward. With them it first
walks to its tail and writes down what every segment reads; then the segments come last to first:
each reads its inputs back, runs once more with autograd, takes the gradient at its output to the
one at its input, and is measured in that one run.

    <work>/inputs/<segment>      what the segment reads, every micro-batch
    <work>/gradients/<segment>   the gradients of the loss by it
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from lrc_cli.blocks import HEAD, TAIL, WHOLE, Chain, Segment
from lrc_cli.calibration import Batch
from lrc_cli.errors import RunError
from lrc_cli.losses import Loss, backward_scalars, num_scalars, prepare, unpadded
from lrc_cli.models import Layer, Network
from lrc_cli.precision import recast_in_backward
from lrc_cli.statistics import Moments
from lrc_cli.walk import Keep, Walk
from lrc_cli.work import GRADIENTS, INPUTS, Tensors, WorkDirectory

BACKWARD_COST = 3.0
"""Of a segment that is run again with gradients, and backwards, in forward runs of it."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to measure, on what."""

    network: Network
    chain: Chain
    segments: Sequence[Segment]
    """The network's, with the layers that are to be measured."""
    batches: Sequence[Batch]
    leaders: Mapping[str, str]
    """{layer: first layer of its segment that reads the same input}."""
    graded: Collection[str]
    """Layers whose output gradients are measured (needs `loss`)."""
    loss: Loss | None
    seed: int
    """Of masked tokens, drawn labels and probes."""
    center: bool


class Sweep:
    """The pass over the data.

    Args:
        finished: whether a segment was measured before.
        finish: called with a measured segment, once.
        keep: what becomes of tensors between two segments; see `HostMemory.keep`.
    """

    def __init__(
        self,
        job: Job,
        work: WorkDirectory,
        *,
        finished: Callable[[Segment], bool],
        finish: Callable[[Segment, Moments], None],
        keep: Keep = torch.Tensor.detach,
    ) -> None:
        self.job, self.work, self.finished, self.finish = job, work, finished, finish
        self.keep = keep
        self.generator = torch.Generator().manual_seed(job.seed)
        # All masks come before the first label or probe, so that they do not depend on how far
        # an earlier run has come.
        prepared = [
            (batch, None) if job.loss is None else prepare(job.loss, batch, self.generator)
            for batch in job.batches
        ]
        self.labels = [labels for _, labels in prepared]
        self.walk = Walk(job.network, job.chain, [batch for batch, _ in prepared], keep)

    @cached_property
    def first_graded(self) -> int:
        """The number of the first segment that is measured backwards; of all, if none is."""
        segments = self.job.segments
        graded = (i for i, s in enumerate(segments) if any(self._graded(s)))
        return min(graded, default=len(segments))

    def _graded(self, segment: Segment) -> list[Layer]:
        return [layer for layer in segment.layers if layer.name in self.job.graded]

    @cached_property
    def forward(self) -> range:
        """Numbers of the segments that are left to walk through."""
        segments, first = self.job.segments, self.first_graded
        if any(self.work.has(GRADIENTS, segment.name) for segment in segments):
            return range(0)
        measured = [i for i, segment in enumerate(segments) if segment.layers]
        end = len(segments) - 1 if first < len(segments) else max(measured) + 1
        left = [i for i in measured if i < min(first, end) and not self.finished(segments[i])]
        latest = min([*left, end, len(segments) - 1])
        known = [i for i in range(latest + 1) if self.work.has(INPUTS, segments[i].name)]
        return range(max(known, default=0), end)

    @cached_property
    def backward(self) -> range:
        """Numbers of the segments that are left to run backwards, last to first."""
        segments, first = self.job.segments, self.first_graded
        end = len(segments) - 1
        left = [i for i in range(first, end + 1) if segments[i].layers]
        start = max((i for i in left if not self.finished(segments[i])), default=first - 1)
        # A segment with no layer to measure leaves nothing but the gradient.
        while first <= start < end and not self.work.has(GRADIENTS, segments[start + 1].name):
            start += 1
        return range(start, first - 1, -1)

    @property
    def cost(self) -> float:
        """Of what is left to do, in the unit of `advance`."""
        forward = sum(self._cost(i) for i in self.forward)
        return forward + BACKWARD_COST * sum(self._cost(i) for i in self.backward)

    def _cost(self, number: int) -> float:
        """Of one segment's forward run, over all data: multiplications per token."""
        name, module = self.job.segments[number].name, self.job.network.module
        if name in self.job.chain.names:
            return float(_num_parameters(module.get_submodule(name)))
        blocks = sum(_num_parameters(module.get_submodule(x)) for x in self.job.chain.names)
        return float(_num_parameters(module) - blocks) if name != HEAD else 1.0

    def run(self, advance: Callable[[float], None]) -> None:
        """Measure what is left.

        Args:
            advance: called with the cost of every step that is done.

        Raises:
            RunError: an activation or a gradient is NaN or infinite, or the disk is full.
        """
        if self.job.chain.names and (not self.forward or self.forward.start):
            self._enter()
        for number in self.forward:
            self._walk(number, advance)
        self.walk.hidden.clear()
        for number in self.backward:
            self._return(number, advance)

    def _enter(self) -> None:
        """Bring the walk to where an earlier run has come."""
        for index in range(len(self.walk.batches)):
            self.walk.run(self.job.segments[0], index)
        if self.forward:
            stored, _ = self.work.get(INPUTS, self.job.segments[self.forward.start].name)
            self.walk.hidden = {int(index): hidden for index, hidden in stored.items()}

    def _walk(self, number: int, advance: Callable[[float], None]) -> None:
        """Run a segment forwards; measure it if no gradients are wanted of it."""
        segments, is_before = self.job.segments, number < self.first_graded
        segment, following = segments[number], segments[number + 1 : number + 2]
        measures = is_before and bool(segment.layers) and not self.finished(segment)
        moments = self._moments(segment)
        for index, batch in enumerate(self.walk.batches):
            mask = batch.get("attention_mask")
            with moments.watching(self.job.network, segment.layers if measures else [], mask):
                output = self.walk.run(segment, index)
            if following:
                _check_output(segment, output, mask)
            self.walk.pass_on(segment, index, output)
            advance(self._cost(number) / len(self.walk.batches))
        for reader in following:
            if number + 1 in self.forward or number + 1 >= self.first_graded:
                self.work.put(INPUTS, reader.name, _numbered(self.walk.hidden), {})
        if measures:
            self.finish(segment, moments)
        if is_before:
            self.work.remove(INPUTS, segment.name)

    def _return(self, number: int, advance: Callable[[float], None]) -> None:
        """Run a segment again with gradients, and backwards, and measure it."""
        segments, first = self.job.segments, self.first_graded
        segment, is_last = segments[number], number + 1 == len(segments)
        inputs: Tensors = {}
        if segment.name not in (HEAD, WHOLE):
            inputs, _ = self.work.get(INPUTS, segment.name)
        above = {} if is_last else self.work.get(GRADIENTS, segments[number + 1].name)[0]
        below: Tensors = {}
        moments = self._moments(segment)
        for index in range(len(self.walk.batches)):
            hidden = inputs.get(str(index))
            if hidden is not None:
                hidden = hidden.to(self.job.network.device, copy=True)
                hidden.requires_grad_(number > first)
            self._back(segment, index, hidden, moments, above, below)
            advance(BACKWARD_COST * self._cost(number) / len(self.walk.batches))
        if number > first:
            self.work.put(GRADIENTS, segment.name, below, {})
        if segment.layers and not self.finished(segment):
            self.finish(segment, moments)
        self.work.remove(INPUTS, segment.name)
        if not is_last:
            self.work.remove(GRADIENTS, segments[number + 1].name)

    def _back(
        self,
        segment: Segment,
        index: int,
        hidden: torch.Tensor | None,
        moments: Moments,
        above: Tensors,
        below: Tensors,
    ) -> None:
        """One micro-batch; the gradients by `hidden` are added to `below`."""
        loss, network = self.job.loss, self.job.network
        assert loss is not None
        mask = self.walk.batches[index].get("attention_mask")
        with (
            recast_in_backward(network.casts),
            moments.watching(network, segment.layers, mask),
        ):
            # A clone, because a leaf may not be changed in place.
            given = None if hidden is None else hidden.clone()
            output = self.walk.run(segment, index, given, gradients=True)
            num_probes = num_scalars(loss)
            for probe, (root, gradient) in enumerate(self._roots(segment, index, output, above)):
                # Without either, no measured layer has a say in the loss.
                if root.requires_grad and gradient is not None:
                    root.backward(gradient, retain_graph=probe + 1 < num_probes)
                if hidden is not None and hidden.grad is not None:
                    below[f"{index}.{probe}"] = self.keep(hidden.grad)
                    hidden.grad = None

    def _roots(
        self, segment: Segment, index: int, output: Any, above: Tensors
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """Where the backward passes begin, one for every probe, and the gradient there."""
        assert self.job.loss is not None
        if segment.name in (TAIL, WHOLE):
            mask, labels = self.walk.batches[index].get("attention_mask"), self.labels[index]
            for scalar in backward_scalars(self.job.loss, output, labels, self.generator, mask):
                yield scalar, torch.ones_like(scalar)
            return
        for probe in range(num_scalars(self.job.loss)):
            gradient = above.get(f"{index}.{probe}")
            yield output, None if gradient is None else gradient.to(output.device, copy=True)

    def _moments(self, segment: Segment) -> Moments:
        return Moments(self.job.leaders, self._graded(segment), center=self.job.center)


def _num_parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _numbered(hidden: Mapping[int, torch.Tensor]) -> Tensors:
    return {str(index): tensor for index, tensor in hidden.items()}


def _check_output(segment: Segment, output: torch.Tensor, mask: torch.Tensor | None) -> None:
    if not bool(torch.isfinite(unpadded(output, mask)).all()):
        raise RunError(
            f"{segment.name}: NaN or infinity in its outputs on the calibration data",
            "set runtime.dtype: float32, or look for a damaged weight in it",
        )
