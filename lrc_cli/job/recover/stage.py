"""The stage `recover` trains the factors of all layers together and measures them again."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from lrc_cli.config import to_dict
from lrc_cli.data.draw import Sequences
from lrc_cli.data.purposes import CALIBRATION, RECOVER
from lrc_cli.engine import problems_of
from lrc_cli.engine.training import LOOKS, RATES, USUAL_TRIALS, Trainee, Training
from lrc_cli.errors import InputError
from lrc_cli.execution.chain import find_chain
from lrc_cli.execution.divergence import OBJECTIVES
from lrc_cli.execution.losses import choose_loss
from lrc_cli.forms import PERM, UP, WEIGHT
from lrc_cli.job.factors.fit import read_facts
from lrc_cli.job.factors.plain import GivenLayer
from lrc_cli.job.factors.two_networks import TwoNetworks
from lrc_cli.job.fingerprints import digest
from lrc_cli.job.plan import Plan
from lrc_cli.job.recover.measured import measured_again
from lrc_cli.job.recover.model import OutputDivergence, step_tokens
from lrc_cli.job.stage import Advance, Solved, Stage, Task
from lrc_cli.job.work import RECOVERED, Tensors, WorkDirectory
from lrc_cli.network.keys import BIAS
from lrc_cli.network.layer import Layer
from lrc_cli.network.low_rank.modules import LowRankModule
from lrc_cli.report.record import LayerFacts, Recovery

STORE_SECONDS = 60.0
"""The time after which the state of the training is stored again."""
EPOCHS = 4
"""How often the data is seen where the config gives no number of tokens."""
JUDGEMENTS = LOOKS + USUAL_TRIALS + 1
"""How often held-out data is looked at, in a usual training."""
SUMMARY = "the training"
"""The unit that says what the training gave; no module has a name with a space."""
STATE = "state"
"""The stage, below the recovered factors, that holds an unfinished training."""


@dataclass(frozen=True)
class Recovered:
    """What is stored of a unit."""

    tensors: Tensors
    facts: dict[str, Any]


class RecoverStage(Stage[Recovered]):
    """The stage that trains the factors of every layer, all layers together.

    Its units are the network's units, with trained tensors, and one unit that says what the
    training gave. An unfinished training is stored from time to time and goes on from there.

    Args:
        factors: the stage that holds the fitted factors.
    """

    name = "recover"

    def __init__(self, plan: Plan, work: WorkDirectory, factors: str) -> None:
        self.sequences = training_data(plan)
        super().__init__(work, _recovered_folder(plan), [*plan.units, SUMMARY])
        self.plan, self.factors = plan, factors

    @property
    def state_folder(self) -> str:
        """The stage of the work directory that holds an unfinished training."""
        return f"{self.folder}/{STATE}"

    def check(self, folder: str, unit: str) -> None:
        """See Stage."""
        if unit == SUMMARY:
            read_recovery(self.work, folder)
        else:
            read_facts(self.work, folder, unit)

    def drop_damaged(self) -> list[str]:
        """See Stage."""
        return [*super().drop_damaged(), *self.work.drop_damaged(self.state_folder, [STATE])]

    def task(self, units: Sequence[str]) -> Task[Recovered]:
        """See Stage. Where some units are missing, the training is done again."""
        plan, done = self.plan, _Tokens()
        training, objective = self.prepare(done.add)
        if not self.work.missing(self.state_folder, [STATE]):
            training.load(*self.work.get(self.state_folder, STATE))

        def solve(advance: Advance) -> Solved[Recovered]:
            done.advance = advance
            self._run(training)
            summary = _summary(training, objective)
            for unit in plan.units:
                if plan.owns(unit):
                    yield unit, self._recovered(unit, training, summary.gained)
            if plan.processes.is_first:
                yield SUMMARY, Recovered({}, summary.to_json())

        steps = training.num_steps - training.step + USUAL_TRIALS * training.trial_steps
        cost = steps * step_tokens(objective.trained) + JUDGEMENTS * objective.kept_out.num_tokens
        return Task(cost=cost, solve=solve)

    def prepare(self, advance: Advance) -> tuple[Training, OutputDivergence]:
        """Returns a training that begins at the fitted factors, and its objective.

        Args:
            advance: called with the number of tokens that were run.
        """
        plan, sequences = self.plan, self.sequences
        batch = next(sequences.batches(1))
        chain = find_chain(plan.network, batch)
        networks = TwoNetworks(plan, chain, [])
        trainees = self._install(networks)
        objective = OutputDivergence(
            plan.network,
            networks.compressed.network,
            chain,
            sequences,
            loss=choose_loss(plan.config.compression.loss, plan.network, batch, plan.tokenizer),
            seed=plan.config.runtime.seed,
            processes=plan.processes,
            advance=advance,
        )
        num_steps = steps_asked(plan, objective.trained)
        return Training(objective, trainees, num_steps=num_steps), objective

    def _run(self, training: Training) -> None:
        stored = time.monotonic()
        for _ in training.run():
            # All processes hold the same state, so the first one stores it.
            if self.plan.processes.is_first and time.monotonic() - stored > STORE_SECONDS:
                self.work.put(self.state_folder, STATE, *training.state())
                stored = time.monotonic()

    def store(self, unit: str, outcome: Recovered) -> None:
        """See Stage."""
        self.work.put(self.folder, unit, outcome.tensors, outcome.facts)

    def close(self) -> None:
        """See Stage."""
        self.work.drop([self.state_folder])

    def _install(self, networks: TwoNetworks) -> list[Trainee]:
        """Puts the fitted layers into the compressed network, with float32 numbers to train."""
        trainees = []
        for unit, layers in self.plan.units.items():
            tensors, facts = self.fitted(unit)
            for layer in layers:
                own = {key: tensors[key] for key in _keys(layer) if key in tensors}
                wide = {k: x.float() if x.is_floating_point() else x for k, x in own.items()}
                networks.install(layer, wide, facts[layer.name])
                for key, parameter in _parameters(networks, layer).items():
                    parameter.data = parameter.data.to(self.plan.device)
                    parameter.requires_grad_(True)
                    dtype = own[key].dtype
                    trainees.append(Trainee(name=key, parameter=parameter, dtype=dtype))
        return trainees

    def fitted(self, unit: str) -> tuple[Tensors, dict[str, LayerFacts]]:
        """Returns a unit's tensors and facts, as they were before the training."""
        tensors, _ = self.work.get(self.factors, unit)
        return tensors, read_facts(self.work, self.factors, unit)

    def _recovered(self, unit: str, training: Training, gained: bool) -> Recovered:
        """Returns the unit with the best tensors of the training, and their errors."""
        tensors, facts = self.fitted(unit)
        if not gained:
            return Recovered(tensors, {name: fact.to_json() for name, fact in facts.items()})
        trained = {key: training.best.get(key, tensor).cpu() for key, tensor in tensors.items()}
        found = {}
        for layer in self.plan.units[unit]:
            fact = facts[layer.name]
            if layer.keys.weight in training.best:
                given = GivenLayer(self.plan, self.work, layer)
                fact = measured_again(
                    problems_of(self.plan.of(layer).solver, given), layer, trained, fact, given.bias
                )
            found[layer.name] = fact.to_json()
        return Recovered(trained, found)


