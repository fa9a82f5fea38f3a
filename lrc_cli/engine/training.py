"""Tensors are trained here to lower an objective, and judged in the dtype they are stored in.

The caller says what the objective is. This module knows Adam, a search for the learning rate, a
warm-up and a decay. The state between two steps can be stored and loaded again, with the same
result. The best tensors on data that nothing is trained on are kept, so the outcome is never worse
there than the start.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

RATES = tuple(1e-3 * 3.0**k for k in range(-3, 4))
"""The learning rates that are tried, relative to the root mean square of each tensor."""
FIRST_RATE = 2
"""The place in RATES of the rate that is tried first: large networks diverge above it."""
USUAL_TRIALS = 3
"""The trials that a search usually takes."""
TRIAL_STEPS = 12
"""The most steps of a trial of one learning rate."""
TRIAL_SHARE = 0.1
"""The steps of a trial, as a fraction of the steps of the training."""
WARM_UP = 0.05
"""The fraction of the steps in which the rate rises."""
LOOKS = 10
"""How often the training is judged on its way."""
PATIENCE = 3
"""After this many judgements without a gain the training ends."""
JUDGEMENTS = LOOKS + USUAL_TRIALS + 1
"""How often held-out data is looked at in a usual training, at the start included."""
BETAS = (0.9, 0.99)
"""Adam's averages. The second one is shorter than usual, because trainings are short."""


@dataclass(frozen=True, kw_only=True)
class Trainee:
    """A tensor that is trained."""

    name: str
    """The name under which the tensor is stored."""
    parameter: nn.Parameter
    """The numbers in float32 that are trained; they begin at the stored numbers."""
    dtype: torch.dtype
    """The dtype in which the tensor is stored."""
    like: Tensor | None = None
    """The tensor by whose size the steps of a tensor of zeros go; None: their size is 1."""

    def rounded(self) -> Tensor:
        """Returns the numbers as they would be stored."""
        return self.parameter.detach().to(self.dtype, copy=True)


class Objective(Protocol):
    """What training lowers."""

    def add_gradients(self, step: int) -> float:
        """Adds the gradients of the mean over one step's data to all `grad`; returns the mean."""

    def held_out(self) -> float:
        """Returns the mean over data that nothing is trained on, for the present tensors."""


def learning_rate(step: int, num_steps: int) -> float:
    """Returns the fraction of the highest rate in a step: a linear rise, then half a cosine."""
    rise = max(1, math.ceil(WARM_UP * num_steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, num_steps - rise)))


def trial_steps(num_steps: int) -> int:
    """Returns the steps of a trial, for a training of this length."""
    return max(1, min(TRIAL_STEPS, round(TRIAL_SHARE * num_steps)))


def steps_within(seconds: float, *, step: float, look: float) -> int:
    """Returns the most steps, at least one, with which a usual training takes no longer.

    Args:
        seconds: the time for the training.
        step: the seconds of a step.
        look: the seconds of a judgement on held-out data.
    """

    def needed(steps: int) -> float:
        return (steps + USUAL_TRIALS * trial_steps(steps)) * step + (JUDGEMENTS - 1) * look

    most = max(1, math.ceil(seconds / max(step, 1e-9)))
    return max(1, bisect_right(range(1, most + 1), seconds, key=needed))


