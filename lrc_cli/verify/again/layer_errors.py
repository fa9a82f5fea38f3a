"""C1 is measured once more: every layer's errors, optima and plain SVD, in a way of its own.

The engine takes eigenvalues of W G W^T. Here optima are tails of the singular values of L W
G^(1/2), and the output errors of the written factors are direct sums over tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrc_cli.verify.again.behind_relu import Behind
from lrc_cli.verify.again.both_inputs import Pair
from lrc_cli.verify.again.moments import Checked, Sums

TOLERANCE = 2e-3
"""The relative tolerance of what is measured again; squared errors have twice as much."""
CURVATURE_TOLERANCE = 1e-2
"""The relative tolerance of squared errors in a metric of gradients, which are rounded coarsely."""
ROUNDING = 2.0**-40
"""What the rounding of products to float32 may add to a squared error, over the squared outputs."""
FLOORS = 64.0
"""The slack in numerical floors of a figure.

Both sides have a floor. What float32 sums lose depends on the processor (1e-7 with bfloat16 matrix
units, 2.5e-7 with AVX512-BF16).
"""
CORRECTION_TOLERANCE = 0.02
"""The absolute tolerance of the share a."""

Found = dict[str, dict[str, float]]
"""{"output" or "metric": {"stored", "optimum", "svd": squared errors per token}}."""


class Measured(NamedTuple):
    """Holds what was measured of a layer."""

    errors: Found
    energy: float
    """||W x||^2 per token."""
    shift: Tensor | None = None
    """(m,) float64 W mean(x) - Z mean(x~), which a free bias adds; None: it is not free."""
    behind: Behind | None = None
    """The errors behind a ReLU, where they are the layer's metric."""
    weight: float = 1.0
    """The most that a unit of squared output error may count in the metric."""

    @property
    def rounding(self) -> float:
        """What the rounding of outputs to float32 may add to a squared error in the metric."""
        return ROUNDING * self.weight * self.energy


@dataclass(frozen=True)
class Gram:
    """Holds a Gram matrix, with the root that all forms in it share."""

    matrix: Tensor
    """G (n, n) float64."""

    @cached_property
    def root(self) -> Tensor:
        """R (n, n) with G = R R^T. A unit diagonal keeps small inputs beside large inputs."""
        scale = self.matrix.diagonal().clamp(min=0).sqrt()
        safe = torch.where(scale > 0, scale, 1.0)
        values, vectors = torch.linalg.eigh(self.matrix / safe[:, None] / safe)
        return safe[:, None] * ((vectors * values.clamp(min=0).sqrt()) @ vectors.T)


@dataclass(frozen=True, kw_only=True)
class Form:
    """Holds the quadratic form scale * tr(F D G D^T)."""

    gram: Gram
    """G."""
    fisher: Tensor | None = None
    """F (m, m) float64, damped; None: the identity."""

    def error(self, difference: Tensor) -> float:
        """Returns the form of D (m, n) float64."""
        left = difference if self.fisher is None else self.fisher @ difference
        return self.half * max(torch.sum(left * (difference @ self.gram.matrix)).item(), 0.0)

    @property
    def half(self) -> float:
        """1/2 for an estimate of the loss, 1 for a mean square."""
        return 1.0 if self.fisher is None else 0.5

    @property
    def _left(self) -> Tensor:
        """L (m, m) with F = L^T L; F is 0 where no gradient ever came."""
        assert self.fisher is not None
        factor, info = torch.linalg.cholesky_ex(self.fisher)
        if info.item() == 0:
            lower: Tensor = factor.T
            return lower
        values, vectors = torch.linalg.eigh(self.fisher)
        return values.clamp(min=0).sqrt()[:, None] * vectors.T

    def tail(self, matrix: Tensor, rank: int) -> float:
        """Returns the least error of a rank: the squares of the singular values beyond it."""
        side = matrix @ self.gram.root
        if self.fisher is not None:
            side = self._left @ side
        singular = torch.linalg.svdvals(side)
        return self.half * singular[rank:].flip(0).square().sum().item()


def plain_svd(weight: Tensor, rank: int) -> Tensor:
    """Returns the truncated singular value decomposition of W (m, n), float64.

    W is projected onto its leading singular vectors of the small side.
    """
    weight, leading = weight.double(), leading_vectors(weight, rank)
    if weight.shape[0] > weight.shape[1]:
        return weight @ leading @ leading.T
    return leading @ (leading.T @ weight)


