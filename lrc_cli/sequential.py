"""Phase two where `compression.sequential` is on: every layer is fitted to the inputs that the
compressed layers before it give, so that it makes up for their errors.

Both networks walk through the calibration data segment by segment. Inside a segment the layers come
in groups that read one input, in the order in which they run: both networks run up to that input,
its moments are summed, the group is fitted and becomes low-rank in the compressed network.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from lrc_cli.blocks import Segment, find_chain, segments_of
from lrc_cli.engine import DENSE, Drift, Sequential, SolveError, pivot_block, storage_bytes
from lrc_cli.errors import InputError
from lrc_cli.fit import Fitted, fit_layer
from lrc_cli.gather import MICRO_BATCH_TOKENS, read_statistics
from lrc_cli.layerwise import (
    dense_reason,
    fit,
    num_workers,
    request_of,
    solve_cost,
    weight_of,
)
from lrc_cli.memory import HostMemory
from lrc_cli.models import Layer, hooked
from lrc_cli.parallel import in_parallel
from lrc_cli.plan import Plan
from lrc_cli.progress import Phase, Progress
from lrc_cli.purposes import CALIBRATION
from lrc_cli.statistics import micro_batch
from lrc_cli.streams import Streams
from lrc_cli.work import STATISTICS, WorkDirectory

METHODS = ("frobenius", "curvature")
"""Those whose problem has a form on two networks' inputs."""
MIN_TOKENS = 10
"""For each input of a layer. With fewer the fit learns the calibration tokens by heart."""
LARGEST_SHARE = 0.5
"""Of the bytes: `auto` is off where more is kept. On SmolLM2 sequential fitting lowers the
perplexity by a fifth at 0.4 and raises it a little at 0.6 (docs/benchmarks.md)."""
WALK_COST = 0.05
"""Of a multiplication in a forward pass, in those of an eigenproblem."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Whether a run is sequential."""

    used: bool
    reason: str
    """Why or why not, in words."""

    def facts(self) -> dict[str, Any]:
        """For the report."""
        return {"used": self.used, "reason": self.reason}


def check_sequential(plan: Plan) -> None:
    """Raise InputError where sequential fitting is asked for, and target or methods rule it out."""
    compression = plan.config.compression
    if compression.sequential is not True:
        return
    if compression.max_layer_error is not None:
        raise InputError(
            "compression.sequential: max_layer_error bounds errors on the dense network's inputs,"
            " and sequential fitting uses others",
            "set sequential: false, or set size in place of max_layer_error",
        )
    methods = {solver.name for solver in plan.solvers.values()}
    if not methods & set(METHODS):
        raise InputError(
            f"compression.sequential: no layer has method {' or '.join(METHODS)}, but"
            f" {' and '.join(sorted(methods))}",
            "set sequential: false, or another method",
        )


def decide(plan: Plan, work: WorkDirectory, ranks: Mapping[str, int]) -> Decision:
    """Resolve `compression.sequential` once the ranks are known."""
    compression = plan.config.compression
    if compression.sequential is False:
        return Decision(used=False, reason="compression.sequential is false")
    layers = [layer for layer in plan.layers if ranks[layer.name] != DENSE]
    able = [layer for layer in layers if excluded(plan, work, layer) is None]
    numbers = (
        f"{len(able)} of {len(layers)} factorised layers have one of the methods"
        f" {' and '.join(METHODS)} and at least {MIN_TOKENS} tokens for each input"
    )
    if compression.sequential is True:
        return Decision(used=bool(able), reason=f"asked for; {numbers}")
    target, _ = compression.target
    if target != "size":
        return Decision(used=False, reason=f"auto: {target} is about the dense network's inputs")
    share = granted_share(plan, ranks)
    if share > LARGEST_SHARE:
        reason = f"auto: {share:.1%} of the bytes are kept, and it pays at {LARGEST_SHARE:.0%} only"
        return Decision(used=False, reason=reason)
    used = bool(able) and 2 * len(able) >= len(layers)
    return Decision(used=used, reason=f"auto: {share:.1%} of the bytes are kept, {numbers}")


def granted_share(plan: Plan, ranks: Mapping[str, int]) -> float:
    """Bytes of the compressible weights at their granted ranks, as a share of the dense ones."""
    return sum(_bytes(plan, x, ranks[x.name]) for x in plan.layers) / plan.compressible_bytes


