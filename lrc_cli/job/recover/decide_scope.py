"""A run decides here what is trained at a time, where `recover.scope` is `auto`."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lrc_cli.data.draw import Batch, micro_batch
from lrc_cli.engine import Choice
from lrc_cli.execution.hooks import around_calls
from lrc_cli.execution.network import Network
from lrc_cli.execution.placement import block_names
from lrc_cli.job.plan import Plan
from lrc_cli.job.recover.model import MICRO_BATCH_TOKENS
from lrc_cli.job.recover.scope import training_data
from lrc_cli.job.recover.windows import find_windows
from lrc_cli.runtime.memory import total_memory
from lrc_cli.text import byte_size

NUMBER_BYTES = 4 * 4
"""The bytes that training takes for a number: the number, its gradient and Adam's two averages."""
COPIES = 2
"""The copies of the trained tensors in the stored dtype: the start, and the best so far."""
BACKWARD = 2
"""The bytes of a backward pass through a block, in bytes that the block's modules return."""


@dataclass(frozen=True, kw_only=True)
class ScopeDecision:
    """What is trained at a time."""

    scope: str
    """model or block."""
    reason: str | None = None
    """Why `auto` takes this scope, in words; None where the config names it."""


def decide_scope(plan: Plan, granted: Mapping[str, Choice]) -> ScopeDecision:
    """Returns what is trained at a time. All processes call this.

    The decision does not depend on what else runs on the machine, so a second run decides alike.

    Args:
        granted: the choices that the budget grants, by layer name.
    """
    asked = plan.config.recover.scope
    if asked != "auto":
        return ScopeDecision(scope=asked)
    return plan.processes.from_first(lambda: _decide(plan, granted))


def _decide(plan: Plan, granted: Mapping[str, Choice]) -> ScopeDecision:
    one = next(training_data(plan).batches(1))
    limit, where = plan.config.runtime.memory_bytes, "runtime.memory_limit is"
    if limit is None:
        limit, where = total_memory(plan.device), f"the memory of {plan.device} is"
    needed = model_bytes(plan, granted, one)
    sizes = f"training all layers together takes about {byte_size(needed)}, and {where}"
    sizes += f" {byte_size(limit)}"
    if needed <= limit:
        return ScopeDecision(scope="model", reason=sizes)
    if not find_windows(plan.network, plan.layers, one):
        return ScopeDecision(scope="model", reason=f"{sizes}, but its blocks are no chain")
    return ScopeDecision(scope="block", reason=sizes)


def model_bytes(plan: Plan, granted: Mapping[str, Choice], batch: Batch) -> int:
    """Returns about how much memory the scope `model` takes, beside what is mapped from files.

    Args:
        batch: one sequence, on which the sizes of activations are tried out.
    """
    chosen = [(plan.of(x), granted[x.name]) for x in plan.layers if not granted[x.name].is_dense]
    numbers = sum(choice.num_bytes // layer.dtype.itemsize for layer, choice in chosen)
    stored = sum(choice.num_bytes for _, choice in chosen)
    sequences = micro_batch(training_data(plan), MICRO_BATCH_TOKENS)
    return NUMBER_BYTES * numbers + COPIES * stored + sequences * _activations(plan.network, batch)


def _activations(network: Network, batch: Batch) -> int:
    """Returns the bytes of a pass with gradients: what enters each block, and one block at work."""
    blocks = block_names(network.module)
    sizes: dict[str, int] = {}

    def note(name: str, _: object, __: object, output: object) -> None:
        if isinstance(output, torch.Tensor):
            sizes[name] = sizes.get(name, 0) + output.numel() * max(4, output.dtype.itemsize)

    names = [name for name, part in network.module.named_modules() if name]
    with torch.no_grad(), around_calls(network.module, names, after=note):
        network(batch)
    inside = {
        block: sum(size for name, size in sizes.items() if f"{name}.".startswith(f"{block}."))
        for block in blocks
    }
    passed = sum(sizes.get(block, 0) for block in blocks)
    outside = sum(sizes.values()) - sum(inside.values())
    return passed + BACKWARD * (outside + max(inside.values(), default=0))
