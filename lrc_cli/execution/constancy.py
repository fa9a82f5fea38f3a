"""A network must do the same in every pass: one pass is noted here, and other passes are compared.

Statistics, factors, scores and certificates come from different passes. A network with noise, with
a counter, or with weights that its own code rewrites would give each of them another network.
"""

from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lrc_cli.data.draw import Batch
from lrc_cli.errors import RunError
from lrc_cli.execution.glance import glance, glancing, looked_at
from lrc_cli.execution.hooks import around_calls
from lrc_cli.execution.network import Network, NetworkError, reading_outputs
from lrc_cli.execution.outputs import floating_outputs
from lrc_cli.network.layer import Layer

TOLERANCE = 0.03
"""The largest difference that counts as rounding in half precision, as a share of ||y||: several
times bfloat16's rounding."""
DIRECTIONS = 16
"""The number of random directions on which outputs are compared: they tell the norm of a
difference to about a quarter."""
BATCH_TOLERANCE = 0.1
"""The largest change by other sequences in the batch that counts as rounding in half precision,
where products of another size round otherwise in every layer. The middle row is judged."""
FEW_ROWS, FEW_ROWS_IN_HALF = 0.05, 0.5
"""As BATCH_TOLERANCE, over all rows, in fine and in half precision. Rounding may send a few rows to
another expert, where a router is undecided, and these rows are far off."""
ROWS_KEPT, ROWS_AT_ONCE = 4096, 256
"""The rows that are kept of an output; further rows are added to them. The rows read at once."""
NUMBERS_KEPT = 256
"""The numbers that are kept of a large parameter or buffer; a small tensor is kept whole."""
SMALL = 1 << 16
PASSES = 2
"""The passes that are compared before an output is published."""
PASSES_OF_COUNTERS = 12
"""The passes where the network's own code keeps numbers that change with every pass."""
COUNTED = (int, float, bool, str, bytes, type(None), count)
"""Kinds of attributes in which code may count; their text tells the state."""
SHOWN = 100
"""The characters of a text, and the entries of a dictionary, that are compared."""
GROWING = (list, set, dict, deque)
"""Kinds of attributes that may grow; their length tells the state."""
REMEDY = (
    "its forward must be a function of its inputs and its weights: take out noise, counters and"
    " what it keeps from earlier passes"
)


class ChangingNetwork(RunError):
    """The network does not do the same in every pass."""


@dataclass(frozen=True, kw_only=True)
class Sketch:
    """What is kept of a tensor: enough to tell how far each row of another tensor is from it."""

    dtype: torch.dtype
    shape: torch.Size
    rows: Tensor
    """The products of the rows with random directions, (at most ROWS_KEPT, DIRECTIONS) float32."""

    def distance(self, other: "Sketch") -> float:
        """Returns the largest difference of a row, as a share of the row or of the usual row.

        The result is infinite for tensors of another shape or dtype, and NaN where only one tensor
        has a NaN or an infinity.
        """
        return float(self._shares(other).max())

    def distance_of_most(self, other: "Sketch") -> tuple[float, float]:
        """Returns the middle row's difference, and the difference over all rows.

        Both are shares, as in `distance`; a few rows that are far off count little.
        """
        shares = self._shares(other)
        return float(shares.median()), float(shares.square().mean().sqrt())

    def _shares(self, other: "Sketch") -> Tensor:
        """Returns each row's difference, as a share of the row or of the usual row; never empty."""
        if (self.dtype, self.shape) != (other.dtype, other.shape):
            return torch.tensor([torch.inf])
        if not self.rows.numel():
            return torch.zeros(1)
        # Squares of large outputs do not fit float32.
        one, two = self.rows.double(), other.rows.double()
        same = (one == two) | (one.isnan() & two.isnan())
        off = (one - two).masked_fill(same, 0.0).norm(dim=-1)
        size = one.nan_to_num(0.0, 0.0, 0.0).norm(dim=-1)
        usual = size.square().mean().sqrt()
        # A difference from nothing but zeros is infinite, and no difference is 0.
        return (off / size.maximum(usual)).masked_fill(off == 0, 0.0)

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {tuple(self.shape)}"


