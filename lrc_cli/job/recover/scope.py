"""A scope is the part of the network that is trained at a time (`recover.scope`)."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from lrc_cli.data.draw import Sequences
from lrc_cli.data.purposes import CALIBRATION, RECOVER
from lrc_cli.engine.training import LOOKS, USUAL_TRIALS, Training
from lrc_cli.job.plan import Plan
from lrc_cli.job.recover.model import step_tokens
from lrc_cli.job.stage import Advance
from lrc_cli.job.work import Tensors, WorkDirectory
from lrc_cli.network.layer import Layer
from lrc_cli.report.record import LayerFacts, Recovery

STORE_SECONDS = 60.0
"""The time after which the state of the training is stored again."""
EPOCHS = 4
"""How often the data is seen where the config gives no number of tokens."""
JUDGEMENTS = LOOKS + USUAL_TRIALS + 1
"""How often held-out data is looked at, in a usual training."""
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


class Tokens:
    """Hands on how many tokens were run, once the display is there."""

    advance: Advance | None = None

    def add(self, tokens: float) -> None:
        """Advances the display by a number of tokens."""
        if self.advance is not None:
            self.advance(tokens)


def training_data(plan: Plan) -> Sequences:
    """Returns the sequences to train on, some of which, at the end, will be held out."""
    return plan.sequences.get(RECOVER, plan.sequences[CALIBRATION])


def steps_asked(plan: Plan, trained: Sequences) -> int:
    """Returns the steps that the config asks for, on these sequences."""
    asked = plan.config.recover.tokens
    tokens = EPOCHS * trained.num_tokens if asked == "auto" else asked
    return max(1, round(tokens / step_tokens(trained)))


def load_training(training: Training, start: Start) -> None:
    """Brings a training to where an earlier run has stored it."""
    if not start.work.missing(start.folder, [STATE]):
        training.load(*start.work.get(start.folder, STATE))


def run_training(training: Training, start: Start) -> None:
    """Trains to the end, and stores the state every minute."""
    stored = time.monotonic()
    for _ in training.run():
        # All processes hold the same state, so the first one stores it.
        if start.plan.processes.is_first and time.monotonic() - stored > STORE_SECONDS:
            start.work.put(start.folder, STATE, *training.state())
            stored = time.monotonic()