def leading_vectors(weight: Tensor, rank: int) -> Tensor:
    """Returns W's leading singular vectors (k, r) of its smaller side, float64."""
    weight = weight.double()
    side = weight.T @ weight if weight.shape[0] > weight.shape[1] else weight @ weight.T
    return torch.linalg.eigh(side).eigenvectors[:, -rank:]


def white_errors(checked: Checked, rank: int) -> Measured:
    """Returns the errors for a method that knows no data: G is the identity."""
    weight = checked.weight.double()
    stored = (weight - checked.fitted().to(weight.device)).square().sum().item()
    tail = torch.linalg.svdvals(weight)[rank:].flip(0).square().sum().item()
    errors = {"stored": stored, "optimum": tail, "svd": tail}
    found = {"output": errors, "metric": dict(errors)}
    return Measured(found, energy=weight.square().sum().item())


def same_input_errors(sums: Sums, rank: int, plain: Form, weighted: Form | None) -> Found:
    """Returns the errors on the dense network's inputs.

    Args:
        plain: the form of output errors.
        weighted: the form of the metric, where it is not the plain one.
    """
    checked, weight = sums.checked, sums.checked.weight.double()
    simple = weight - plain_svd(weight, rank)
    output = {
        "stored": sums.mean_error,
        "optimum": plain.tail(weight, rank),
        "svd": plain.error(simple),
    }
    if weighted is None:
        return {"output": output, "metric": dict(output)}
    stored = weight - checked.fitted().to(weight.device)
    metrics = {
        "stored": weighted.error(stored),
        "optimum": weighted.tail(weight, rank),
        "svd": weighted.error(simple),
        "total": weighted.error(weight),
    }
    return {"output": output, "metric": metrics}


def nuclear_errors(checked: Checked, rank: int, plain: Form, level: float) -> dict[str, float]:
    """Returns the objective 1/2 ||W X - V||^2 + l ||V||_* per token, V = Z X, and its least value.

    Let s be the singular values of W G^(1/2), and let k of them exceed l, at most `rank`. The least
    value is the sum of l s_i - l^2 / 2 over these k and of s_i^2 / 2 over the rest (soft
    threshold).

    Args:
        level: l.
    """
    weight = checked.weight.double()
    singular = torch.linalg.svdvals(weight @ plain.gram.root)
    kept = min(rank, int((singular > level).sum()))

    def objective(z: Tensor) -> float:
        penalty = torch.linalg.svdvals(z @ plain.gram.root).sum().item()
        return plain.error(weight - z) / 2 + level * penalty

    return {
        "stored": objective(checked.fitted().to(weight.device)),
        "svd": objective(plain_svd(weight, rank)),
        "optimum": (level * singular[:kept] - level**2 / 2).sum().item()
        + singular[kept:].square().sum().item() / 2,
        "total": singular.square().sum().item() / 2,
    }


def paired_errors(
    sums: Sums,
    rank: int,
    pair: Pair,
    fisher: Tensor | None,
    *,
    ridge: float,
    correction: float,
) -> Found:
    """Returns the errors on the inputs of both networks: J of docs/theory.md.

    Args:
        ridge: l as a share of the mean diagonal of C.
        correction: a.
    """
    checked, weight = sums.checked, sums.checked.weight.double()
    mean = pair.compressed.diagonal().mean().item()
    identity = torch.eye(len(pair.compressed), dtype=torch.float64, device=weight.device)
    level = ridge * mean if mean > 0 else ridge
    regular = pair.compressed + level * identity
    fitted, simple = checked.fitted().to(weight.device), plain_svd(weight, rank)
    shifted = weight @ (pair.compressed + correction * pair.cross) + level * weight
    target = torch.linalg.solve(regular, shifted.T).T
    form = Form(gram=Gram(regular), fisher=fisher)

    def objective(z: Tensor) -> float:
        outputs = paired_error(weight, z, pair, form)
        return correction * outputs + (1 - correction) * form.error(weight - z)

    return {
        "output": {
            "stored": sums.mean_error,
            "svd": paired_error(weight, simple, pair, Form(gram=Gram(pair.compressed))),
            "optimum": _unregularised(weight, pair, rank),
        },
        "metric": {
            "stored": objective(fitted),
            "svd": objective(simple),
            "optimum": objective(target) + form.tail(target, rank),
            "inherited": objective(target),
            "total": objective(torch.zeros_like(weight)),
        },
    }