@torch.no_grad()
def sketch(tensor: Tensor) -> Sketch:
    """Returns what is kept of a floating-point tensor (..., m)."""
    rows = tensor.detach().reshape(-1, tensor.shape[-1] if tensor.ndim else 1)
    noise = torch.Generator().manual_seed(0)
    directions = torch.randn(rows.shape[1], DIRECTIONS, generator=noise).to(rows.device)
    kept = torch.zeros(min(len(rows), ROWS_KEPT), DIRECTIONS, device=rows.device)
    for start in range(0, len(rows), ROWS_AT_ONCE):
        with torch.autocast(rows.device.type, enabled=False):
            some = rows[start : start + ROWS_AT_ONCE].float() @ directions
        # Rows that share a place have other signs and do not cancel.
        signs = torch.randint(0, 2, (len(some), 1), generator=noise).to(some) * 2 - 1
        place = start % ROWS_KEPT
        kept[place : place + len(some)] += signs * some
    return Sketch(dtype=tensor.dtype, shape=tensor.shape, rows=kept.cpu())


@dataclass(kw_only=True)
class Pass:
    """What one pass did, in little memory."""

    outputs: list[Sketch] = field(default_factory=list)
    """The floating-point outputs."""
    calls: dict[str, list[tuple[int, ...]]] = field(default_factory=dict)
    """The shapes of each layer's inputs, by layer name and call."""
    returned: Counter[str] = field(default_factory=Counter)
    """The numbers that each layer has returned in all its calls, by layer name."""


@dataclass(frozen=True, kw_only=True)
class Trace:
    """A pass over one sequence, and the network's state before this pass."""

    batch: Batch
    layers: Sequence[Layer]
    did: Pass
    state: Mapping[str, Tensor]
    """Some numbers of every parameter and buffer, by name."""


