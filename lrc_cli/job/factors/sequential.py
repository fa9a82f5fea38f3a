"""Phase two with `compression.sequential` fits layers to their inputs in the compressed network.

A layer thereby makes up for errors of the compressed layers before it.

Both networks walk through the calibration data segment by segment. Inside a segment the layers come
in groups that read one input, in the order in which they run. Both networks run up to that input,
and its moments are summed. The group is fitted and becomes low-rank in the compressed network.

Some sequences are held back from these fits. On them, each layer measures how much of the drift of
its inputs a fit can really make up for (engine/solvers/sequential.py). The ranks, the moments of
gradients and the layers that are fitted plainly come from all sequences.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from lrc_cli.data.draw import Batch, micro_batch
from lrc_cli.data.purposes import CALIBRATION
from lrc_cli.engine import Choice, Drift, Sequential, SolveError
from lrc_cli.execution.chain import Chain, Segment, find_chain, segments_of
from lrc_cli.job.factors.decide_sequential import TIED, num_held_back
from lrc_cli.job.factors.fit import Fitted, contents_of, fit_layer, read_facts
from lrc_cli.job.factors.plain import PHASE, fit_plainly, request_of
from lrc_cli.job.factors.two_networks import TwoNetworks
from lrc_cli.job.plan import Plan
from lrc_cli.job.spectra.solve import solve_cost, solve_each, weight_of
from lrc_cli.job.spectra.survey import dense_reason
from lrc_cli.job.stage import Advance, Solved, Stage, Task
from lrc_cli.job.statistics.collect import MICRO_BATCH_TOKENS, read_statistics
from lrc_cli.job.work import STATISTICS, WorkDirectory
from lrc_cli.network.layer import Layer
from lrc_cli.runtime.spill import HostMemory

Drifts = tuple[Drift, Drift | None]
"""Moments over the sequences that layers are fitted to, and over the sequences held back."""
UNREACHED = "the first calibration sequences do not reach it"
WALK_COST = 0.05
"""The cost of a multiplication in a forward pass, in multiplications of an eigenproblem."""


class SequentialStage(Stage[dict[str, Fitted]]):
    """The stage that makes the factors of every layer, in the order in which the layers run.

    All processes walk together, each with some of the micro-batches. Each process fits some of the
    layers that read one input.

    Args:
        granted: the choices that the budget grants, by layer name.
        excluded: see `Decision.excluded`.
    """

    name = PHASE
    networks_type: type[TwoNetworks] = TwoNetworks
    """The class of the object that holds both networks."""

    def __init__(
        self,
        plan: Plan,
        work: WorkDirectory,
        granted: Mapping[str, Choice],
        excluded: Mapping[str, str | None],
    ) -> None:
        super().__init__(work, plan.factors_stage, plan.units)
        self.plan, self.granted, self.excluded = plan, granted, excluded

    def check(self, folder: str, unit: str) -> None:
        """See Stage."""
        read_facts(self.work, folder, unit)

    def task(self, units: Sequence[str]) -> Task[dict[str, Fitted]]:
        """See Stage. Layers that an earlier run stored are put into the compressed network."""
        plan = self.plan
        chain = find_chain(plan.network, next(plan.sequences[CALIBRATION].batches(1)))
        segments, networks = self.segments(chain), self.open_networks(chain)
        fits = _Fits(self, networks, units)
        fits.install_stored()
        early, in_turn = fits.early(segments), fits.in_turn(segments)
        cost = sum(solve_cost(layers) for layers in early.values())
        cost += sum(_segment_cost(plan, self.work, segment) for segment in in_turn)

        def solve(advance: Advance) -> Solved[dict[str, Fitted]]:
            for reason, layers in early.items():
                yield from fits.add_plainly(layers, reason, advance)
            for segment in in_turn:
                for group in _groups(self.work, segment):
                    yield from fits.add(segment, group, advance)
                networks.advance(segment)
                advance(_advance_cost(plan, segment))

        return Task(cost=cost, solve=solve)

    def batches(self) -> tuple[list[Batch], int]:
        """Returns the micro-batches of all processes, and how many at the end are held back."""
        sequences = self.plan.sequences[CALIBRATION]
        size = micro_batch(sequences, MICRO_BATCH_TOKENS)
        fitted, held_back = sequences.split(len(sequences) - num_held_back(self.plan))
        held = list(held_back.batches(size))
        return [*fitted.batches(size), *held], len(held)

    def segments(self, chain: Chain) -> list[Segment]:
        """Returns the segments that both networks pass, as the first micro-batch shows them."""
        batches, _ = self.batches()
        return segments_of(self.plan.network, chain, self.plan.layers, batches[0])

    def open_networks(self, chain: Chain) -> TwoNetworks:
        """Returns both networks at the start of this process's micro-batches."""
        plan, (batches, num_held) = self.plan, self.batches()
        own = plan.processes.share(len(batches))
        return self.networks_type(
            plan,
            chain,
            [batches[i] for i in own],
            sum(index >= len(batches) - num_held for index in own),
            HostMemory(plan.config.runtime.memory_bytes, self.work.root).keep,
            # The factors of a deep network are as large as its checkpoint.
            HostMemory(0, self.work.root).hold,
        )

    def store(self, unit: str, outcome: dict[str, Fitted]) -> None:
        """See Stage."""
        self.work.put(self.folder, unit, *contents_of(self.plan.units[unit], outcome))


