"""One pass over the calibration data goes segment by segment, and can stop and go on anywhere.

Without gradients, a segment's layers are measured as the network walks forward. With gradients, the
network first walks to its tail and writes down what every segment reads. The segments then come
last to first. Each segment reads its inputs back, runs once more with autograd, takes the gradient
from its output to its input, and is measured in the same run.

    <work>/inputs/<segment>/<micro-batch>      what the segment reads
    <work>/gradients/<segment>/<micro-batch>   the loss's gradients by it, one tensor a probe

Inputs that the way back needs are always written. Everything else that passes from one segment to
the next stays in memory. It is also written every few seconds, so the next run can go on from it.

Several processes share the micro-batches and come to the end of a segment together. Nothing written
depends on the number of processes, so another number may go on.
"""

import time
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lrc_cli.data.draw import Batch
from lrc_cli.data.padding import Masks, masks_of, unpadded
from lrc_cli.errors import RunError
from lrc_cli.execution.chain import HEAD, TAIL, WHOLE, Chain, Segment
from lrc_cli.execution.constancy import check_graded, outputs_of
from lrc_cli.execution.losses import (
    Loss,
    backward_scalars,
    count_tokens,
    drawing,
    num_scalars,
    prepare,
)
from lrc_cli.execution.network import Network
from lrc_cli.execution.precision import recast_in_backward
from lrc_cli.execution.tail import Part
from lrc_cli.execution.walk import Keep, Walk
from lrc_cli.job.statistics.moments import Moments
from lrc_cli.job.work import GRADIENTS, INPUTS, Background, Tensors, WorkDirectory
from lrc_cli.network.layer import Layer
from lrc_cli.network.parts import part_of

Measured = Generator[tuple[Segment, Moments], None, None]
"""Segments with the moments that one process has summed in each segment."""
STORE_EVERY = 10.0
"""Seconds of work that a stopped run may have to repeat, beside the segment that was running."""
BACKWARD_COST = 3.0
"""The cost of running a segment again with gradients and backwards, in forward runs."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What a pass measures, and on which data."""

    network: Network
    chain: Chain
    segments: Sequence[Segment]
    """The segments of the network, with the layers to measure in each segment."""
    batches: Sequence[Batch]
    leaders: Mapping[str, str]
    """{layer: first layer of its segment that reads the same input}."""
    graded: Collection[str]
    """Layers whose output gradients are measured, which needs `loss`."""
    loss: Loss | None
    seed: int
    """The seed of masked tokens, drawn labels and probes."""
    center: bool


@dataclass(frozen=True, kw_only=True)
class Remaining:
    """What a pass has left to do, as numbers of segments."""

    unfinished: Collection[int]
    """Segments to measure."""
    forward: range
    """Segments to run forwards, in this order."""
    backward: range
    """Segments to run again with gradients and backwards, last to first."""


def first_graded(measurement: Measurement) -> int:
    """Returns the number of the first segment that is measured backwards.

    The result is the number of all segments where no segment is measured backwards.
    """
    graded = (
        i for i, segment in enumerate(measurement.segments) if graded_layers(measurement, segment)
    )
    return min(graded, default=len(measurement.segments))


def graded_layers(measurement: Measurement, segment: Segment) -> list[Layer]:
    """Returns the segment's layers whose output gradients are measured."""
    return [layer for layer in segment.layers if layer.name in measurement.graded]


def what_remains(
    measurement: Measurement,
    finished: Callable[[Segment], bool],
    has: Callable[[str, Segment], bool],
) -> Remaining:
    """Returns what is left of a pass.

    Args:
        finished: tells whether a segment was measured before.
        has: tells whether an earlier run has stored the INPUTS or GRADIENTS of a segment.
    """
    segments = enumerate(measurement.segments)
    unfinished = {i for i, x in segments if x.layers and not finished(x)}
    return Remaining(
        unfinished=unfinished,
        forward=_to_run_forward(measurement, unfinished, has),
        backward=_to_run_backward(measurement, unfinished, has),
    )