def correction_problem(
    stated: float, weight: Tensor, fitted: Pair, held: Pair, fisher: Tensor | None, *, ridge: float
) -> str | None:
    """Returns why the stated a is not best for W E - a K X~ on held-back sequences; None if it is.

    K = W S C_l^-1 is the whole correction on the sequences that were fitted to (docs/theory.md). As
    a function of a the error is a parabola around its lowest point. Where the parabola is so flat
    that rounding moves this point, the error above the least error counts.
    """
    weight = weight.double()
    if fisher is not None and not torch.any(fisher):
        fisher = None
    mean = fitted.compressed.diagonal().mean().item()
    identity = torch.eye(len(fitted.compressed), dtype=torch.float64, device=weight.device)
    regular = fitted.compressed + (ridge * mean if mean > 0 else ridge) * identity
    step = torch.linalg.solve(regular, (weight @ fitted.cross).T).T
    left, rows = (x if fisher is None else fisher @ x for x in (step, weight))
    spent = torch.sum(left * (step @ held.compressed)).item()
    drift = torch.sum(rows * (weight @ held.drift)).item()
    wanted = 0.0 if torch.any(step) else 1.0
    if spent > 0:
        wanted = min(max(torch.sum(left * (weight @ held.cross)).item() / spent, 0.0), 1.0)
    beyond = abs(stated - wanted)
    fits = beyond <= CORRECTION_TOLERANCE or spent * beyond**2 <= TOLERANCE * drift
    return None if fits and 0 <= stated <= 1 else f"stated {stated}, found {wanted}"


def paired_error(weight: Tensor, z: Tensor, pair: Pair, form: Form) -> float:
    """Returns tr(F M) with M the second moments of W x - Z x~ = (W - Z) x~ + W (x - x~).

    What the form's Gram matrix has beyond C is added.
    """
    difference = weight - z
    mixed = difference @ pair.cross.T @ weight.T
    outputs = difference @ form.gram.matrix @ difference.T + mixed + mixed.T
    outputs += weight @ pair.drift @ weight.T
    left = outputs.diagonal() if form.fisher is None else form.fisher * outputs
    return form.half * max(left.sum().item(), 0.0)


def _unregularised(weight: Tensor, pair: Pair, rank: int) -> float:
    """Returns the least output error of a rank without a ridge (least squares, unit diagonal)."""
    scale = pair.compressed.diagonal().clamp(min=0).sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    values, vectors = torch.linalg.eigh(pair.compressed / scale[:, None] / scale)
    inverse = torch.where(values > 2.0**-24 * values[-1], 1 / values, 0.0)
    step = pair.cross / scale @ vectors @ torch.diag(inverse) @ vectors.T / scale
    target = weight + weight @ step
    form = Form(gram=Gram(pair.compressed))
    return paired_error(weight, target, pair, form) + form.tail(target, rank)


def compare_output(
    stated: Mapping[str, Any], found: Mapping[str, float], energy: float
) -> str | None:
    """Returns what differs between stated and found relative output errors; None: nothing.

    Args:
        found: squared errors per token.
        energy: ||W x||^2 per token.
    """
    slack = FLOORS * stated["floor"] ** 2
    for key, error in found.items():
        if stated.get(key) is None:
            continue
        square = error / energy if energy > 0 else 0.0
        if not abs(stated[key] ** 2 - square) <= 2 * TOLERANCE * square + slack:
            return f"output.{key} is stated as {stated[key]}, found {square**0.5}"
    return None


def compare_metric(
    stated: Mapping[str, Any], found: Mapping[str, float], tolerance: float, rounding: float
) -> str | None:
    """Compares as `compare_output` does, in the metric's own unit.

    Args:
        rounding: what the rounding of outputs may add, which counts where nothing else is left.
    """
    slack = FLOORS * stated["floor"] + rounding
    for key, error in found.items():
        if stated.get(key) is None:
            continue
        if not abs(stated[key] - error) <= tolerance * error + slack:
            return f"metric.{key} is stated as {stated[key]}, found {error}"
    return None