class _Fits:
    """The outcomes of the layers. A unit is yielded as soon as all its layers have an outcome.

    Each of several processes fits some of the layers that read one input. Every process then
    installs all of them.

    Args:
        missing: the units that are not stored.
    """

    def __init__(
        self, stage: SequentialStage, networks: TwoNetworks, missing: Sequence[str]
    ) -> None:
        self.stage, self.plan, self.work = stage, stage.plan, stage.work
        self.networks = networks
        self.left = {layer.name for unit in missing for layer in self.plan.units[unit]}
        """The names of layers that have no outcome yet."""
        self.fitted: dict[str, Fitted] = {}

    def install_stored(self) -> None:
        """Puts the layers of stored units into the compressed network."""
        for layer in self.plan.layers:
            if layer.name not in self.left:
                # A layer has no influence on layers before it, so it may be put there early.
                tensors, _ = self.work.get(self.stage.folder, layer.unit)
                facts = read_facts(self.work, self.stage.folder, layer.unit)
                self.networks.install(layer, tensors, facts[layer.name])

    def early(self, segments: Sequence[Segment]) -> dict[str, list[Layer]]:
        """Returns the layers that are fitted plainly before the walk, by the reason."""
        reached = {layer.name for segment in segments for layer in segment.layers}
        layers = self._without_outcome(self.plan.layers)
        return {
            UNREACHED: [x for x in layers if x.name not in reached],
            # The embedding runs first, so the head that it is tied to cannot come in its turn.
            TIED: [x for x in layers if x.name in reached and x.tied_to],
        }

    def in_turn(self, segments: Sequence[Segment]) -> list[Segment]:
        """Returns the segments to walk through, up to the last segment with a layer to fit."""
        is_last = [any(not x.tied_to for x in self._without_outcome(s.layers)) for s in segments]
        last = max((i for i, has_some in enumerate(is_last) if has_some), default=-1)
        return list(segments[: last + 1])

    def _without_outcome(self, layers: Sequence[Layer]) -> list[Layer]:
        return [x for x in layers if x.name in self.left]

    def add_plainly(
        self, layers: Sequence[Layer], reason: str, advance: Advance
    ) -> Solved[dict[str, Fitted]]:
        """Fits layers to their inputs in the dense network."""
        yield from self._solve(partial(self._plain, reason=reason), layers)
        advance(solve_cost(layers))

    def add(
        self, segment: Segment, group: list[Layer], advance: Advance
    ) -> Solved[dict[str, Fitted]]:
        """Fits the layers that read one input, to which both networks have come."""
        todo = self._without_outcome(group)
        if not todo:
            return
        reasons = {layer.name: self._reason(layer) for layer in todo}
        first = next((layer for layer in todo if reasons[layer.name] is None), None)
        drifts = None
        if first is not None:
            cost = _group_cost(self.plan, segment, first) / max(len(self.networks.batches), 1)
            drifts = self.networks.drift(segment, first, partial(advance, cost))
        yield from self._solve(partial(self._fit, drifts, reasons), todo)
        advance(solve_cost(todo))

    def _solve(
        self, solve: Callable[[Layer], Fitted], layers: Sequence[Layer]
    ) -> Solved[dict[str, Fitted]]:
        """Fits some of the layers in every process, and hands all outcomes to all processes."""
        processes = self.plan.processes
        owners = processes.owners({layer.name: layer.solve_cost for layer in layers})
        own = [layer for layer in layers if owners[layer.name] == processes.rank]
        solved = solve_each(self.plan, own, solve)
        found = {x.name: fitted.on_host() for x, fitted in zip(own, solved, strict=True)}
        everywhere = {k: fitted for part in processes.gather(found) for k, fitted in part.items()}
        for layer in layers:
            self._keep(layer, everywhere[layer.name])
            if self._is_complete(layer.unit):
                members = self.plan.units[layer.unit]
                done = {member.name: self.fitted.pop(member.name) for member in members}
                if self.plan.owns(layer.unit):
                    yield layer.unit, done

    def _keep(self, layer: Layer, fitted: Fitted) -> None:
        self.left.remove(layer.name)
        self.fitted[layer.name] = fitted
        self.networks.install(layer, fitted.tensors(layer), fitted.facts)

    def _is_complete(self, unit: str) -> bool:
        return all(member.name in self.fitted for member in self.plan.units[unit])

    def _reason(self, layer: Layer) -> str | None:
        """Returns why a layer is not fitted to the compressed network's inputs; None: it is."""
        if self.stage.granted[layer.name].is_dense or dense_reason(self.work, layer):
            return "it stays dense"
        return self.stage.excluded[layer.name]

    def _fit(
        self, drifts: Drifts | None, reasons: Mapping[str, str | None], layer: Layer
    ) -> Fitted:
        reason = reasons[layer.name]
        if reason is not None:
            return self._plain(layer, reason)
        if drifts is None:
            return self._plain(layer, "the tokens that reach it depend on the layers before it")
        choice = self.stage.granted[layer.name]
        try:
            fitted = _fit_drifts(self.plan, self.work, layer, drifts, choice)
        except SolveError as error:
            return self._plain(layer, f"could not be solved: {error}", failed=True)
        if fitted.facts.fallback:
            return self._plain(layer, fitted.facts.reason or "", failed=True)
        return fitted

    def _plain(self, layer: Layer, reason: str, *, failed: bool = False) -> Fitted:
        fitted = fit_plainly(self.plan, self.work, self.stage.granted, layer)
        facts = replace(
            fitted.facts, sequential=False, sequential_reason=reason, sequential_failed=failed
        )
        return replace(fitted, facts=facts)


