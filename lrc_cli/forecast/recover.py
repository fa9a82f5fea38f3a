"""The probe measures training with the job's own stage, on made-up factors of the granted ranks."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from lrc_cli.data.purposes import CALIBRATION, RECOVER
from lrc_cli.engine import Choice, pivot_block
from lrc_cli.engine.training import JUDGEMENTS, USUAL_TRIALS, steps_within, trial_steps
from lrc_cli.engine.training import Training as Trainable
from lrc_cli.execution.walk import Pair
from lrc_cli.forecast.clocks import Clock, typical
from lrc_cli.forecast.estimate import Memory, Piece
from lrc_cli.forecast.probe import Probe
from lrc_cli.forms import DENSE, FORMS, PERM, UP, WEIGHT, Packed
from lrc_cli.job.plan import Plan
from lrc_cli.job.recover.decide_scope import ScopeDecision, decide_scope
from lrc_cli.job.recover.in_turn import InTurn
from lrc_cli.job.recover.model import HELD_OUT, split, step_size, step_tokens
from lrc_cli.job.recover.scope import STORE_SECONDS, Start, steps_asked, training_data
from lrc_cli.job.recover.stage import SUMMARY, RecoverStage, recovered_folder
from lrc_cli.job.recover.whole import WholeNetwork
from lrc_cli.job.work import Tensors, WorkDirectory
from lrc_cli.network.layer import Layer
from lrc_cli.report.record import LayerFacts
from lrc_cli.runtime.memory import PrivateMemory

PHASE = RecoverStage.name
STATE_BYTES = 3 * 4
"""The bytes in an unfinished training for each number: the number and Adam's two, in float32."""
FILE_BYTES = 4
"""The bytes of a factor's number in the files that windows read."""
NUM_STEPS = 2
"""The steps that are measured. The first step warms up."""


class _MadeUp(RecoverStage):
    """The job's stage, with factors of zeros in the place of fitted ones.

    Args:
        granted: the choices that the budget grants, by layer name.
    """

    def __init__(
        self,
        plan: Plan,
        work: WorkDirectory,
        granted: Mapping[str, Choice],
        decision: ScopeDecision,
    ) -> None:
        super().__init__(plan, work, plan.factors_stage, decision)
        self.granted = granted

    def fitted(self, unit: str) -> tuple[Tensors, dict[str, LayerFacts]]:
        """See RecoverStage."""
        tensors: Tensors = {}
        facts = {}
        for layer in self.plan.units[unit]:
            packed = _zeros(layer, self.granted[layer.name], self.plan.of(layer).dtype)
            if packed is not None:
                on_disk = FORMS[packed.form].on_disk(packed, layer.layout)
                tensors |= {layer.keys.key(name): tensor for name, tensor in on_disk.items()}
            stated = {} if packed is None else dict(packed.parameters)
            form = DENSE if packed is None else packed.form
            facts[layer.name] = LayerFacts(storage=form, reason=None, fallback=False, **stated)
        return tensors, facts


