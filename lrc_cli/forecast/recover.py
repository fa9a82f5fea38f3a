"""The probe measures training with the job's own stage, on made-up factors of the granted ranks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from lrc_cli.data.purposes import RECOVER
from lrc_cli.engine import Choice, pivot_block
from lrc_cli.engine.training import JUDGEMENTS, USUAL_TRIALS, steps_within, trial_steps
from lrc_cli.forecast.clocks import Clock, typical
from lrc_cli.forecast.estimate import Memory, Piece
from lrc_cli.forecast.probe import Probe
from lrc_cli.forms import DENSE, FORMS, PERM, UP, WEIGHT, Packed
from lrc_cli.job.plan import Plan
from lrc_cli.job.recover.model import HELD_OUT, split, step_size, step_tokens
from lrc_cli.job.recover.scope import STORE_SECONDS, steps_asked, training_data
from lrc_cli.job.recover.stage import SUMMARY, RecoverStage, own_stages
from lrc_cli.job.recover.whole import WholeNetwork
from lrc_cli.job.work import Tensors, WorkDirectory
from lrc_cli.network.layer import Layer
from lrc_cli.report.record import LayerFacts
from lrc_cli.runtime.memory import PrivateMemory

PHASE = RecoverStage.name
STATE_BYTES = 3 * 4
"""The bytes in an unfinished training for each number: the number and Adam's two, in float32."""
NUM_STEPS = 2
"""The steps that are measured. The first step warms up."""


class _MadeUp(RecoverStage):
    """The job's stage, with factors of zeros in the place of fitted ones.

    Args:
        granted: the choices that the budget grants, by layer name.
    """

    def __init__(self, plan: Plan, work: WorkDirectory, granted: Mapping[str, Choice]) -> None:
        super().__init__(plan, work, plan.factors_stage)
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
    record: dict[str, int] | None = None
    """The steps, tokens and sequences, for people; None where nothing is left to train."""


def run_recover(
    probe: Probe, plan: Plan, granted: Mapping[str, Choice], kinds: Mapping[str, Sequence[str]]
) -> Training:
    """Returns what the training of one size will take; nothing where it is done, or not asked for.

    Args:
        kinds: {unit whose statistics and spectra the probe has: all units like it}.
    """
    is_dense = all(choice.is_dense for choice in granted.values())
    if not plan.config.recover.is_used or is_dense or probe.has(own_stages(plan)[1], SUMMARY):
        return Training()
    stage = _MadeUp(_on_few(plan), probe.work, granted)
    with PrivateMemory(plan.device) as memory:
        scope = WholeNetwork(stage.start)
        training, objective = scope.training, scope.objective
        clock = Clock(plan.device)
        for number in range(NUM_STEPS):
            training.take(number, 0.0)
            clock.tick()
        training.judged()
        clock.tick()
        *steps, judging = clock.steps
        clock = Clock(plan.device)
        for unit in kinds:
            stage.measured(unit, training.best)
            clock.tick()
    stored = sum(x.nbytes for x in training.best.values())
    numbers = sum(x.numel() for x in training.best.values())
    # The best tensors are others than the first ones as soon as something was gained.
    probe.memory.append(Memory(phase=PHASE, measured=memory.peak + stored, gpu=memory.gpu))
    trained, kept_out = split(training_data(plan))
    each, look = typical(steps), judging * kept_out.num_tokens / objective.kept_out.num_tokens
    closing = sum(
        seconds * len(units) for seconds, units in zip(clock.steps, kinds.values(), strict=True)
    )
    minutes = plan.config.recover.minutes
    if minutes is None:
        num_steps = steps_asked(plan, trained)
    else:
        num_steps = steps_within(60 * minutes - closing, step=each, look=look)
    all_steps = num_steps + USUAL_TRIALS * trial_steps(num_steps)
    pieces = [
        Piece(phase=PHASE, seconds=each, times=all_steps),
        Piece(phase=PHASE, seconds=look, times=JUDGEMENTS),
        Piece(phase=PHASE, seconds=closing),
    ]
    # A state is stored every minute. The state before it is deleted once the new one is whole.
    states = sum(x.seconds * x.times for x in pieces) / STORE_SECONDS + (minutes is not None)
    return Training(
        pieces=pieces,
        stored=stored,
        unfinished=min(2, int(states)) * (stored + STATE_BYTES * numbers),
        record={
            "steps": num_steps,
            "tokens": round(num_steps * step_tokens(trained)),
            "num_sequences": len(trained),
            "num_held_out": len(kept_out),
        },
    )