def _bytes(plan: Plan, layer: Layer, rank: int) -> int:
    (m, n), itemsize = layer.shape, plan.stored_dtype(layer).itemsize
    if rank == DENSE:
        return m * n * itemsize
    compression = plan.config.compression
    storage = compression.override(layer.name).storage or compression.storage
    own = storage_bytes(storage, m, n, rank, itemsize, pivot_block(m, rank))
    return own + plan.gained_bytes(layer)


def excluded(plan: Plan, work: WorkDirectory, layer: Layer) -> str | None:
    """Why a layer is fitted plainly, as far as its method and its tokens tell; None: it is not."""
    method = plan.solvers[layer.name].name
    if method not in METHODS:
        return f"not with method {method}"
    tokens = work.get(STATISTICS, layer.unit)[1]["layers"][layer.name]["tokens"]
    if tokens < MIN_TOKENS * layer.shape[1]:
        return (
            f"{tokens} tokens are fewer than {MIN_TOKENS} for each of its {layer.shape[1]} inputs"
        )
    return None


def factorize_sequentially(
    plan: Plan, work: WorkDirectory, ranks: Mapping[str, int], stage: str, progress: Progress
) -> None:
    """Phase two: the factors of every unit that has none yet."""
    if all(work.has(stage, unit) for unit in plan.units):
        return
    sequences = plan.sequences[CALIBRATION]
    batches = list(sequences.batches(micro_batch(sequences, MICRO_BATCH_TOKENS)))
    chain = find_chain(plan.network, next(sequences.batches(1)))
    segments = segments_of(plan.network, chain, plan.layers, batches[0])
    memory = HostMemory(plan.config.runtime.memory_bytes, work.root)
    streams = Streams(plan, chain, batches, memory.keep)
    fits = _Fits(plan, work, ranks, stage, streams)
    todo = fits.start(segments)
    cost = sum(_segment_cost(plan, work, segment) for segment in todo)
    with progress.phase("factors", cost) as phase:
        for segment in todo:
            for group in _groups(plan, work, segment):
                fits.add(segment, group, phase)
            streams.advance(segment)
            phase.advance(_advance_cost(plan, segment))


class _Fits:
    """The layers' outcomes; a unit is stored as soon as all its layers have one.

    A unit that an earlier run stored is put into the compressed network as it is.
    """

    def __init__(
        self,
        plan: Plan,
        work: WorkDirectory,
        ranks: Mapping[str, int],
        stage: str,
        streams: Streams,
    ) -> None:
        self.plan, self.work, self.ranks = plan, work, ranks
        self.stage, self.streams = stage, streams
        self.fitted: dict[str, Fitted] = {}
        self.calls = _num_calls(plan, streams)

    def start(self, segments: Sequence[Segment]) -> list[Segment]:
        """Install what is there already and what no segment reaches.

        Returns:
            The segments to walk through: up to the last one with a layer that is left to fit.
        """
        reached = {layer.name for segment in segments for layer in segment.layers}
        for layer in self.plan.layers:
            if self.work.has(self.stage, layer.unit):
                # What comes before it in the network is not influenced, so it may come early.
                self.streams.install(layer, self.work.get(self.stage, layer.unit)[0])
        for layer in self._open(self.plan.layers):
            if layer.name not in reached:
                reason = "the first calibration sequences do not reach it"
                self._keep(layer, self._plain(layer, reason))
        last = max((i for i, s in enumerate(segments) if self._open(s.layers)), default=-1)
        return list(segments[: last + 1])

    def _open(self, layers: Sequence[Layer]) -> list[Layer]:
        return [x for x in layers if not self.work.has(self.stage, x.unit)]

    def add(self, segment: Segment, group: list[Layer], phase: Phase) -> None:
        """Fit the layers that read one input, to which both networks have come."""
        todo = self._open(group)
        if not todo:
            return
        reasons = {layer.name: self._reason(layer) for layer in todo}
        first = next((layer for layer in todo if reasons[layer.name] is None), None)
        drift = None
        if first is not None:
            share = _group_cost(self.plan, segment, first) / len(self.streams.batches)
            drift = self.streams.drift(segment, first, partial(phase.advance, share))
        solve = partial(self._fit, drift, reasons)
        workers = min(num_workers(self.plan, group), len(todo))
        for layer, fitted in zip(todo, in_parallel(solve, todo, workers), strict=True):
            self._keep(layer, fitted)
        phase.advance(sum(map(solve_cost, todo)))

    def _reason(self, layer: Layer) -> str | None:
        """Why a layer is not fitted to the compressed network's inputs."""
        if self.ranks[layer.name] == DENSE or dense_reason(self.plan, self.work, layer):
            return "it stays dense"
        if self.calls[layer.name] > 1:
            return "it runs several times in a pass, on several inputs"
        return excluded(self.plan, self.work, layer)

    def _fit(self, drift: Drift | None, reasons: Mapping[str, str | None], layer: Layer) -> Fitted:
        reason = reasons[layer.name]
        if reason is not None:
            return self._plain(layer, reason)
        if drift is None:
            return self._plain(layer, "the tokens that reach it depend on the layers before it")
        try:
            fitted = _fit_drift(self.plan, self.work, layer, drift, self.ranks[layer.name])
        except SolveError as error:
            return self._plain(layer, f"could not be solved: {error}", failed=True)
        if fitted.facts["fallback"]:
            return self._plain(layer, fitted.facts["reason"], failed=True)
        return fitted

    def _plain(self, layer: Layer, reason: str, *, failed: bool = False) -> Fitted:
        fitted = fit(self.plan, self.work, self.ranks, layer)
        facts = {"sequential": False, "sequential_reason": reason, "sequential_failed": failed}
        return replace(fitted, facts=fitted.facts | facts)

    def _keep(self, layer: Layer, fitted: Fitted) -> None:
        self.fitted[layer.name] = fitted
        self.streams.install(layer, fitted.tensors(layer.key))
        members = self.plan.units[layer.unit]
        if any(member.name not in self.fitted for member in members):
            return
        done = {member: self.fitted.pop(member.name) for member in members}
        tensors: dict[str, torch.Tensor] = {}
        for member, outcome in done.items():
            tensors |= outcome.tensors(member.key)
        facts = {member.name: outcome.facts for member, outcome in done.items()}
        self.work.put(self.stage, layer.unit, tensors, facts)


