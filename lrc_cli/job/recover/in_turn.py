"""One window of the network after the other is trained (`recover.scope: block`).

Only the window that is trained has numbers in memory. All other factors are mapped from files, and
both networks' hidden states stay between two windows, up to `runtime.memory_limit` in memory.

    <recovered>/unfinished/<window>/state    the training of the window that a killed run was in
    <recovered>/unfinished/<window>/outcome  what a finished window gave
"""

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

import torch

from lrc_cli.engine.training import JUDGEMENTS, RATES, USUAL_TRIALS, Trainee, Training, trial_steps
from lrc_cli.execution.chain import HEAD, Segment, find_chain
from lrc_cli.execution.divergence import OBJECTIVES
from lrc_cli.execution.losses import choose_loss, drawing, prepare
from lrc_cli.execution.walk import Pair, Walk
from lrc_cli.job.factors.two_networks import TwoNetworks
from lrc_cli.job.recover.block import WindowDistance
from lrc_cli.job.recover.model import OutputDivergence, step_tokens
from lrc_cli.job.recover.scope import (
    STATE,
    Scope,
    Start,
    drawn_for,
    load_training,
    run_training,
    steps_asked,
)
from lrc_cli.job.recover.trainees import (
    install,
    is_factorised,
    keys_of,
    norm_trainees,
    trainees_of,
)
from lrc_cli.job.recover.windows import find_windows
from lrc_cli.job.stage import Advance
from lrc_cli.job.work import Tensors
from lrc_cli.network.layer import Layer
from lrc_cli.report.record import RecoveredWindow, Recovery
from lrc_cli.runtime.processes import Processes
from lrc_cli.runtime.spill import HostMemory

OUTCOME = "outcome"
"""The unit that holds what the training of a window gave."""
TRAINING_COST = 3.0
"""The time of a token that is trained on, in passes forwards through the window."""


