"""A scope is the part of the network that is trained at a time (`recover.scope`)."""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from lrc_cli.data.draw import Sequences
from lrc_cli.data.purposes import CALIBRATION, RECOVER
from lrc_cli.engine.training import JUDGEMENTS, USUAL_TRIALS, Training, steps_within
from lrc_cli.errors import RunError
from lrc_cli.job.plan import Plan
from lrc_cli.job.recover.model import JUDGING, step_tokens
from lrc_cli.job.stage import Advance
from lrc_cli.job.work import Tensors, WorkDirectory
from lrc_cli.network.layer import Layer
from lrc_cli.report.record import LayerFacts, Recovery

STORE_SECONDS = 60.0
"""The time after which the state of the training is stored again."""
EPOCHS = 4
"""How often the data is seen where the config gives no number of tokens."""
STATE = "state"
"""The unit that holds an unfinished training."""

Fitted = Callable[[str], tuple[Tensors, dict[str, LayerFacts]]]
"""A function from a unit's name to the unit's tensors and facts before the training."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """What every training begins with."""

    plan: Plan
    work: WorkDirectory
    folder: str
    """The stage of the work directory for what only an unfinished training needs."""
    fitted: Fitted
    measure: Callable[[str, Tensors], object]
    """Measures a unit again, with trained tensors: what comes after the training."""

    @property
    def sequences(self) -> Sequences:
        """The sequences to train on, some of which, at the end, are held out."""
        return training_data(self.plan)


class Scope(ABC):
    """A training of the factors of all layers. All processes make the same calls.

    An object is a training that has not begun, or that goes on where an earlier run has stored it.
    """

    @property
    @abstractmethod
    def cost(self) -> float:
        """The tokens that are left to run, which `train` advances by."""

    @abstractmethod
    def train(self, advance: Advance) -> Recovery:
        """Trains to the end and returns what the training gave."""

    @abstractmethod
    def trained(self, layer: Layer) -> Tensors:
        """Returns a layer's trained tensors by disk name, once `train` has returned.

        The result is empty for a layer that stays as it was fitted.
        """

    def others(self, unit: str) -> Tensors:
        """Returns trained tensors of no layer that are stored with a unit, by disk name: norms."""
        return {}


class Tokens:
    """Hands on how many tokens were run, once the display is there."""

    advance: Advance | None = None

    def add(self, tokens: float) -> None:
        """Advances the display by a number of tokens."""
        if self.advance is not None:
            self.advance(tokens)


def drawn_for(plan: Plan) -> Sequences:
    """Returns the sequences that were drawn for training, or the calibration sequences."""
    return plan.sequences.get(RECOVER, plan.sequences[CALIBRATION])


def training_data(plan: Plan) -> Sequences:
    """Returns the sequences to train on, some of which, at the end, will be held out.

    None equals a sequence of certification or evaluation, also where a text has passages twice.
    """
    others = (x for name, x in plan.sequences.items() if name not in (CALIBRATION, RECOVER))
    return drawn_for(plan).apart_from(others)


def steps_asked(plan: Plan, trained: Sequences) -> int:
    """Returns the steps that the config asks for, on these sequences."""
    asked = plan.config.recover.tokens
    tokens = EPOCHS * trained.num_tokens if asked == "auto" else asked
    return max(1, round(tokens / step_tokens(trained)))


def load_training(training: Training, start: Start, began: float, share: float = 1.0) -> None:
    """Brings a training to where an earlier run has stored it, or sets the length of a new one.

    Where the config gives minutes, the length follows from how fast a step is now. It is stored at
    once, so a killed training goes on with the same length.

    Args:
        began: the time at which the stage began.
        share: the fraction of the time that is left which this training may take.
    """
    minutes = start.plan.config.recover.minutes
    if not start.work.missing(start.folder, [STATE]):
        training.load(*start.work.get(start.folder, STATE))
    elif minutes is not None:
        steps = _steps_until(began + 60 * minutes, training, start, share)
        training.num_steps = min(start.plan.processes.gather(steps))
        _store(training, start)


def _steps_until(ends: float, training: Training, start: Start, share: float) -> int:
    """Returns the steps that can be taken until a time, as fast as this process is now."""
    look = _seconds(lambda: _begin(training))
    training.rehearse()  # the first step warms up
    step = _seconds(training.rehearse)
    own = [unit for unit in start.plan.units if start.plan.owns(unit)]
    trained = [x for x in own if any(y.keys.weight in training.best for y in start.plan.units[x])]
    closing = _seconds(lambda: start.measure(trained[0], training.best)) if trained else 0.0
    left = ends - time.monotonic() - len(own) * closing
    return steps_within(share * left, step=step, look=look)


def _seconds(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


def cost_of(training: Training, trained: Sequences, kept_out: Sequences) -> float:
    """Returns the tokens that a usual training has left to run; a judged token counts less."""
    steps = training.num_steps - training.step + _trials_left(training) * training.trial_steps
    return steps * step_tokens(trained) + JUDGEMENTS * JUDGING * kept_out.num_tokens


def _trials_left(training: Training) -> int:
    """Returns how many trials a usual search would still take."""
    return 0 if training.step else max(0, USUAL_TRIALS - len(training.trials))


def run_training(training: Training, start: Start, advance: Callable[[int], None]) -> None:
    """Trains to the end, and stores the state every minute.

    Args:
        advance: called once the search is over, with the steps that it took less than a usual one.
    """
    _begin(training)
    stored, usual = time.monotonic(), _trials_left(training) + len(training.trials)
    for _ in training.run():
        if training.step == 1:
            advance((usual - len(training.trials)) * training.trial_steps)
        if time.monotonic() - stored > STORE_SECONDS:
            _store(training, start)
            stored = time.monotonic()


def _begin(training: Training) -> None:
    """Judges the tensors at the start.

    Raises:
        RunError: the objective is not finite there, so nothing could be called better or worse.
    """
    training.begin()
    if not math.isfinite(training.start):
        raise RunError(
            "recover.scope: the distance of both networks' outputs is not finite before the"
            " training",
            "set runtime.dtype: float32, or recover.scope: none",
        )


def _store(training: Training, start: Start) -> None:
    # All processes hold the same state, so the first one stores it.
    if start.plan.processes.is_first:
        start.work.put(start.folder, STATE, *training.state())