def _zeros(layer: Layer, choice: Choice, dtype: torch.dtype) -> Packed | None:
    """Returns factors of the granted rank; None for a layer that stays dense or has no rank."""
    (m, n), rank = layer.shape, choice.rank
    if choice.is_dense or rank is None:
        return None
    block = pivot_block(m, rank)
    rows, form = (m, "factors") if choice.form == "factors" else (m - rank, "interpolative")
    tensors = {WEIGHT: torch.zeros(rank, n, dtype=dtype), UP: torch.zeros(rows, rank, dtype=dtype)}
    if form == "interpolative":
        tensors[PERM] = torch.arange(m // block, dtype=torch.int32)
    parameters = {"rank": rank, "block": block}
    return Packed(form=form, shape=layer.shape, tensors=tensors, parameters=parameters)


def _on_few(plan: Plan) -> Plan:
    """Returns a plan with as few sequences as fill one step, and some that are held out.

    Its training has a number of tokens: the probe measures the speed in its own way.
    """
    whole = training_data(plan)
    number = min(len(whole), step_size(split(whole)[0]) + HELD_OUT)
    few, _ = whole.split(number)
    recover = replace(plan.config.recover, minutes=None)
    config = replace(plan.config, recover=recover)
    return replace(plan, config=config, sequences={**plan.sequences, RECOVER: few})


@dataclass(frozen=True, kw_only=True)
class Training:
    """What the training of one size will take."""

    pieces: list[Piece] = field(default_factory=list)
    stored: int = 0
    """The bytes of the trained tensors."""
    unfinished: int = 0
    """The bytes of an unfinished training, which are deleted again."""
    num_steps: int = 0
    record: dict[str, Any] | None = None
    """Scope, steps, tokens and sequences, for people; None where nothing is left to train."""


def run_recover(
    probe: Probe, plan: Plan, granted: Mapping[str, Choice], kinds: Mapping[str, Sequence[str]]
) -> Training:
    """Returns what the training of one size will take; nothing where it is done, or not asked for.

    Args:
        kinds: {unit whose statistics and spectra the probe has: all units like it}.
    """
    is_dense = all(choice.is_dense for choice in granted.values())
    if not plan.config.recover.is_used or is_dense:
        return Training()
    decision = decide_scope(plan, granted)
    if probe.has(recovered_folder(plan, decision.scope), SUMMARY):
        return Training()
    stage = _MadeUp(_on_few(plan), probe.work, granted, decision)
    measure = _measure_windows if decision.scope == "block" else _measure_whole
    found = measure(probe, plan, stage, kinds)
    trained, kept_out = split(training_data(plan))
    record: dict[str, Any] = {
        "scope": decision.scope,
        "steps": found.num_steps,
        "tokens": round(found.num_steps * step_tokens(trained)),
        "num_sequences": len(trained),
        "num_held_out": len(kept_out),
    }
    return replace(found, record=record | ({"reason": decision.reason} if decision.reason else {}))


def _closing(stage: _MadeUp, kinds: Mapping[str, Sequence[str]], trained: Tensors) -> float:
    """Returns the seconds in which all layers are measured again."""
    clock = Clock(stage.plan.device)
    for unit in kinds:
        stage.measured(unit, trained)
        clock.tick()
    return sum(
        seconds * len(units) for seconds, units in zip(clock.steps, kinds.values(), strict=True)
    )


def _steps_of(training: Trainable, device: torch.device) -> tuple[float, float]:
    """Returns the seconds of a step, and of a look at the sequences that are held out."""
    clock = Clock(device)
    for step in range(NUM_STEPS):
        training.take(step, 0.0)
        clock.tick()
    training.judged()
    clock.tick()
    *steps, judging = clock.steps
    return typical(steps), judging


def _measure_whole(
    probe: Probe, plan: Plan, stage: _MadeUp, kinds: Mapping[str, Sequence[str]]
) -> Training:
    with PrivateMemory(plan.device) as memory:
        scope = WholeNetwork(stage.start)
        training, objective = scope.training, scope.objective
        each, judging = _steps_of(training, plan.device)
        closing = _closing(stage, kinds, training.best)
    stored = sum(x.nbytes for x in training.best.values())
    numbers = sum(x.numel() for x in training.best.values())
    # The best tensors are others than the first ones as soon as something was gained.
    probe.memory.append(Memory(phase=PHASE, measured=memory.peak + stored, gpu=memory.gpu))
    trained, kept_out = split(training_data(plan))
    look = judging * kept_out.num_tokens / objective.kept_out.num_tokens
    minutes = plan.config.recover.minutes
    if minutes is None:
        num_steps = steps_asked(plan, trained)
    else:
        num_steps = steps_within(60 * minutes - closing, step=each, look=look)
    pieces = [*_pieces(num_steps, each, look, 1), Piece(phase=PHASE, seconds=closing)]
    # A state is stored every minute. The state before it is deleted once the new one is whole.
    states = sum(x.seconds * x.times for x in pieces) / STORE_SECONDS + (minutes is not None)
    return Training(
        pieces=pieces,
        stored=stored,
        unfinished=min(2, int(states)) * (stored + STATE_BYTES * numbers),
        num_steps=num_steps,
    )


def _pieces(num_steps: int, step: float, look: float, times: int) -> list[Piece]:
    """Returns the pieces of so many trainings of one kind."""
    steps = num_steps + USUAL_TRIALS * trial_steps(num_steps)
    return [
        Piece(phase=PHASE, seconds=step, times=steps * times),
        Piece(phase=PHASE, seconds=look, times=JUDGEMENTS * times),
    ]


@dataclass
class _Kind:
    """Windows of one kind: the time of one, and what the training of one stores."""

    step: float
    look: float
    stored: int
    numbers: int
    count: int = 1


class _OneOfEach(InTurn):
    """The job's scope, which measures one window of every kind and trains none."""

    def __init__(self, start: Start) -> None:
        super().__init__(start)
        self.kinds: dict[Any, _Kind] = {}
        self.best: Tensors = {}
        self.seconds = 0.0
        """The seconds of all measurements of windows."""

    def _train(self, number: int, pair: Pair) -> None:
        window, began = self.windows[number], time.perf_counter()
        ranks = (self.start.fitted(x.unit)[1][x.name].rank for x in window.layers)
        kind = tuple((x.shape, rank) for x, rank in zip(window.layers, ranks, strict=True))
        if kind in self.kinds:
            self.kinds[kind].count += 1
            return
        training = self.prepare(number, pair, lambda _: None)
        step, look = _steps_of(training, self.start.plan.device)
        stored = sum(x.nbytes for x in training.best.values())
        numbers = sum(x.numel() for x in training.best.values())
        self.kinds[kind] = _Kind(step=step, look=look, stored=stored, numbers=numbers)
        self.best |= {key: x.cpu() for key, x in training.best.items()}
        self._put(number, training.trainees, training.best)
        self.seconds += time.perf_counter() - began


def _measure_windows(
    probe: Probe, plan: Plan, stage: _MadeUp, kinds: Mapping[str, Sequence[str]]
) -> Training:
    with PrivateMemory(plan.device) as memory:
        scope = _OneOfEach(stage.start)
        clock = Clock(plan.device)
        scope.whole.held_out()
        clock.tick()
        scope.train_windows()
        clock.tick()
        closing = _closing(stage, kinds, scope.best)
    judging, walking = clock.steps[0], clock.steps[1] - scope.seconds
    trained, kept_out = split(training_data(plan))
    few = scope.whole
    longer = kept_out.num_tokens / few.kept_out.num_tokens
    tokens = trained.num_tokens + kept_out.num_tokens
    walking *= tokens / (few.trained.num_tokens + few.kept_out.num_tokens)
    found = list(scope.kinds.values())
    for kind in found:
        kind.look *= longer
    minutes = plan.config.recover.minutes
    if minutes is None:
        num_steps = steps_asked(plan, trained)
    else:
        left = 60 * minutes - closing - walking - 2 * judging * longer
        step, look = (sum(getattr(x, name) * x.count for x in found) for name in ("step", "look"))
        num_steps = steps_within(left, step=step, look=look)
    hidden = round(2 * probe.hidden_bytes * tokens / plan.sequences[CALIBRATION].num_tokens)
    limit = plan.config.runtime.memory_bytes
    kept = hidden if limit is None else min(hidden, limit)
    probe.memory.append(Memory(phase=PHASE, measured=memory.peak, kept=kept, gpu=memory.gpu))
    stored = sum(x.stored * x.count for x in found)
    numbers = sum(x.numbers * x.count for x in found)
    state = max((x.stored + STATE_BYTES * x.numbers for x in found), default=0)
    return Training(
        pieces=[
            *(piece for x in found for piece in _pieces(num_steps, x.step, x.look, x.count)),
            Piece(phase=PHASE, seconds=walking),
            Piece(phase=PHASE, seconds=judging * longer, times=2),
            Piece(phase=PHASE, seconds=closing),
        ],
        stored=stored,
        # Finished windows, the state of one, and in files without a name factors in float32 and
        # hidden states.
        unfinished=stored + state + FILE_BYTES * numbers + hidden - kept,
        num_steps=num_steps,
    )