class InTurn(Scope):
    """The training of one window after the other, each for the original's outputs of the window.

    What a finished window gave is stored, and so is the unfinished training of the next one.
    """

    def __init__(self, start: Start) -> None:
        self.start, self.began = start, time.monotonic()
        plan, sequences = start.plan, start.sequences
        one, seed = next(sequences.batches(1)), plan.config.runtime.seed
        windows = find_windows(plan.network, plan.layers, one)
        # Factors of a deep network are as large as its checkpoint, in float32 twice as large.
        memory = HostMemory(plan.config.runtime.memory_bytes, start.work.root)
        self.keep, self.hold = memory.keep, HostMemory(0, start.work.root).hold
        self.networks = TwoNetworks(plan, windows[0].chain, [], hold=self.hold)
        install(self.networks, start)
        self.norms = [x for own in norm_trainees(self.networks, plan).values() for x in own]
        loss = choose_loss(plan.config.compression.loss, plan.network, one, plan.tokenizer)
        self.whole = OutputDivergence(
            plan.network,
            self.networks.compressed.network,
            find_chain(plan.network, one),
            sequences,
            loss=loss,
            seed=seed,
            processes=plan.processes,
            advance=lambda _: None,
        )
        data, size = self.whole.trained, self.whole.size
        trained = list(data.batches(size))
        self.num_trained, self.in_step = len(trained), max(1, round(self.whole.step_size / size))
        batches = enumerate([*trained, *self.whole.kept_out.batches(size)])
        self.batches = [prepare(loss, batch, drawing(seed, index))[0] for index, batch in batches]
        self.num_steps = steps_asked(plan, data)
        self.windows = dict(enumerate(windows))
        """The windows by number, in the order in which they run."""
        self.trained_windows = [
            number
            for number, window in self.windows.items()
            if any(is_factorised(self.networks, layer) for layer in window.layers)
        ]
        """The numbers of the windows that have something to train."""
        self.left = start.work.processes.from_first(
            lambda: [x for x in self.trained_windows if not start.work.has(self._at(x), OUTCOME)]
        )
        """The numbers of the windows that are not trained yet."""
        self.gained = False
        """Whether training lowered the objective of the whole network."""
        self._advance: Advance = lambda _: None

    def _at(self, number: int) -> str:
        """Returns the stage of the work directory for the training of a window."""
        return f"{self.start.folder}/{number}"

    # What it takes, in passes of a token forwards through the whole network.

    @property
    def cost(self) -> float:
        """See Scope."""
        training = sum(self._training_cost(number) for number in self.left)
        return training + sum(self._walking_cost(x) for x in self.windows if self._is_passed(x))

    def _size(self, number: int) -> float:
        """Returns the window's fraction of the network's numbers."""
        module = self.start.plan.network.module
        blocks = [module.get_submodule(name) for name in self.windows[number].blocks]
        own = sum(x.numel() for block in blocks for x in block.parameters())
        return own / max(1, sum(x.numel() for x in module.parameters()))

    def _training_cost(self, number: int) -> float:
        steps = self.num_steps + USUAL_TRIALS * trial_steps(self.num_steps)
        judged = JUDGEMENTS * self.whole.kept_out.num_tokens
        trained = TRAINING_COST * steps * step_tokens(self.whole.trained)
        return self._size(number) * (trained + judged)

    def _walking_cost(self, number: int) -> float:
        """Returns the cost of both networks' way through the window, with all data."""
        tokens = self.whole.trained.num_tokens + self.whole.kept_out.num_tokens
        return 2 * self._size(number) * tokens

    def _is_passed(self, number: int) -> bool:
        """Returns whether a window that is left lies in the same chain, here or further on."""
        chain = self.windows[number].chain
        return any(x >= number and self.windows[x].chain is chain for x in self.left)

    def train(self, advance: Advance) -> Recovery:
        """See Scope."""
        self._advance = advance
        before = self.whole.held_out()
        for number in self.trained_windows:
            if number not in self.left:
                self._put(number, self._trainees(number), self._outcome(number))
        self.train_windows()
        after = self.whole.held_out()
        self.gained = after < before
        return self._summary(before, after if self.gained else before)

    def train_windows(self) -> None:
        """Trains all windows that are left, chain after chain."""
        chains = groupby(self.windows, key=lambda number: self.windows[number].chain.names)
        for _, numbers in chains:
            passed = [number for number in numbers if self._is_passed(number)]
            if passed:
                self._train_chain(passed)

    def _train_chain(self, numbers: Sequence[int]) -> None:
        """Trains what is left of the windows of a chain, through which both networks walk."""
        chain, networks = self.windows[numbers[0]].chain, self.networks
        dense, compressed = networks.dense.network, networks.compressed.network
        pair = Pair(dense, compressed, chain, self.batches, self.keep)
        for walk in (pair.dense, pair.compressed):
            walk.advance(Segment(name=HEAD, layers=[]))
        processes = self.start.plan.processes
        for number in numbers:
            segments = self.windows[number].segments
            for segment in segments:
                advance_together(pair.dense, segment, processes)
            if number in self.left:
                self._train(number, pair)
            if number != numbers[-1]:
                for segment in segments:
                    advance_together(pair.compressed, segment, processes)
            self._advance(self._walking_cost(number))

    def _train(self, number: int, pair: Pair) -> None:
        """Trains a window, to whose input the compressed network has come, and stores what it gave.

        The original has come to the window's output.
        """
        plan, start = self.start.plan, replace(self.start, folder=self._at(number))
        left = sum(self._training_cost(x) for x in self.left if x >= number)
        advanced = 0.0

        def advance(cost: float) -> None:
            nonlocal advanced
            advanced += cost
            self._advance(cost)

        training = self.prepare(number, pair, advance)
        load_training(training, start, self.began, self._training_cost(number) / left)
        run_training(training, start, lambda _: None)
        # Training may end early, or the search may be longer than a usual one.
        self._advance(self._training_cost(number) - advanced)
        if plan.processes.is_first:
            best, record = training.best if training.gained else {}, self._record(number, training)
            start.work.put(start.folder, OUTCOME, best, record.to_json())
            start.work.remove(start.folder, STATE)
        plan.processes.wait()
        self._put(number, training.trainees, training.best)

    def prepare(self, number: int, pair: Pair, advance: Advance) -> Training:
        """Returns the training of a window, which begins at the fitted factors."""
        plan, whole, trainees = self.start.plan, self.whole, self._trainees(number)
        tokens = whole.trained.num_tokens / len(whole.trained)

        def ran(sequences: int, gradients: bool) -> None:
            passes = TRAINING_COST if gradients else 1.0
            advance(passes * self._size(number) * tokens * sequences * plan.processes.size)

        objective = WindowDistance(
            pair.compressed,
            self.windows[number],
            pair.dense.hidden,
            [x.parameter for x in trainees],
            num_trained=self.num_trained,
            in_step=self.in_step,
            seed=plan.config.runtime.seed,
            processes=plan.processes,
            advance=ran,
        )
        return Training(objective, trainees, num_steps=self.num_steps)

    def _trainees(self, number: int) -> list[Trainee]:
        """Returns the tensors of a window that are trained, with numbers in memory."""
        window, network = self.windows[number], self.networks.compressed.network
        # A copy that stands in for a parameter on the device would be dropped with its training.
        network.placement.release()
        own = [*trainees_of(self.networks, window.layers, self.start)]
        own += [x for x in self.norms if window.holds(self.networks.norms[x.name])]
        for trainee in own:
            trainee.parameter.data = trainee.parameter.data.to(network.device, copy=True)
            trainee.parameter.requires_grad_(True)
        return own

    def _put(self, number: int, trainees: Sequence[Trainee], tensors: Tensors) -> None:
        """Puts trained numbers, as they are stored, into the network, out of memory."""
        network = self.networks.compressed.network
        on_device = not {*self.windows[number].blocks} <= {*network.placement.blocks}
        for trainee in trainees:
            numbers = tensors.get(trainee.name, trainee.rounded()).float()
            held = self.hold({trainee.name: numbers.cpu()})[trainee.name]
            trainee.parameter.requires_grad_(False)
            trainee.parameter.data = held.to(network.device) if on_device else held

    def _outcome(self, number: int, wanted: Sequence[str] | None = None) -> Tensors:
        return self.start.work.get(self._at(number), OUTCOME, wanted)[0]

    def _record(self, number: int, training: Training) -> RecoveredWindow:
        window = self.windows[number]
        trials = {f"{RATES[place]:.2g}": x for place, x in sorted(training.trials.items())}
        layers = (x.name for x in window.layers if is_factorised(self.networks, x))
        return RecoveredWindow(
            blocks=window.blocks,
            layers=tuple(layers),
            before=training.start,
            after=training.lowest,
            rate=training.rate if training.step else None,
            trials={rate: x if math.isfinite(x) else None for rate, x in trials.items()},
            steps=training.step,
            planned_steps=training.num_steps,
        )

    def trained(self, layer: Layer) -> Tensors:
        """See Scope."""
        for number in self.trained_windows if self.gained else ():
            if any(layer.name == x.name for x in self.windows[number].layers):
                return self._outcome(number, keys_of(layer))
        return {}

    def others(self, unit: str) -> Tensors:
        """See Scope."""
        found: Tensors = {}
        for number in self.trained_windows if self.gained else ():
            if unit == self._home(number):
                found |= self._outcome(number, [x.name for x in self.norms])
        return found

    def _home(self, number: int) -> str:
        """Returns the unit that the norms of a window are stored with."""
        layers = self.windows[number].layers
        return next(x.unit for x in layers if is_factorised(self.networks, x))

    def _summary(self, before: float, after: float) -> Recovery:
        work, plan = self.start.work, self.start.plan
        windows = [
            RecoveredWindow.from_json(work.facts(self._at(number), OUTCOME), OUTCOME)
            for number in self.trained_windows
        ]
        steps = max((window.steps for window in windows), default=0)
        planned = max((window.planned_steps for window in windows), default=self.num_steps)
        tokens = step_tokens(self.whole.trained)
        trained, held_out = len(self.whole.trained), len(self.whole.kept_out)
        written = {key for unit in plan.units for key in self.others(unit)}
        norms = tuple(x.name for x in self.norms if x.name in written)
        return Recovery(
            scope="block",
            objective=OBJECTIVES[self.whole.loss.kind],
            before=before,
            after=after,
            rate=None,
            trials={},
            steps=steps,
            planned_steps=planned,
            tokens=round(steps * tokens),
            planned_tokens=round(planned * tokens),
            num_sequences=trained,
            num_held_out=held_out,
            num_left_out=len(drawn_for(plan)) - trained - held_out,
            norms=norms or None,
            windows=tuple(windows),
        )


def advance_together(walk: Walk, segment: Segment, processes: Processes) -> None:
    """Passes a block with all micro-batches. Every process runs some, and all get all outputs."""
    own = processes.share(len(walk.batches))
    for index in own:
        walk.pass_on(segment, index, walk.run(segment, index))
    if processes.size == 1:
        return
    mine = {index: (tuple(walk.hidden[index].shape), walk.hidden[index].dtype) for index in own}
    kinds = {index: kind for part in processes.gather(mine) for index, kind in part.items()}
    for index, (shape, dtype) in sorted(kinds.items()):
        tensor = torch.zeros(shape, dtype=dtype, device=walk.network.device)
        if index in own:
            tensor.copy_(walk.hidden[index])
        # Sums of bytes with zeros are exact, in every dtype.
        processes.sum_to(None, tensor.view(torch.uint8))
        walk.hidden[index] = walk.keep(tensor)