def _fit_drift(plan: Plan, work: WorkDirectory, layer: Layer, drift: Drift, rank: int) -> Fitted:
    """The layer's outcome on both networks' inputs. Raises SolveError."""
    solver = plan.solvers[layer.name]
    fisher = None
    if "fisher" in solver.needs:
        statistics, _ = read_statistics(plan, work, layer)
        assert statistics is not None
        fisher = statistics.fisher
    ridge = plan.config.compression.ridge
    problem = Sequential(weight_of(plan, layer), drift, solver, ridge=ridge, fisher=fisher)
    fitted = fit_layer(problem, request_of(plan, layer, rank))
    if fitted.packed is not None:
        fitted.facts["errors"]["metric"]["inherited"] = problem.inherited
    return replace(fitted, facts=fitted.facts | {"sequential": True})


def _groups(plan: Plan, work: WorkDirectory, segment: Segment) -> list[list[Layer]]:
    """The segment's layers by what they read, in the order in which they first run."""
    groups: dict[str, list[Layer]] = {}
    for layer in segment.layers:
        leader = work.get(STATISTICS, layer.unit)[1]["layers"].get(layer.name, {}).get("group")
        groups.setdefault(leader or layer.name, []).append(layer)
    return list(groups.values())


def _num_calls(plan: Plan, streams: Streams) -> Counter[str]:
    """How often each layer runs in one pass."""
    calls: Counter[str] = Counter()
    with torch.no_grad(), hooked(plan.network, plan.layers, lambda x, *_: calls.update([x.name])):
        plan.network(streams.batches[0])
    return calls


def _walk_cost(plan: Plan, segment: Segment) -> float:
    """Of one network's pass through the segment."""
    tokens = plan.sequences[CALIBRATION].num_tokens
    return WALK_COST * tokens * sum(m * n for m, n in (x.shape for x in segment.layers))


def _group_cost(plan: Plan, segment: Segment, layer: Layer) -> float:
    """Of both networks' way to a group's input, about half of the segment, and of its moments."""
    tokens = plan.sequences[CALIBRATION].num_tokens
    return _walk_cost(plan, segment) + WALK_COST * 2 * tokens * layer.shape[1] ** 2


def _advance_cost(plan: Plan, segment: Segment) -> float:
    return 2 * _walk_cost(plan, segment)


def _segment_cost(plan: Plan, work: WorkDirectory, segment: Segment) -> float:
    solves = sum(map(solve_cost, segment.layers))
    groups = sum(_group_cost(plan, segment, group[0]) for group in _groups(plan, work, segment))
    return solves + groups + _advance_cost(plan, segment)