@contextmanager
def noting(network: Network, layers: Sequence[Layer]) -> Iterator[Pass]:
    """A context in which the last whole pass of a network is noted."""
    did = Pass()

    def begin(*_: Any) -> None:
        did.calls.clear()
        did.returned.clear()

    def call(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        taken = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        did.calls.setdefault(name, []).append(tuple(taken[0].shape) if taken else ())

    def count_numbers(name: str, _: Any, __: Any, output: Any) -> None:
        did.returned[name] += output.numel() if isinstance(output, Tensor) else 0

    def end(_: str, __: Any, ___: Any, output: Any) -> None:
        did.outputs[:] = map(sketch, floating_outputs(output))

    with (
        around_calls(network.module, [""], before=begin, after=end),
        around_calls(
            network.module, [layer.name for layer in layers], before=call, after=count_numbers
        ),
    ):
        yield did


@contextmanager
def repeating(network: Network, trace: Trace) -> Iterator[None]:
    """A context in which the network runs once more on the trace's sequence.

    Raises:
        ChangingNetwork: the network did something else than in the pass that was noted.
    """
    with reading_outputs(network), noting(network, trace.layers) as did:
        yield
    compare(network, trace, did)


def compare(network: Network, trace: Trace, did: Pass) -> None:
    """Raises ChangingNetwork if a pass did something else than the pass that was noted."""
    difference = _difference(trace.did, did, tolerance_of(network), trace.layers)
    changed = _changed(trace.state, state_of(network.module))
    own = {layer.name for layer in trace.layers}
    rewritten = [name for name in changed if own & {_plain(name), _plain(name).rpartition(".")[0]}]
    if difference is None and not rewritten:
        return
    found = [difference] if difference else []
    for name in (rewritten or changed)[:1]:
        kind = "parameter" if name in dict(network.module.named_parameters()) else "buffer"
        found.append(f"its {kind} {_plain(name)} is another one after a pass")
    where = None if rewritten else _first_that_differs(network, trace)
    if where is not None:
        found.append(f"module {where} is the first to do so")
    raise ChangingNetwork(
        f"the network {type(network.module).__name__} changes from pass to pass:"
        f" {', and '.join(found)}",
        REMEDY,
    )


def check_again(network: Network, trace: Trace) -> list[str]:
    """Runs the network on the trace's sequence again, as often as it takes to see counters.

    Returns:
        The names of numbers and collections of the network's code that changed with the passes.

    Raises:
        ChangingNetwork: the network did something else than in the pass that was noted.
    """
    before, passes, counting = counters(network.module), 0, list[str]()
    while passes < (PASSES_OF_COUNTERS if counting else PASSES):
        with torch.no_grad(), repeating(network, trace):
            glance(network, trace.batch)
        passes += 1
        now = counters(network.module)
        counting = counting or [name for name in now if now[name] != before.get(name)]
    return counting


def outputs_of(network: Network, output: Any) -> Pass:
    """Returns what is kept of the floating-point outputs of a network or a part of it."""
    with reading_outputs(network):
        return Pass(outputs=list(map(sketch, floating_outputs(output))))


def check_graded(network: Network, name: str, plain: Pass, graded: Any) -> None:
    """Raises ChangingNetwork if a part of a network gives something else with gradients.

    Args:
        network: the network.
        name: the part's name.
        plain: what the part gave without gradients.
        graded: what the part gave for the same inputs while autograd recorded it.
    """
    difference = _difference(plain, outputs_of(network, graded), tolerance_of(network))
    if difference is not None:
        raise ChangingNetwork(
            f"the network {type(network.module).__name__} changes from pass to pass or when"
            f" gradients are recorded, in {name}: {difference}",
            REMEDY,
        )


@torch.no_grad()
def check_alone(network: Network, trace: Trace, batch: Batch) -> None:
    """Raises ChangingNetwork if what a sequence gives depends on the others in its batch.

    Args:
        network: the network.
        trace: a pass over one sequence.
        batch: several sequences, of which the trace's sequence is the first.
    """
    tokens = looked_at(network, trace.batch)
    with reading_outputs(network), glancing(network, batch, tokens):
        together = floating_outputs(network(batch))
    number = len(next(iter(batch.values())))
    most, all_rows = tolerance_of(network), FEW_ROWS
    if _is_coarse(network):
        most, all_rows = BATCH_TOLERANCE, FEW_ROWS_IN_HALF
    for alone, output in zip(trace.did.outputs, together, strict=False):
        if output.ndim == 0 or len(output) != number or alone.shape[:1] != (1,):
            continue  # the sequences cannot be told apart
        # Outputs may be padded to the longest sequence, or compare every sequence with every other.
        own = output[tuple(slice(size) for size in alone.shape)]
        middle, share = alone.distance_of_most(sketch(own))
        if not (middle <= most and share <= all_rows):
            with repeating(network, trace):  # noise is no matter of the batch
                glance(network, trace.batch)
            raise ChangingNetwork(
                f"the network {type(network.module).__name__} gives a sequence other outputs alone"
                f" than in a batch of {number}: they differ by {share:.2g} of their size",
                "certificates are about single sequences: let its forward treat each sequence by"
                " itself, or leave certification out",
            )


def _is_coarse(network: Network) -> bool:
    halves = {torch.float16, torch.bfloat16}
    return bool(halves & {network.dtype, *network.stored})


def tolerance_of(network: Network) -> float:
    """Returns the largest difference that counts as rounding, in threads that add otherwise."""
    fine = torch.finfo(torch.float32).eps ** 0.5
    return TOLERANCE if _is_coarse(network) else fine


def _difference(
    first: Pass, second: Pass, tolerance: float, layers: Sequence[Layer] = ()
) -> str | None:
    """Returns what differs between two passes over one sequence; None for nothing."""
    if list(map(str, first.outputs)) != list(map(str, second.outputs)):
        forms = (", ".join(map(str, x.outputs)) or "nothing" for x in (first, second))
        return "its outputs are {} in one pass and {} in another".format(*forms)
    for name in (layer.name for layer in layers):
        one, other = first.calls.get(name, []), second.calls.get(name, [])
        if len(one) != len(other):
            return (
                f"layer {name} is called {len(one)} times in one pass and {len(other)} in another"
            )
        if one != other:
            return f"layer {name} reads {one} in one pass and {other} in another"
    shares = [x.distance(y) for x, y in zip(first.outputs, second.outputs, strict=True)]
    share = max(shares, default=0.0)
    if share <= tolerance:
        return None
    return f"the same sequence gives outputs that differ by {share:.2g} of their size"


@torch.no_grad()
def _first_that_differs(network: Network, trace: Trace) -> str | None:
    """Returns the first module that makes something else of the same inputs in two more passes."""
    runs = []
    for _ in range(2):
        seen: list[tuple[str, list[Sketch], list[Sketch]]] = []

        def look(name: str, args: Any, kwargs: Any, output: Any, seen: Any = seen) -> None:
            seen.append((name, _sketches((args, kwargs)), _sketches(output)))

        names = [name for name, _ in network.module.named_modules() if name]
        try:
            with around_calls(network.module, names, after=look):
                glance(network, trace.batch)
        except NetworkError:
            return None
        runs.append(seen)
    tolerance = tolerance_of(network)
    for (name, taken, given), (other, taken_too, given_too) in zip(*runs, strict=False):
        if name != other or not _alike(taken, taken_too, tolerance):
            continue
        if not _alike(given, given_too, tolerance):
            return name
    return None


def _sketches(value: Any) -> list[Sketch]:
    leaves = tree_leaves(value)
    return [sketch(x) for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]


def _alike(first: Sequence[Sketch], second: Sequence[Sketch], tolerance: float) -> bool:
    pairs = zip(first, second, strict=False)
    return len(first) == len(second) and all(x.distance(y) <= tolerance for x, y in pairs)


@torch.no_grad()
def state_of(module: nn.Module) -> dict[str, Tensor]:
    """Returns some numbers of every parameter and buffer: all of small tensors, by name."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return {name: _some(x) for name, x in tensors if x.layout == torch.strided and not x.is_meta}


def _some(tensor: Tensor) -> Tensor:
    flat = tensor.detach().flatten()
    step = 1 if flat.numel() <= SMALL else flat.numel() // NUMBERS_KEPT
    return flat[::step].cpu().clone()


def _changed(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> list[str]:
    """Returns the names of tensors that are not what they were; new and lost tensors are caches."""
    return [name for name in before if name in after and not _is_equal(before[name], after[name])]


def _is_equal(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    one = one.to(other.dtype)  # code may cast its weights once, as a router that needs float32
    same = one == other
    if one.is_floating_point() or one.is_complex():
        same |= one.isnan() & other.isnan()
    return bool(same.all())


def _plain(name: str) -> str:
    """Returns a parameter's name without the part that a conversion adds."""
    return name.replace("parametrizations.", "").removesuffix(".original")


def counters(module: nn.Module) -> dict[str, str]:
    """Returns the state of numbers and collections that a network's own code may change.

    These are attributes of modules, and variables of the classes and files of modules that are not
    torch's or transformers'.
    """
    found = {}
    parts = dict(module.named_modules())
    kinds = {type(part) for part in parts.values() if _is_own(type(part))}
    holders: dict[str, Mapping[str, Any]] = {name: vars(part) for name, part in parts.items()}
    holders |= {kind.__qualname__: vars(kind) for kind in kinds}
    for function in (kind.forward for kind in kinds):
        holders[function.__module__] = getattr(function, "__globals__", {})
    for holder, attributes in holders.items():
        for name, value in attributes.items():
            if name.startswith("_"):
                continue
            is_small = type(value) is dict and len(value) <= SHOWN
            values = value if is_small else {None: value}
            for key, x in values.items():
                place = f"{holder}.{name}".removeprefix(".") + (f"[{key!r}]" if key else "")
                if type(x) in COUNTED:
                    found[place] = repr(x)[:SHOWN]
                elif type(x) in GROWING:
                    found[place] = str(len(x))
    return found


def _is_own(kind: type) -> bool:
    return kind.__module__.partition(".")[0] not in ("torch", "transformers", "lrc_cli")
