"""Phase two where `compression.sequential` is on.

Every layer is fitted to the inputs that the compressed layers before it give, so that it makes up
for their errors.

Both networks walk through the calibration data segment by segment. Inside a segment the layers come
in groups that read one input, in the order in which they run: both networks run up to that input,
its moments are summed, the group is fitted and becomes low-rank in the compressed network.

No layer is fitted in this way to the sequences that are held back: on them each measures how much
of the drift of its inputs it can really make up for (engine/solvers/sequential.py). The ranks, the
moments of gradients and the layers that are fitted plainly come from all sequences.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from lrc_cli.data.draw import Batch, micro_batch
from lrc_cli.data.purposes import CALIBRATION
from lrc_cli.engine import Choice, Drift, Sequential, SolveError
from lrc_cli.execution.chain import Chain, Segment, find_chain, segments_of
from lrc_cli.job.factors.decide_sequential import TIED, num_held_back
from lrc_cli.job.factors.fit import Fitted, fit_layer
from lrc_cli.job.factors.plain import PHASE
from lrc_cli.job.factors.problem import fit, request_of
from lrc_cli.job.factors.stored import contents_of, read_facts
from lrc_cli.job.factors.two_networks import Streams
from lrc_cli.job.plan import Plan
from lrc_cli.job.spectra.solve import solve_cost, solve_each, weight_of
from lrc_cli.job.spectra.survey import dense_reason
from lrc_cli.job.stage import Advance, Solved, Stage, Task
from lrc_cli.job.statistics.collect import MICRO_BATCH_TOKENS, read_statistics
from lrc_cli.job.work import STATISTICS, WorkDirectory
from lrc_cli.network.layer import Layer
from lrc_cli.runtime.spill import HostMemory

Drifts = tuple[Drift, Drift | None]
"""Moments over what is fitted to, and over what is held back."""
UNREACHED = "the first calibration sequences do not reach it"
WALK_COST = 0.05
"""Cost of a multiplication in a forward pass, in multiplications of an eigenproblem."""


class SequentialStage(Stage[dict[str, Fitted]]):
    """The factors of every layer, in the order in which the layers run.

    All processes walk together, each with its share of the data, and each fits some of the layers
    that read one input.

    Args:
        granted: what the budget grants, by layer name.
        excluded: why a layer is fitted plainly, by layer name; None: it is not, as far as its
            calls, its method and its tokens tell.
    """

    name = PHASE
    networks: type[Streams] = Streams
    """What holds both networks."""

    def __init__(
        self,
        plan: Plan,
        work: WorkDirectory,
        granted: Mapping[str, Choice],
        excluded: Mapping[str, str | None],
    ) -> None:
        super().__init__(work, plan.factors_stage, plan.units)
        self.plan, self.granted, self.excluded = plan, granted, excluded

    def task(self, units: Sequence[str]) -> Task[dict[str, Fitted]]:
        """See Stage. What an earlier run stored is put into the compressed network as it is."""
        plan = self.plan
        chain = find_chain(plan.network, next(plan.sequences[CALIBRATION].batches(1)))
        segments, streams = self.segments(chain), self.streams(chain)
        fits = _Fits(self, streams, units)
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
                streams.advance(segment)
                advance(_advance_cost(plan, segment))

        return Task(cost=cost, solve=solve)

    def batches(self) -> tuple[list[Batch], int]:
        """The micro-batches of all processes, and how many of the last ones are held back."""
        sequences = self.plan.sequences[CALIBRATION]
        size = micro_batch(sequences, MICRO_BATCH_TOKENS)
        fitted, held_back = sequences.split(len(sequences) - num_held_back(self.plan))
        held = list(held_back.batches(size))
        return [*fitted.batches(size), *held], len(held)

    def segments(self, chain: Chain) -> list[Segment]:
        """The segments that both networks pass, as the first micro-batch runs through them."""
        batches, _ = self.batches()
        return segments_of(self.plan.network, chain, self.plan.layers, batches[0])

    def streams(self, chain: Chain) -> Streams:
        """Both networks at the start of this process's micro-batches."""
        plan, (batches, num_held) = self.plan, self.batches()
        own = plan.processes.share(len(batches))
        return self.networks(
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
    """The layers' outcomes: a unit is handed out as soon as all its layers have one.

    Of several processes each fits some of the layers that read one input; then all install them.

    Args:
        missing: the units that are not stored.
    """

    def __init__(self, stage: SequentialStage, streams: Streams, missing: Sequence[str]) -> None:
        self.stage, self.plan, self.work = stage, stage.plan, stage.work
        self.streams = streams
        self.left = {layer.name for unit in missing for layer in self.plan.units[unit]}
        """Layers that have no outcome."""
        self.fitted: dict[str, Fitted] = {}

    def install_stored(self) -> None:
        """Put what is there already into the compressed network."""
        for layer in self.plan.layers:
            if layer.name not in self.left:
                # What comes before it in the network is not influenced, so it may come early.
                tensors, _ = self.work.get(self.stage.folder, layer.unit)
                facts = read_facts(self.work, self.stage.folder, layer.unit)
                self.streams.install(layer, tensors, facts[layer.name])

    def early(self, segments: Sequence[Segment]) -> dict[str, list[Layer]]:
        """The layers that are fitted plainly before the walk, by the reason."""
        reached = {layer.name for segment in segments for layer in segment.layers}
        layers = self._open(self.plan.layers)
        return {
            UNREACHED: [x for x in layers if x.name not in reached],
            # The embedding runs first, so the head that it is tied to cannot come in its turn.
            TIED: [x for x in layers if x.name in reached and x.tied_to],
        }

    def in_turn(self, segments: Sequence[Segment]) -> list[Segment]:
        """The segments to walk through: up to the last one with a layer to fit there."""
        is_last = [any(not x.tied_to for x in self._open(s.layers)) for s in segments]
        last = max((i for i, has_some in enumerate(is_last) if has_some), default=-1)
        return list(segments[: last + 1])

    def _open(self, layers: Sequence[Layer]) -> list[Layer]:
        return [x for x in layers if x.name in self.left]

    def add_plainly(
        self, layers: Sequence[Layer], reason: str, advance: Advance
    ) -> Solved[dict[str, Fitted]]:
        """Fit layers to the inputs that they have in the dense network."""
        yield from self._solve(partial(self._plain, reason=reason), layers)
        advance(solve_cost(layers))

    def add(
        self, segment: Segment, group: list[Layer], advance: Advance
    ) -> Solved[dict[str, Fitted]]:
        """Fit the layers that read one input, to which both networks have come."""
        todo = self._open(group)
        if not todo:
            return
        reasons = {layer.name: self._reason(layer) for layer in todo}
        first = next((layer for layer in todo if reasons[layer.name] is None), None)
        drifts = None
        if first is not None:
            share = _group_cost(self.plan, segment, first) / max(len(self.streams.batches), 1)
            drifts = self.streams.drift(segment, first, partial(advance, share))
        yield from self._solve(partial(self._fit, drifts, reasons), todo)
        advance(solve_cost(todo))

    def _solve(
        self, solve: Callable[[Layer], Fitted], layers: Sequence[Layer]
    ) -> Solved[dict[str, Fitted]]:
        """Every process fits its share of the layers; all get and keep them all."""
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
        self.streams.install(layer, fitted.tensors(layer), fitted.facts)

    def _is_complete(self, unit: str) -> bool:
        return all(member.name in self.fitted for member in self.plan.units[unit])

    def _reason(self, layer: Layer) -> str | None:
        """Why a layer is not fitted to the compressed network's inputs."""
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
        fitted = fit(self.plan, self.work, self.stage.granted, layer)
        facts = replace(
            fitted.facts, sequential=False, sequential_reason=reason, sequential_failed=failed
        )
        return replace(fitted, facts=facts)


def _fit_drifts(
    plan: Plan, work: WorkDirectory, layer: Layer, drifts: Drifts, choice: Choice
) -> Fitted:
    """The layer's outcome on both networks' inputs. Raises SolveError."""
    drift, held_back = drifts
    solver = plan.of(layer).solver
    fisher = None
    if "fisher" in solver.needs:
        statistics, _ = read_statistics(plan, work, layer)
        assert statistics is not None
        fisher = statistics.fisher
    compression = plan.config.compression
    # Where nothing could be held back, nothing says that a correction pays.
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
    """The segment's layers by what they read, in the order in which they first run."""
    groups: dict[str, list[Layer]] = {}
    for layer in segment.layers:
        leader = work.get(STATISTICS, layer.unit)[1]["layers"].get(layer.name, {}).get("group")
        groups.setdefault(leader or layer.name, []).append(layer)
    return list(groups.values())


def _walk_cost(plan: Plan, segment: Segment) -> float:
    """Cost of one network's pass through the segment."""
    tokens = plan.sequences[CALIBRATION].num_tokens
    return WALK_COST * tokens * sum(m * n for m, n in (x.shape for x in segment.layers))


def _group_cost(plan: Plan, segment: Segment, layer: Layer) -> float:
    """Cost of both networks' way to a group's input, half a segment or so, and of its moments."""
    tokens = plan.sequences[CALIBRATION].num_tokens
    return _walk_cost(plan, segment) + WALK_COST * 2 * tokens * layer.shape[1] ** 2


def _advance_cost(plan: Plan, segment: Segment) -> float:
    return 2 * _walk_cost(plan, segment)


def _segment_cost(plan: Plan, work: WorkDirectory, segment: Segment) -> float:
    solves = solve_cost(segment.layers)
    groups = sum(_group_cost(plan, segment, group[0]) for group in _groups(work, segment))
    return solves + groups + _advance_cost(plan, segment)
