"""One budget is shared out between layers here.

Every function takes the choices of each layer and returns the index of one choice per layer.
The main tool is Lagrangian relaxation (Everett 1963). For a multiplier each layer picks
argmin objective + multiplier * resource on its own. The multiplier is bisected until the resource
fits, and what is left is spent greedily. The result never exceeds the limit and is within one
step of one layer of the optimum. Errors need not be convex or monotone in the bytes.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lrc_cli.engine.budget.choices import Choices

BISECTIONS = 64
"""The number of halvings of the multiplier's exponent, beyond float64's resolution."""

RANGE = 24.0
"""Multipliers go from 10^-RANGE to 10^RANGE, with objective and resource scaled to at most 1."""


class Infeasible(ValueError):
    """No choice of the layers meets the limit."""

    def __init__(self, limit: float, smallest: float, unit: str) -> None:
        self.limit = limit
        self.smallest = smallest
        """The smallest reachable value of the limited quantity."""
        self.unit = unit
        """The limited quantity, "bytes" or "error"."""
        super().__init__(f"{limit:g} {unit} cannot be reached, the smallest is {smallest:g}")


def within_bytes(layers: Sequence[Choices], budget: float) -> list[int]:
    """The picks with the least total error in at most `budget` bytes. Raises Infeasible."""
    num_bytes, errors = _table(layers)
    return _constrained(errors, num_bytes, budget, "bytes")


def within_error(layers: Sequence[Choices], bound: float) -> list[int]:
    """The picks with the fewest bytes and a total error of at most `bound`. Raises Infeasible."""
    num_bytes, errors = _table(layers)
    return _constrained(num_bytes, errors, bound, "error")


def within_layer_error(layers: Sequence[Choices], bound: float) -> list[int]:
    """Each layer's pick with the fewest bytes and an error up to `bound`. Raises Infeasible."""
    num_bytes, errors = _table(layers)
    worst = errors.amin(dim=1).max().item()
    if worst > bound:
        raise Infeasible(bound, worst, "error")
    return _lexicographic(torch.where(errors <= bound, num_bytes, torch.inf), errors).tolist()


def uniform(layers: Sequence[Choices], dense_bytes: Sequence[int], share: float) -> list[int]:
    """Each layer's pick with the least error in at most `share` of its dense bytes.

    Raises Infeasible.
    """
    num_bytes, errors = _table(layers)
    shares = num_bytes / torch.tensor(dense_bytes, dtype=torch.float64)[:, None]
    smallest = shares.amin(dim=1).max().item()
    if smallest > share:
        raise Infeasible(share, smallest, "of every layer's bytes")
    return _uniform_picks(shares, errors, share).tolist()


def uniform_within_error(
    layers: Sequence[Choices], dense_bytes: Sequence[int], bound: float
) -> list[int]:
    """The picks at the smallest share, equal for all layers, with a total error up to `bound`.

    Raises Infeasible.
    """
    num_bytes, errors = _table(layers)
    shares = num_bytes / torch.tensor(dense_bytes, dtype=torch.float64)[:, None]
    candidates = torch.unique(shares[shares.isfinite()])
    candidates = candidates[candidates >= shares.amin(dim=1).max()]
    smallest = errors.amin(dim=1).sum().item()
    if smallest > bound:
        raise Infeasible(bound, smallest, "error")

    def fits(index: int) -> bool:
        picks = _uniform_picks(shares, errors, candidates[index].item())
        return _total(errors, picks) <= bound

    return _uniform_picks(shares, errors, candidates[_first(fits, len(candidates))].item()).tolist()


def _first(holds: Callable[[int], bool], count: int) -> int:
    """The first index in 0..count - 1 at which a monotone condition holds; the last one holds."""
    low, high = 0, count - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


def _uniform_picks(shares: Tensor, errors: Tensor, share: float) -> Tensor:
    return _lexicographic(torch.where(shares <= share, errors, torch.inf), shares)


def _table(layers: Sequence[Choices]) -> tuple[Tensor, Tensor]:
    """Bytes and errors as (layers, choices) float64 on the CPU, padded with infinity."""
    shape = len(layers), max(len(layer.errors) for layer in layers)
    num_bytes = torch.full(shape, torch.inf, dtype=torch.float64)
    errors = num_bytes.clone()
    for row, layer in enumerate(layers):
        num_bytes[row, : len(layer.num_bytes)] = layer.num_bytes.double().cpu()
        errors[row, : len(layer.errors)] = layer.errors.double().cpu()
    return num_bytes, errors


def _lexicographic(first: Tensor, second: Tensor) -> Tensor:
    """The index of each row's least `first`, ties broken by the least `second`."""
    tied = first == first.amin(dim=1, keepdim=True)
    return torch.where(tied, second, torch.inf).argmin(dim=1)


def _picked(values: Tensor, picks: Tensor) -> Tensor:
    return values.gather(1, picks[:, None])[:, 0]


def _total(values: Tensor, picks: Tensor) -> float:
    return _picked(values, picks).sum().item()


def _constrained(objective: Tensor, resource: Tensor, limit: float, unit: str) -> list[int]:
    """The picks with the least total objective and a total resource of at most `limit`."""
    leanest = _lexicographic(resource, objective)
    if _total(resource, leanest) > limit:
        raise Infeasible(limit, _total(resource, leanest), unit)
    best = _lexicographic(objective, resource)
    if _total(resource, best) <= limit:
        return best.tolist()
    picks = _bisected(objective, resource, limit, leanest)
    return _spent(objective, resource, limit, picks).tolist()


def _bisected(objective: Tensor, resource: Tensor, limit: float, picks: Tensor) -> Tensor:
    """The picks of the smallest multiplier that fits the limit, starting from picks that do."""
    objective = objective / objective[objective.isfinite()].max()
    scaled = resource / resource[resource.isfinite()].max()
    low, high = -RANGE, RANGE
    for _ in range(BISECTIONS):
        exponent = (low + high) / 2
        candidate = (objective + 10**exponent * scaled).argmin(dim=1)
        if _total(resource, candidate) <= limit:
            picks, high = candidate, exponent
        else:
            low = exponent
    return picks


def _spent(objective: Tensor, resource: Tensor, limit: float, picks: Tensor) -> Tensor:
    """Improve one layer at a time, best gain per resource first, until nothing fits."""
    while True:
        gains = _picked(objective, picks)[:, None] - objective
        costs = resource - _picked(resource, picks)[:, None]
        slack = limit - _total(resource, picks)
        useful = (gains > 0) & (costs <= slack)
        if not useful.any():
            return picks
        free = torch.where(costs <= 0, torch.inf, gains / costs)
        rates = torch.where(useful, free, -torch.inf)
        layer, choice = divmod(int(rates.argmax()), rates.shape[1])
        candidate = picks.clone()
        candidate[layer] = choice
        if _total(resource, candidate) > limit:
            return picks
        picks = candidate