def _to_run_forward(
    measurement: Measurement, unfinished: Collection[int], has: Callable[[str, Segment], bool]
) -> range:
    segments, first = measurement.segments, first_graded(measurement)
    if any(has(GRADIENTS, segment) for segment in segments):
        return range(0)
    end = len(segments) - 1
    if first == len(segments):
        end = max(i for i, segment in enumerate(segments) if segment.layers) + 1
    latest = min([*(i for i in unfinished if i < first), end, len(segments) - 1])
    known = [i for i in range(latest + 1) if has(INPUTS, segments[i])]
    return range(max(known, default=0), end)


def _to_run_backward(
    measurement: Measurement, unfinished: Collection[int], has: Callable[[str, Segment], bool]
) -> range:
    """Returns the numbers of the segments that run backwards, last to first."""
    segments, first = measurement.segments, first_graded(measurement)
    start = max((i for i in unfinished if i >= first), default=first - 1)
    # A segment without a layer to measure leaves nothing but its gradient.
    while first <= start < len(segments) - 1 and not has(GRADIENTS, segments[start + 1]):
        start += 1
    return range(start, first - 1, -1)


class Sweep:
    """A pass over the data that measures segments.

    Args:
        finished: tells whether a segment was measured before.
        keep: where tensors stay between two segments; see `HostMemory.keep`.
        store_every: seconds in place of STORE_EVERY.
    """

    def __init__(
        self,
        measurement: Measurement,
        work: WorkDirectory,
        *,
        finished: Callable[[Segment], bool],
        keep: Keep = torch.Tensor.detach,
        store_every: float | None = None,
    ) -> None:
        self.measurement, self.work, self.keep = measurement, work, keep
        self.store_every = STORE_EVERY if store_every is None else store_every
        self.gradients: dict[int, Tensors] = {}
        """{micro-batch: gradients by the input of the segment that ran backwards last}."""
        self._stored = time.monotonic()
        """The time when the last state to go on from was stored."""
        self._passed: list[tuple[str, Segment]] = []
        """Stored states that a next run needs only until a later state is stored."""
        masking = torch.Generator().manual_seed(measurement.seed)
        prepared = [
            (batch, None) if measurement.loss is None else prepare(measurement.loss, batch, masking)
            for batch in measurement.batches
        ]
        self.labels = [labels for _, labels in prepared]
        self.walk = Walk(
            measurement.network, measurement.chain, [batch for batch, _ in prepared], keep
        )
        self.own = work.processes.share(len(prepared))
        """Numbers of the micro-batches that this process runs."""
        self.first_graded = first_graded(measurement)
        self.remaining = work.processes.from_first(
            lambda: what_remains(measurement, finished, self._has)
        )

    def _has(self, stage: str, segment: Segment) -> bool:
        stage = f"{stage}/{segment.name}"
        return all(self.work.has(stage, str(index)) for index in range(len(self.walk.batches)))

    def _is_due(self) -> bool:
        """Returns whether to store a state to go on from. The first process decides for all."""
        due = time.monotonic() - self._stored >= self.store_every
        return self.work.processes.from_first(lambda: due)

    def _forget_passed(self) -> None:
        """Deletes stored states that a next run would not read any more."""
        self._stored = time.monotonic()
        for stage, segment in self._passed:
            for index in self.own:
                self.work.remove(f"{stage}/{segment.name}", str(index))
        self._passed.clear()

    @property
    def cost(self) -> float:
        """The cost of what is left to do, in the unit of `advance`."""
        forward = sum(self._cost(i) for i in self.remaining.forward)
        return forward + BACKWARD_COST * sum(self._cost(i) for i in self.remaining.backward)

    def _cost(self, number: int) -> float:
        """Returns the cost of a segment's forward run over all data: multiplications per token."""
        name, module = self.measurement.segments[number].name, self.measurement.network.module
        if name in self.measurement.chain.names:
            return float(_num_parameters(part_of(module, name)))
        blocks = sum(_num_parameters(part_of(module, x)) for x in self.measurement.chain.names)
        return float(_num_parameters(module) - blocks) if name != HEAD else 1.0

    def run(self, advance: Callable[[float], None]) -> Measured:
        """Measures what is left.

        Args:
            advance: called with the cost of every step that is done.

        Yields:
            Every measured segment with what this process has summed. The caller must store the
            segment before it asks for the next segment, because the inputs are deleted then.

        Raises:
            RunError: an activation or a gradient is NaN or infinite, or the disk is full.
        """
        if self.measurement.chain.names and (
            not self.remaining.forward or self.remaining.forward.start
        ):
            self._catch_up()
        with Background(self.work) as aside:
            for number in self.remaining.forward:
                yield from self._run_forward(number, aside, advance)
            self.walk.hidden.clear()
            for number in self.remaining.backward:
                yield from self._run_backward(number, aside, advance)

    def _catch_up(self) -> None:
        """Brings the walk to where an earlier run has come."""
        for index in self.own:
            self.walk.run(self.measurement.segments[0], index)
            if self.remaining.forward:
                self.walk.hidden[index] = self._input(
                    self.measurement.segments[self.remaining.forward.start], index
                )

    def _input(self, segment: Segment, index: int) -> torch.Tensor:
        return self.work.get(f"{INPUTS}/{segment.name}", str(index))[0]["hidden"]

    def _run_forward(
        self, number: int, aside: Background, advance: Callable[[float], None]
    ) -> Measured:
        """Runs a segment forwards, and measures it unless the way back will."""
        segments, is_before = self.measurement.segments, number < self.first_graded
        segment, following = segments[number], segments[number + 1 : number + 2]
        measures = is_before and number in self.remaining.unfinished
        returns = number + 1 >= self.first_graded
        stores = returns or (number + 1 in self.remaining.forward and self._is_due())
        moments = self._moments(segment)
        for index in self.own:
            batch, layers = self.walk.batches[index], segment.layers if measures else []
            for part in self.walk.parts(segment, index):
                masks = masks_of(part.cut(batch))
                with moments.watching(self.measurement.network, layers, masks):
                    output = self.walk.run(segment, index, part=part)
            if following:
                _check_output(segment, output, masks)
            self.walk.pass_on(segment, index, output)
            for reader in following if stores else ():
                hidden = {"hidden": self.walk.hidden[index]}
                aside.put(f"{INPUTS}/{reader.name}", str(index), hidden, {})
            advance(self._cost(number) / len(self.own))
        aside.flush()
        if measures:
            yield segment, moments
        if is_before:
            self.work.processes.wait()
            self._passed.append((INPUTS, segment))
            if stores:
                self._forget_passed()

    def _run_backward(
        self, number: int, aside: Background, advance: Callable[[float], None]
    ) -> Measured:
        """Runs a segment again with gradients, then backwards, and measures it."""
        segments, first = self.measurement.segments, self.first_graded
        segment, above = segments[number], segments[number + 1 : number + 2]
        moments = self._moments(segment)
        stores = number > first and self._is_due()
        for index in self.own:
            hidden: torch.Tensor | None = None
            gradients = self.gradients.pop(index, None)
            if segment.name not in (HEAD, WHOLE):
                hidden = self._input(segment, index).to(self.measurement.network.device, copy=True)
                hidden.requires_grad_(number > first)
            if gradients is None:  # an earlier run has come here
                stages = [f"{GRADIENTS}/{follower.name}" for follower in above]
                gradients = self.work.get(stages[0], str(index))[0] if stages else {}
            below = self._backward_of_batch(number, index, hidden, moments, gradients)
            if number > first:
                self.gradients[index] = {probe: self.keep(x) for probe, x in below.items()}
            if stores:
                stage = f"{GRADIENTS}/{segment.name}"
                aside.put(stage, str(index), self.gradients[index], {})
            advance(BACKWARD_COST * self._cost(number) / len(self.own))
        aside.flush()
        if number in self.remaining.unfinished:
            yield segment, moments
        # Inputs are deleted once every process has stored the segment: a next run needs them.
        self.work.processes.wait()
        self._passed += [(INPUTS, segment), *((GRADIENTS, follower) for follower in above)]
        if stores or number == first:
            self._forget_passed()

    def _backward_of_batch(
        self,
        number: int,
        index: int,
        hidden: torch.Tensor | None,
        moments: Moments,
        above: Tensors,
    ) -> Tensors:
        """Takes one micro-batch's gradients, by probe, from the segment's output to `hidden`."""
        loss, network = self.measurement.loss, self.measurement.network
        segment = self.measurement.segments[number]
        layers = segment.layers if number in self.remaining.unfinished else []
        below: Tensors = {}
        assert loss is not None
        batch, generator = self.walk.batches[index], drawing(self.measurement.seed, index)
        is_first = index == self.own[0]
        for part in self.walk.parts(segment, index):
            plain = None
            if is_first:  # the way back must be through the network of the way forward
                given = None if hidden is None else part.of(hidden).detach().clone()
                plain = outputs_of(network, self.walk.run(segment, index, given, part=part))
                is_first = False
            with (
                torch.enable_grad(),  # the caller may have turned gradients off
                recast_in_backward(network.casts),
                moments.watching(network, layers, masks_of(part.cut(batch))),
            ):
                # The network may change its input in place, and a leaf may not be: hence a clone.
                given = None if hidden is None else part.of(hidden).clone()
                output = self.walk.run(segment, index, given, part=part, gradients=True)
                if plain is not None:
                    check_graded(network, segment.name, plain, output)
                roots = self._roots(segment, index, part, output, above, generator)
                for probe, (root, gradient) in enumerate(roots):
                    # Where one of the two is missing, the loss depends on no measured layer.
                    if root.requires_grad and gradient is not None:
                        root.backward(gradient, retain_graph=probe + 1 < num_scalars(loss))
                    if hidden is not None and hidden.grad is not None:
                        # Every part leaves zeros for the others.
                        earlier = below.get(str(probe))
                        below[str(probe)] = (
                            hidden.grad if earlier is None else earlier + hidden.grad
                        )
                        hidden.grad = None
        moments.num_tokens += num_scalars(loss) * count_tokens(batch)
        return below

    def _roots(
        self,
        segment: Segment,
        index: int,
        part: Part,
        output: Any,
        above: Tensors,
        generator: torch.Generator,
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """Yields where each probe's backward pass begins, with the gradient there."""
        assert self.measurement.loss is not None
        if segment.name in (TAIL, WHOLE):
            masks, labels = masks_of(part.cut(self.walk.batches[index])), self.labels[index]
            labels = None if labels is None else part.of(labels)
            for scalar in backward_scalars(self.measurement.loss, output, labels, generator, masks):
                yield scalar, torch.ones_like(scalar)
            return
        for probe in range(num_scalars(self.measurement.loss)):
            gradient = above.get(str(probe))
            yield output, None if gradient is None else gradient.to(output.device, copy=True)

    def _moments(self, segment: Segment) -> Moments:
        graded, device = graded_layers(self.measurement, segment), self.measurement.network.device
        return Moments(self.measurement.leaders, graded, device, center=self.measurement.center)


def _num_parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _check_output(segment: Segment, output: torch.Tensor, masks: Masks) -> None:
    rows = unpadded(output, masks)
    # The minimum and the maximum are NaN if any number is. They take a twentieth of the time that
    # a look at every number would take.
    if len(rows) and not all(bool(end.isfinite()) for end in torch.aminmax(rows)):
        raise RunError(
            f"{segment.name}: NaN or infinity in its outputs on the calibration data",
            "set runtime.dtype: float32, or look for a damaged weight in it",
        )