class Training:
    """A training that goes on step by step.

    Args:
        objective: what is lowered.
        trainees: the tensors; each has a parameter of its own.
        num_steps: the number of steps after the search for a learning rate.
    """

    def __init__(
        self, objective: Objective, trainees: Sequence[Trainee], *, num_steps: int
    ) -> None:
        self.objective, self.trainees, self.num_steps = objective, list(trainees), num_steps
        self.start = self.lowest = math.nan
        """The objective on held-out data at the start, and the lowest value so far."""
        self.trials: dict[int, float] = {}
        """The objective on held-out data after a trial, by the place of its rate in RATES."""
        self.step, self.stale, self.lowest_look = 0, 0, math.inf
        self.best = self._first = self._rounded()
        self._scales = [_scale(trainee) for trainee in self.trainees]
        self._adam = self._new_adam()

    @property
    def trial_steps(self) -> int:
        """The steps of a trial."""
        return trial_steps(self.num_steps)

    @property
    def rate(self) -> float:
        """The learning rate with the best trial."""
        return RATES[min(self.trials, key=lambda place: (self.trials[place], place))]

    @property
    def gained(self) -> bool:
        """Whether the best tensors are others than the start."""
        return self.lowest < self.start

    @property
    def is_done(self) -> bool:
        """Whether no step is left, or further steps do not pay."""
        return self.step >= self.num_steps or self.stale >= PATIENCE

    def begin(self) -> None:
        """Judges the tensors at the start, unless that has been done."""
        if math.isnan(self.start):
            self.start = self.lowest = self.judged()

    def rehearse(self) -> None:
        """Takes a step and undoes it, to see how long a step takes."""
        self.take(0, 0.0)
        self._begin_again()

    def run(self) -> Iterator[int]:
        """Trains to the end. Yields the number of steps just done, whenever the state is whole."""
        self.begin()
        for place in self._places():
            self.trials[place] = self._trial(RATES[place])
            yield self.trial_steps
        while not self.is_done:
            value = self.take(self.step, self.rate * learning_rate(self.step, self.num_steps))
            self.step += 1
            if not math.isfinite(value):
                self.stale = PATIENCE
            elif self.step % max(1, self.num_steps // LOOKS) == 0 or self.step == self.num_steps:
                self._look()
            yield 1

    def _places(self) -> Iterator[int]:
        """Yields the places of rates to try: upwards while it pays, else downwards."""
        yield from self._untried(FIRST_RATE)
        for direction in (1, -1):
            place = FIRST_RATE + direction
            while 0 <= place < len(RATES):
                yield from self._untried(place)
                before, now = self.trials[place - direction], self.trials[place]
                if not now < before and (direction == 1 or math.isfinite(before)):
                    break
                place += direction
            if self.trials[FIRST_RATE + 1] < self.trials[FIRST_RATE]:
                return

    def _untried(self, place: int) -> Iterator[int]:
        if place not in self.trials:
            yield place

    def _trial(self, rate: float) -> float:
        """Returns the objective on held-out data after a short training from the start."""
        for step in range(self.trial_steps):
            value = self.take(step, rate * learning_rate(step, self.trial_steps))
            if not math.isfinite(value):
                break
        reached = self._keep_if_best()
        self._begin_again()
        return reached

    def _begin_again(self) -> None:
        for trainee in self.trainees:
            trainee.parameter.data.copy_(self._first[trainee.name])
        self._adam = self._new_adam()

    def _new_adam(self) -> torch.optim.Adam:
        groups = [{"params": [trainee.parameter]} for trainee in self.trainees]
        return torch.optim.Adam(groups, betas=BETAS)

    def take(self, step: int, rate: float) -> float:
        """Takes one step and returns the mean of the objective before the step."""
        self._adam.zero_grad()
        value = self.objective.add_gradients(step)
        if math.isfinite(value):
            for group, scale in zip(self._adam.param_groups, self._scales, strict=True):
                group["lr"] = rate * scale
            self._adam.step()
        self._adam.zero_grad()
        return value

    def _look(self) -> None:
        reached = self._keep_if_best()
        # A trial ends with a low rate, so a training in its middle is not compared with trials.
        self.stale = 0 if reached < self.lowest_look else self.stale + 1
        self.lowest_look = min(self.lowest_look, reached)

    def _keep_if_best(self) -> float:
        """Judges the tensors as they are and returns the value; infinity where it is not finite."""
        reached = self.judged()
        if reached < self.lowest:
            self.lowest, self.best = reached, self._rounded()
        return reached if math.isfinite(reached) else math.inf

    def judged(self) -> float:
        """Returns the objective on held-out data with the tensors as they would be stored."""
        with self._as_stored():
            return self.objective.held_out()

    @contextmanager
    def _as_stored(self) -> Iterator[None]:
        exact = [trainee.parameter.data for trainee in self.trainees]
        for trainee in self.trainees:
            trainee.parameter.data = trainee.rounded().to(exact[0].dtype)
        try:
            yield
        finally:
            for trainee, numbers in zip(self.trainees, exact, strict=True):
                trainee.parameter.data = numbers

    def _rounded(self) -> dict[str, Tensor]:
        return {trainee.name: trainee.rounded() for trainee in self.trainees}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Returns tensors and facts from which `load` goes on."""
        tensors = {f"best/{name}": tensor for name, tensor in self.best.items()}
        if self.step:
            for trainee in self.trainees:
                kept = self._adam.state[trainee.parameter]
                tensors[f"now/{trainee.name}"] = trainee.parameter.detach()
                tensors[f"mean/{trainee.name}"] = kept["exp_avg"]
                tensors[f"square/{trainee.name}"] = kept["exp_avg_sq"]
        trials = {str(place): value for place, value in self.trials.items()}
        facts = {"start": self.start, "lowest": self.lowest, "trials": trials, "step": self.step}
        facts |= {"stale": self.stale, "lowest_look": self.lowest_look}
        return tensors, {**facts, "num_steps": self.num_steps}

    def load(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Goes on from what `state` returned."""
        self.start, self.lowest = facts["start"], facts["lowest"]
        self.trials = {int(place): value for place, value in facts["trials"].items()}
        self.step, self.stale, self.num_steps = facts["step"], facts["stale"], facts["num_steps"]
        self.lowest_look = facts["lowest_look"]
        self.best = {}
        for trainee in self.trainees:
            name, parameter = trainee.name, trainee.parameter
            self.best[name] = tensors[f"best/{name}"].to(parameter.device, copy=True)
            if self.step:
                parameter.data.copy_(tensors[f"now/{name}"])
                self._adam.state[parameter] = {
                    "step": torch.tensor(float(self.step)),
                    "exp_avg": tensors[f"mean/{name}"].to(parameter.device, copy=True),
                    "exp_avg_sq": tensors[f"square/{name}"].to(parameter.device, copy=True),
                }


def _scale(trainee: Trainee) -> float:
    """Returns the root mean square of a tensor's numbers, or of `like` where all are zero."""
    for tensor in (trainee.parameter, trainee.like):
        scale = 0.0 if tensor is None else _root_mean_square(tensor)
        if scale > 0:
            return scale
    return 1.0


def _root_mean_square(tensor: Tensor) -> float:
    return tensor.detach().double().square().mean().sqrt().item()