class _Tokens:
    """Hands on how many tokens were run, once the display is there."""

    advance: Advance | None = None

    def add(self, tokens: float) -> None:
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


def check_recover(plan: Plan) -> None:
    """Raises InputError where training is asked for, and something else forbids it."""
    compression = plan.config.compression
    if not plan.config.recover.is_used:
        return
    target, _ = compression.target
    if target in ("max_layer_error", "max_loss_increase"):
        raise InputError(
            f"recover.scope: {target} bounds errors of single layers, which training may raise to"
            " lower the error of the whole",
            f"set recover.scope: none, or set size in place of {target}",
        )
    reason = next((x.no_recover for x in plan.solvers if x.no_recover), None)
    if compression.center:
        reason = "compression.center fits biases to their factors in closed form"
    if reason is not None:
        raise InputError(
            f"recover.scope: {reason}",
            "set recover.scope: none, or another method and center: false",
        )
    if len(training_data(plan)) < 2:
        raise InputError(
            "recover.scope: there is one sequence to train on, and one is held out to judge by",
            "give more sequences, or set recover.scope: none",
        )


def read_recovery(work: WorkDirectory, folder: str) -> Recovery:
    """Returns what a finished training gave.

    Raises:
        DamagedUnit: the file does not hold what was stored.
    """
    try:
        return Recovery.from_json(work.facts(folder, SUMMARY), folder, SUMMARY)
    except InputError as error:
        raise work.damaged(folder, SUMMARY, error.message) from error


def _keys(layer: Layer) -> list[str]:
    return [layer.keys.key(name) for name in (WEIGHT, UP, PERM, BIAS)]


def _parameters(networks: TwoNetworks, layer: Layer) -> dict[str, nn.Parameter]:
    """Returns the parameters of a layer that are trained, by disk name: both factors."""
    module = networks.compressed.network.module.get_submodule(layer.tied_to or layer.name)
    if not isinstance(module, LowRankModule):
        return {}
    parts = {WEIGHT: module.down, UP: module.up}
    return {layer.keys.key(name): _own_weight(part) for name, part in parts.items()}


def _own_weight(part: nn.Module) -> nn.Parameter:
    """Returns the weight that a module holds, which it may read in another dtype."""
    if parametrize.is_parametrized(part, "weight"):
        return part.get_parameter("parametrizations.weight.original")
    return part.get_parameter("weight")


def own_stages(plan: Plan) -> tuple[str, str]:
    """Returns the stages that belong to one size: the factors, and the trained factors."""
    return plan.factors_stage, _recovered_folder(plan)


def _recovered_folder(plan: Plan) -> str:
    """Returns the stage of the work directory for all that a training depends on."""
    asked = to_dict(plan.config)["recover"]
    sha256 = training_data(plan).sha256
    return f"{RECOVERED}/{digest([plan.factors_fingerprint, asked, sha256])[:16]}"


def _summary(training: Training, objective: OutputDivergence) -> Recovery:
    trials = {f"{RATES[place]:.2g}": value for place, value in sorted(training.trials.items())}
    return Recovery(
        scope="model",
        objective=OBJECTIVES[objective.loss.kind],
        before=training.start,
        after=training.lowest,
        rate=training.rate if training.step else None,
        trials={rate: value if math.isfinite(value) else None for rate, value in trials.items()},
        steps=training.step,
        planned_steps=training.num_steps,
        tokens=round(training.step * step_tokens(objective.trained)),
        num_sequences=len(objective.trained),
        num_held_out=len(objective.kept_out),
    )