def _fit_drifts(
    plan: Plan, work: WorkDirectory, layer: Layer, drifts: Drifts, choice: Choice
) -> Fitted:
    """Fits a layer to both networks' inputs and returns the outcome. Raises SolveError."""
    drift, held_back = drifts
    solver = plan.of(layer).solver
    fisher = None
    if "fisher" in solver.needs:
        statistics, _ = read_statistics(plan, work, layer)
        assert statistics is not None
        fisher = statistics.fisher
    compression = plan.config.compression
    # Where no sequence was held back, nothing shows that a correction pays.
    asked = 0.0 if compression.correction == "auto" else compression.correction
    problem = Sequential(
        weight_of(plan, layer),
        drift,
        solver,
        ridge=compression.ridge,
        correction=asked if held_back is None else held_back,
        fisher=fisher,
    )
    fitted = fit_layer(problem, request_of(plan, layer, choice))
    facts = replace(fitted.facts, sequential=True)
    if facts.errors is not None:
        metric = replace(facts.errors.metric, inherited=problem.inherited)
        facts = replace(facts, errors=replace(facts.errors, metric=metric))
    return replace(fitted, facts=facts)


def _groups(work: WorkDirectory, segment: Segment) -> list[list[Layer]]:
    """Returns the segment's layers in groups that read one input, in the order of their runs."""
    groups: dict[str, list[Layer]] = {}
    for layer in segment.layers:
        leader = work.get(STATISTICS, layer.unit)[1]["layers"].get(layer.name, {}).get("group")
        groups.setdefault(leader or layer.name, []).append(layer)
    return list(groups.values())


def _walk_cost(plan: Plan, segment: Segment) -> float:
    """Returns the cost of one network's pass through the segment."""
    tokens = plan.sequences[CALIBRATION].num_tokens
    return WALK_COST * tokens * sum(m * n for m, n in (x.shape for x in segment.layers))


def _group_cost(plan: Plan, segment: Segment, layer: Layer) -> float:
    """Returns the cost of both networks' way to a group's input, and of the input's moments.

    The way is taken to be half a segment.
    """
    tokens = plan.sequences[CALIBRATION].num_tokens
    return _walk_cost(plan, segment) + WALK_COST * 2 * tokens * layer.shape[1] ** 2


def _advance_cost(plan: Plan, segment: Segment) -> float:
    return 2 * _walk_cost(plan, segment)


def _segment_cost(plan: Plan, work: WorkDirectory, segment: Segment) -> float:
    solves = solve_cost(segment.layers)
    groups = sum(_group_cost(plan, segment, group[0]) for group in _groups(work, segment))
    return solves + groups + _advance_cost(plan, segment)
