"""The stage `recover` trains the factors of all layers and measures them again."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Self

from lrc_cli.config import to_dict
from lrc_cli.data.purposes import RECOVER
from lrc_cli.engine import STORAGES, Choice, problems_of
from lrc_cli.errors import InputError, RunError, is_out_of_memory
from lrc_cli.job.factors.fit import read_facts
from lrc_cli.job.factors.plain import GivenLayer
from lrc_cli.job.fingerprints import digest
from lrc_cli.job.plan import Plan
from lrc_cli.job.recover.decide_scope import ScopeDecision, decide_scope
from lrc_cli.job.recover.in_turn import InTurn
from lrc_cli.job.recover.measured import measured_again
from lrc_cli.job.recover.model import split
from lrc_cli.job.recover.scope import Scope, Start, training_data
from lrc_cli.job.recover.trainees import keys_of
from lrc_cli.job.recover.whole import WholeNetwork
from lrc_cli.job.recover.windows import find_windows
from lrc_cli.job.stage import Advance, Solved, Stage, Task
from lrc_cli.job.work import RECOVERED, Tensors, WorkDirectory
from lrc_cli.report.record import LayerFacts, Recovery
from lrc_cli.text import told

SUMMARY = "the training"
"""The unit that says what the training gave; no module has a name with a space."""
WHERE = ("path", "part", "num_sequences")
"""The keys that say which data to train on: what counts is the data."""
UNFINISHED = "unfinished"
"""The stage, below the recovered factors, for what only an unfinished training needs."""


@dataclass(frozen=True)
class Recovered:
    """What is stored of a unit."""

    tensors: Tensors
    facts: dict[str, Any]


class RecoverStage(Stage[Recovered]):
    """The stage that trains the factors of every layer.

    Its units are the network's units, with trained tensors, and one unit that says what the
    training gave. An unfinished training is stored from time to time and goes on from there.

    Args:
        factors: the stage that holds the fitted factors.
        decision: what is trained at a time.
    """

    name = "recover"

    def __init__(
        self, plan: Plan, work: WorkDirectory, factors: str, decision: ScopeDecision
    ) -> None:
        super().__init__(work, recovered_folder(plan, decision.scope), [*plan.units, SUMMARY])
        self.plan, self.factors, self.decision = plan, factors, decision

    @classmethod
    def decided(
        cls,
        plan: Plan,
        work: WorkDirectory,
        factors: str,
        granted: Mapping[str, Choice],
        say: Callable[[str], None],
    ) -> Self:
        """Returns the stage with the scope that fits, and says why `auto` takes the scope."""
        decision = decide_scope(plan, granted)
        if decision.reason is not None:
            say(f"recover.scope: auto takes {decision.scope}: {decision.reason}")
        return cls(plan, work, factors, decision)

    @property
    def unfinished(self) -> str:
        """The stage of the work directory that holds an unfinished training."""
        return f"{self.folder}/{UNFINISHED}"

    def check(self, folder: str, unit: str) -> None:
        """See Stage."""
        if unit == SUMMARY:
            read_recovery(self.work, folder)
        else:
            read_facts(self.work, folder, unit)

    def drop_damaged(self) -> list[str]:
        """See Stage."""
        return [*super().drop_damaged(), *self.work.drop_damaged(self.unfinished)]

    def task(self, units: Sequence[str]) -> Task[Recovered]:
        """See Stage. Where some units are missing, the training is done again."""
        with self._naming_memory():
            scope = self.scope()

        def solve(advance: Advance) -> Solved[Recovered]:
            with self._naming_memory():
                summary = scope.train(advance)
            for unit in self.plan.units:
                if self.plan.owns(unit):
                    yield unit, self._recovered(unit, scope, gained=summary.gained)
            if self.plan.processes.is_first:
                reason = self.decision.reason
                yield SUMMARY, Recovered({}, replace(summary, reason=reason).to_json())

        return Task(cost=scope.cost, solve=solve)

    def scope(self) -> Scope:
        """Returns the training that the config asks for, where an earlier run has left it."""
        is_block = self.decision.scope == "block"
        return InTurn(self.start) if is_block else WholeNetwork(self.start)

    @property
    def start(self) -> Start:
        """What the training begins with."""
        return Start(
            plan=self.plan,
            work=self.work,
            folder=self.unfinished,
            fitted=self.fitted,
            measure=self.measured,
        )

    def store(self, unit: str, outcome: Recovered) -> None:
        """See Stage."""
        self.work.put(self.folder, unit, outcome.tensors, outcome.facts)

    def close(self) -> None:
        """See Stage."""
        self.work.drop([self.unfinished])

    def fitted(self, unit: str) -> tuple[Tensors, dict[str, LayerFacts]]:
        """Returns a unit's tensors and facts, as they were before the training."""
        tensors, _ = self.work.get(self.factors, unit)
        return tensors, read_facts(self.work, self.factors, unit)

    def _recovered(self, unit: str, scope: Scope, *, gained: bool) -> Recovered:
        """Returns the unit with the trained tensors, and their errors."""
        parts = [scope.trained(layer) for layer in self.plan.units[unit]]
        trained = {key: tensor for own in parts for key, tensor in own.items()}
        found = self.measured(unit, trained, gained=gained)
        return Recovered(found.tensors | scope.others(unit), found.facts)

    def measured(self, unit: str, trained: Tensors, *, gained: bool = True) -> Recovered:
        """Returns the unit with trained tensors in the place of its own, and their errors.

        Args:
            trained: the trained tensors of the unit, by disk name.
            gained: whether any layer of the network has trained tensors.
        """
        tensors, facts = self.fitted(unit)
        found = {}
        for layer in self.plan.units[unit]:
            fact = facts[layer.name]
            moved = layer.keys.weight in trained
            if moved or (gained and fact.sequential):
                own = {key: trained[key].cpu() for key in keys_of(layer) if key in trained}
                given, tensors = GivenLayer(self.plan, self.work, layer), tensors | own
                problems = problems_of(self.plan.of(layer).solver, given)
                fact = measured_again(problems, layer, tensors, fact, given.bias, trained=moved)
            found[layer.name] = fact.to_json()
        return Recovered(tensors, found)

    @contextmanager
    def _naming_memory(self) -> Iterator[None]:
        """A context in which memory that does not suffice is said to be the training's.

        Raises:
            RunError: memory ran out. What was stored of the training stays.
        """
        try:
            yield
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            first = (told(error).splitlines() or ["no more can be had"])[0]
            less = "block or none" if self.decision.scope == "model" else "none"
            raise RunError(
                f"recover.scope: out of memory in the training ({first})",
                f"set recover.scope: {less}, lower calibration.sequence_length, or exclude the"
                " widest layers with compression.exclude",
            ) from error


