"""The probe measures training with the job's own stage, on made-up factors of the granted ranks."""

from collections.abc import Mapping
from dataclasses import replace

import torch

from lrc_cli.data.purposes import RECOVER
from lrc_cli.engine import Choice, pivot_block
from lrc_cli.engine.training import USUAL_TRIALS, trial_steps
from lrc_cli.forecast.clocks import Clock, typical
from lrc_cli.forecast.estimate import Memory, Piece
from lrc_cli.forecast.probe import Probe
from lrc_cli.forms import DENSE, FORMS, PERM, UP, WEIGHT, Packed
from lrc_cli.job.plan import Plan
from lrc_cli.job.recover.model import HELD_OUT, split, step_size
from lrc_cli.job.recover.scope import JUDGEMENTS, steps_asked, training_data
from lrc_cli.job.recover.stage import RecoverStage
from lrc_cli.job.recover.whole import WholeNetwork
from lrc_cli.job.work import Tensors, WorkDirectory
from lrc_cli.network.layer import Layer
from lrc_cli.report.record import LayerFacts
from lrc_cli.runtime.memory import PrivateMemory

PHASE = RecoverStage.name
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
    """Returns a plan with as few sequences as fill one step, and some that are held out."""
    whole = training_data(plan)
    number = min(len(whole), step_size(split(whole)[0]) + HELD_OUT)
    few, _ = whole.split(number)
    return replace(plan, sequences={**plan.sequences, RECOVER: few})


def run_recover(
    probe: Probe, plan: Plan, granted: Mapping[str, Choice]
) -> tuple[list[Piece], int, int]:
    """Returns the pieces of training at one size, and the bytes that it stores in the end.

    Returns:
        The pieces; the bytes of the trained factors; and the bytes of an unfinished training, which
        are deleted again.
    """
    stage = _MadeUp(_on_few(plan), probe.work, granted)
    with PrivateMemory(plan.device) as memory:
        scope = WholeNetwork(stage.start)
        training, objective = scope.training, scope.objective
        clock = Clock(plan.device)
        for step in range(NUM_STEPS):
            training.take(step, 0.0)
            clock.tick()
        training.judged()
        clock.tick()
    *steps, judging = clock.steps
    probe.memory.append(Memory(phase=PHASE, measured=memory.peak, gpu=memory.gpu))
    whole, kept_out = split(training_data(plan))
    num_steps = steps_asked(plan, whole)
    times = num_steps + USUAL_TRIALS * trial_steps(num_steps)
    tokens = JUDGEMENTS * kept_out.num_tokens
    state = sum(x.nbytes for x in training.state()[0].values())
    pieces = [
        Piece(phase=PHASE, seconds=typical(steps), times=times),
        Piece(phase=PHASE, seconds=judging / objective.kept_out.num_tokens, times=tokens),
    ]
    return pieces, sum(x.nbytes for x in training.best.values()), state
