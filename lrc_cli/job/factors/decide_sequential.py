"""A run decides here whether it is sequential, and which of its layers can be."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from lrc_cli.data.purposes import CALIBRATION
from lrc_cli.engine import Choice, Solver
from lrc_cli.errors import InputError
from lrc_cli.execution.glance import glance
from lrc_cli.execution.hooks import watched
from lrc_cli.job.methods import methods_that
from lrc_cli.job.plan import Plan
from lrc_cli.job.work import STATISTICS, WorkDirectory
from lrc_cli.network.layer import Layer
from lrc_cli.report.record import SequentialDecision

MIN_TOKENS = 15
"""The fewest tokens for each input of a layer. With fewer tokens a fit learns them by heart."""
MOST_WITH_FEW_TOKENS = 0.1
"""The largest fraction of the layers' weights that may have fewer tokens.

Where a whole kind of layer is fitted plainly, the corrections of the other layers do harm
(docs/benchmarks.md).
"""
TIED = "its factors are an embedding's too, which comes first"
LARGEST_FRACTION = 0.6
"""The fraction of the bytes above which `auto` is off.

On SmolLM2, sequential fitting pays at 0.6 and 0.4, and changes nothing at 0.8 (docs/benchmarks.md).
"""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The decision whether a run is sequential."""

    used: bool
    reason: str
    """Why the run is sequential or not, in words."""

    held_back: int = 0
    """The number of calibration sequences that no layer is fitted to."""

    excluded: Mapping[str, str | None] = field(default_factory=dict)
    """{layer: why its calls, its method or its tokens exclude it; None: they do not}.

    The mapping may be empty where the run is not sequential.
    """

    def record(self) -> SequentialDecision:
        """Returns the decision as the report has it."""
        return SequentialDecision(used=self.used, reason=self.reason, held_back=self.held_back)


def check_sequential(plan: Plan) -> None:
    """Raises InputError where sequential fitting is asked for, but target or methods forbid it."""
    compression = plan.config.compression
    if compression.sequential is not True:
        return
    if compression.max_layer_error is not None:
        raise InputError(
            "compression.sequential: max_layer_error bounds errors on the dense network's inputs,"
            " and sequential fitting uses others",
            "set sequential: false, or set size in place of max_layer_error",
        )
    if not any(map(_is_sequential, plan.solvers)):
        methods = sorted({solver.name for solver in plan.solvers})
        raise InputError(
            f"compression.sequential: no layer has method {' or '.join(_methods())}, but"
            f" {' and '.join(methods)}",
            "set sequential: false, or another method",
        )


def _methods() -> list[str]:
    """Returns the methods whose problem can be stated on two networks' inputs."""
    return methods_that(_is_sequential)


def _is_sequential(solver: Solver) -> bool:
    return solver.is_sequential


def decide(plan: Plan, work: WorkDirectory, granted: Mapping[str, Choice]) -> Decision:
    """Resolves `compression.sequential` once every layer has its choice."""
    decision = _decide(plan, work, granted)
    return replace(decision, held_back=num_held_back(plan)) if decision.used else decision


def _decide(plan: Plan, work: WorkDirectory, granted: Mapping[str, Choice]) -> Decision:
    compression = plan.config.compression
    if compression.sequential is False:
        return Decision(used=False, reason="compression.sequential is false")
    target, _ = compression.target
    if compression.sequential == "auto" and target != "size":
        return Decision(used=False, reason=f"auto: {target} is about the dense network's inputs")
    kept = kept_fraction(plan, granted)
    if compression.sequential == "auto" and kept > LARGEST_FRACTION:
        reason = (
            f"auto: {kept:.1%} of the bytes are kept, and it is on from {LARGEST_FRACTION:.0%} down"
        )
        return Decision(used=False, reason=reason)
    layers = [layer for layer in plan.layers if not granted[layer.name].is_dense]
    calls = count_calls(plan)
    unable = {layer.name: _why_unable(plan, calls, layer) for layer in plan.layers}
    excluded = {x.name: unable[x.name] or _why_too_few_tokens(plan, work, x) for x in plan.layers}
    able = [layer for layer in layers if excluded[layer.name] is None]
    short = [x for x in layers if unable[x.name] is None and excluded[x.name] is not None]
    numbers = (
        f"{len(able)} of {len(layers)} factorised layers run once, have one of the methods"
        f" {' and '.join(_methods())} and at least {MIN_TOKENS} tokens for each input"
    )
    why = (
        "asked for" if compression.sequential is True else f"auto: {kept:.1%} of the bytes are kept"
    )
    if _size(short) > MOST_WITH_FEW_TOKENS * _size(layers):
        few = f"{len(short)} have fewer tokens, more than {MOST_WITH_FEW_TOKENS:.0%} of the weights"
        return Decision(used=False, reason=f"{why}; {numbers}; {few}")
    enough = compression.sequential is True or 2 * len(able) >= len(layers)
    return Decision(used=bool(able) and enough, reason=f"{why}; {numbers}", excluded=excluded)


def kept_fraction(plan: Plan, granted: Mapping[str, Choice]) -> float:
    """Returns the granted bytes of the compressible weights, as a fraction of their dense bytes."""
    return sum(choice.num_bytes for choice in granted.values()) / plan.compressible_bytes


def num_held_back(plan: Plan) -> int:
    """Returns how many of the last calibration sequences no layer is fitted to."""
    return plan.config.compression.num_held_back(len(plan.sequences[CALIBRATION]))


def count_calls(plan: Plan) -> Counter[str]:
    """Counts how often each layer runs in one pass over the first calibration sequence."""
    calls: Counter[str] = Counter()
    count = watched(plan.network, plan.layers, lambda x, *_: calls.update([x.name]))
    with torch.no_grad(), count:
        glance(plan.network, next(plan.sequences[CALIBRATION].batches(1)))
    return calls


def _why_unable(plan: Plan, calls: Counter[str], layer: Layer) -> str | None:
    """Returns why a layer cannot be fitted sequentially, with any number of tokens; else None."""
    if layer.tied_to:
        return TIED
    if calls[layer.name] > 1:
        return "it runs several times in a pass, on several inputs"
    solver = plan.of(layer).solver
    return None if solver.is_sequential else f"not with method {solver.name}"


def _why_too_few_tokens(plan: Plan, work: WorkDirectory, layer: Layer) -> str | None:
    """Returns why a layer has too few tokens to be fitted sequentially; else None."""
    tokens, n = _tokens(plan, work, layer), layer.shape[1]
    if tokens >= MIN_TOKENS * n:
        return None
    return f"{tokens} tokens to fit to are fewer than {MIN_TOKENS} for each of its {n} inputs"


def _size(layers: Sequence[Layer]) -> int:
    return sum(m * n for m, n in (layer.shape for layer in layers))


def _tokens(plan: Plan, work: WorkDirectory, layer: Layer) -> int:
    """Returns the number of calibration tokens that the layer would be fitted to."""
    tokens: int = work.facts(STATISTICS, layer.unit)["layers"][layer.name]["tokens"]
    return tokens - tokens * num_held_back(plan) // len(plan.sequences[CALIBRATION])