def check_recover(plans: Sequence[Plan]) -> None:
    """Raises InputError where training is asked for, and something else forbids it.

    Args:
        plans: the plans of several sizes, which have one network and one section `recover`.
    """
    if plans[0].config.recover.is_used:
        for plan in plans:
            _check_target(plan)
        _check_data(plans[0])
        _check_windows(plans[0])


def _check_target(plan: Plan) -> None:
    compression = plan.config.compression
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
    storages = (plan.of(layer).storage for layer in plan.layers)
    fixed = next((name for name in storages if not STORAGES[name].is_trainable), None)
    if fixed is not None:
        raise InputError(
            f"recover.scope: the numbers of compression.storage: {fixed} cannot be trained",
            "set recover.scope: none, or another compression.storage",
        )


def _check_data(plan: Plan) -> None:
    trained, _ = split(training_data(plan))
    if not trained or (plan.config.recover.path is not None and RECOVER not in plan.sequences):
        raise InputError(
            "recover.scope: there is no sequence to train on, beside one that is held out to judge"
            " by and all that are certified or evaluated on",
            "give more sequences that differ, or set recover.scope: none",
        )


def _check_windows(plan: Plan) -> None:
    if plan.config.recover.scope != "block":
        return
    if not find_windows(plan.network, plan.layers, next(training_data(plan).batches(1))):
        raise InputError(
            "recover.scope: block: no layer lies in blocks that form a chain, each of which reads"
            " nothing of other blocks but the output of the one before",
            "set recover.scope: model",
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


def own_stages(plan: Plan) -> tuple[str, ...]:
    """Returns the stages that belong to one size: the factors, and trained ones of every scope."""
    return plan.factors_stage, *(recovered_folder(plan, scope) for scope in ("model", "block"))


def recovered_folder(plan: Plan, scope: str) -> str:
    """Returns the stage of the work directory for all that a training depends on."""
    asked = to_dict(plan.config)["recover"] | {"scope": scope}
    how = {key: value for key, value in asked.items() if key not in WHERE}
    sha256 = training_data(plan).sha256
    return f"{RECOVERED}/{digest([plan.factors_fingerprint, how, sha256])[:16]}"
