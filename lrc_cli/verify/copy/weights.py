"""Both checkpoints' tensors are compared once more, each pair whole and in float64."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from lrc_cli.certify.record import Flag, TensorFacts, Weights
from lrc_cli.certify.sides import Side, network_names
from lrc_cli.network.keys import Keys
from lrc_cli.verify.files.forms import reader_of
from lrc_cli.verify.files.written import layer_tensors
from lrc_cli.verify.statements import Findings

LARGEST_RATIO = 2.0**24
TOLERANCE = 1e-5
"""The relative tolerance of a tensor's error."""
TOLERANCE_OF_FACTORS = 1e-3
"""The same for layers that are multiplied out, in float32 there and in float64 here."""
LEAST = 1e-6


class Tensors(Mapping[str, Tensor]):
    """The dense tensors of a checkpoint by the network's names.

    Layers in a form of lrc's are multiplied out by the words of docs/format.md.

    Args:
        side: the checkpoint.
        module: the original's module, whose names count.
    """

    def __init__(self, side: Side, module: nn.Module) -> None:
        self._source = source = side.source
        layers = [Keys.of(name, source.tensors) for name in source.layer_table or ()]
        self._layers = {keys.weight: keys for keys in layers}
        ends = ("up.weight", "perm")
        parts = {keys.key(end) for keys in layers for end in ends}
        self._keys = {
            name: key
            for key, name in network_names(
                module, (key for key in source.tensors if key not in parts)
            ).items()
        }

    def __getitem__(self, name: str) -> Tensor:
        key = self._keys[name]
        if key not in self._layers:
            return self._source.read(key)
        tensors = layer_tensors(self._source, self._layers[key])
        return reader_of(tensors).dense(tensors)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


@torch.no_grad()
def check_weights(weights: Weights, original: Tensors, copy: Tensors, findings: Findings) -> None:
    """Every tensor's figures and every flag must be what both checkpoints give."""
    rows = {row.name: row for row in weights.tensors}
    common = [name for name in original if name in copy]
    what = "every tensor that both checkpoints have is listed"
    findings.equal("weights.names", what, sorted(rows), sorted(common))
    flags: dict[str, set[str]] = {}
    for flag in weights.flags:
        flags.setdefault(flag.tensor, set()).add(flag.kind)
    for name in common:
        if name not in rows:
            continue
        what = f"the distance of {name} is what both checkpoints give"
        with findings.guard("weights.error", what):
            one, other = original[name], _shaped(copy[name], original[name])
            findings.judge("weights.error", what, _figures_problem(rows[name], one, other))
            if rows[name].grid is not None:
                what = f"the distance of {name} in steps is what both checkpoints give"
                findings.judge("weights.grid", what, _grid_problem(rows[name], one, other))
            what = f"{name} is flagged for what its numbers show"
            stated = flags.get(name, set()) & {"shape", "not finite", "constant", "changed"}
            findings.equal("weights.flags", what, sorted(stated), sorted(_plain_flags(one, other)))
    _check_names(weights.flags, original, copy, findings)
    _check_unusual(weights, findings)
    for flag in weights.flags:
        what = f"the flag on {flag.tensor}, {flag.kind}, is true"
        with findings.guard("weights.flags", what):
            findings.judge("weights.flags", what, _flag_problem(flag, original, copy))


def _shaped(copy: Tensor, original: Tensor) -> Tensor:
    """Returns a matrix in the shape of a convolution or a table that it was multiplied out for."""
    if copy.shape == original.shape or copy.ndim != 2 or copy.numel() != original.numel():
        return copy
    is_table = copy.shape == original.shape[::-1]
    return copy.T if is_table else copy.reshape(original.shape)


def _figures_problem(row: TensorFacts, original: Tensor, copy: Tensor) -> str | None:
    if list(row.shape) != list(original.shape):
        return f"the shape is {tuple(original.shape)}, not {row.shape}"
    found, stated = _figures(original, copy), (row.error, row.scale)
    if found is None or row.error is None or row.scale is None:
        both_none = found is None and stated == (None, None)
        return None if both_none else f"stated {stated}, found {found}"
    slack = TOLERANCE_OF_FACTORS if copy.dtype == torch.float64 else TOLERANCE
    for one, other in zip((row.error, row.scale), found, strict=True):
        if not abs(one - other) <= slack * abs(other) + LEAST:
            return f"error and scale are {found}, not {stated}"
    return None


def _grid_problem(row: TensorFacts, original: Tensor, copy: Tensor) -> str | None:
    """Returns what is wrong with a distance in steps, which are counted group by group again."""
    assert row.grid is not None
    size = row.grid.group
    if size < 2 or copy.shape[-1] % size:
        return f"rows of {copy.shape[-1]} have no groups of {size}"
    half = one = total = 0
    for old, new in zip(original.reshape(-1, size), copy.reshape(-1, size), strict=True):
        levels = new.double().unique()
        gaps = levels.diff()
        gaps = gaps[gaps > 1e-6 * levels.abs().max()]
        if not len(gaps):
            continue
        away = (new.double() - old.double()).abs() / gaps.min()
        total += size
        half, one = half + int((away > 0.55).sum()), one + int((away > 1.05).sum())
    found = (half / max(total, 1), one / max(total, 1))
    stated = (row.grid.beyond_half, row.grid.beyond_one)
    same = all(abs(a - b) <= 0.01 for a, b in zip(stated, found, strict=True))
    return None if same else f"the shares beyond half a step and one are {found}, not {stated}"


def _figures(original: Tensor, copy: Tensor) -> tuple[float, float] | None:
    if original.shape != copy.shape or not original.is_floating_point():
        return None
    if not copy.is_floating_point():
        return None
    w, z = original.double(), copy.double()
    energy, error = w.norm().item(), (z - w).norm().item()
    if not math.isfinite(energy + error):
        return None
    ratio = min(LARGEST_RATIO, error / energy) if energy else (LARGEST_RATIO if error else 0.0)
    return ratio, ((z * w).sum().item() / energy**2 if energy else 1.0)


def _plain_flags(original: Tensor, copy: Tensor) -> set[str]:
    """Returns the flags that a tensor gets by itself."""
    if original.shape != copy.shape:
        return {"shape"}
    if not (original.is_floating_point() and copy.is_floating_point()):
        return set() if bool((original == copy).all()) else {"changed"}
    found = set()
    if bool((original.isfinite() & ~copy.isfinite()).any()):
        found.add("not finite")
    w, z = (x.reshape(len(x) if x.ndim > 1 else 1, -1) for x in (original, copy))
    if z.shape[1] > 1 and bool(((z == z[:, :1]).all(1) & ~(w == w[:, :1]).all(1)).any()):
        found.add("constant")
    return found


def _check_names(
    flags: Sequence[Flag], original: Tensors, copy: Tensors, findings: Findings
) -> None:
    """Tensors that only one checkpoint has are flagged, every one of them."""
    of_names = {"missing", "renamed"}
    stated = sorted(flag.tensor for flag in flags if flag.kind in of_names)
    what = "every tensor that the copy lacks is flagged"
    findings.equal("weights.flags", what, stated, sorted(set(original) - set(copy)))
    renamed = [flag.text.rpartition(" as ")[2] for flag in flags if flag.kind == "renamed"]
    extra = [flag.tensor for flag in flags if flag.kind == "extra"]
    what = "every tensor that only the copy has is flagged"
    findings.equal(
        "weights.flags", what, sorted([*renamed, *extra]), sorted(set(copy) - set(original))
    )


def _check_unusual(weights: Weights, findings: Findings) -> None:
    """Tensors that are far from their kind are flagged, by the median of the listed figures."""
    other = {"another layer", "permuted", "constant", "not finite"}
    explained = {flag.tensor for flag in weights.flags if flag.kind in other}
    groups: dict[str, list[tuple[str, float, float]]] = {}
    for row in weights.tensors:
        if row.name not in explained and row.error is not None and row.scale is not None:
            kind = re.sub(r"[0-9]+", "*", row.name)
            groups.setdefault(kind, []).append((row.name, row.error, row.scale))
    found: set[tuple[str, str]] = set()
    for group in groups.values():
        if len(group) < 4:
            continue
        error, error_width = _middle_and_width([e for _, e, _ in group])
        scale, scale_width = _middle_and_width([s for _, _, s in group])
        for name, own_error, own_scale in group:
            if own_error > max(error + error_width, 2 * error, 1e-6):
                found.add((name, "far"))
            elif abs(own_scale - scale) > max(scale_width, 0.005):
                found.add((name, "scale"))
    stated = {(x.tensor, x.kind) for x in weights.flags if x.kind in ("far", "scale", "grid")}
    found |= _off_grid(weights, explained | {name for name, _ in found})
    what = "every tensor that is unlike the others of its kind is flagged"
    findings.equal("weights.flags", what, sorted(stated), sorted(found))


def _off_grid(weights: Weights, explained: set[str]) -> set[tuple[str, str]]:
    """Returns the tensors of which too much lies beyond one step, by the listed shares."""
    groups: dict[str, list[tuple[str, float]]] = {}
    for row in weights.tensors:
        if row.grid is not None and row.name not in explained:
            kind = re.sub(r"[0-9]+", "*", row.name)
            groups.setdefault(kind, []).append((row.name, row.grid.beyond_one))
    found = set()
    for group in groups.values():
        if len(group) >= 4:
            middle, width = _middle_and_width([share for _, share in group])
            limit = max(middle + width, 2 * middle, 0.01)
            found |= {(name, "grid") for name, share in group if share > limit}
    return found


def _middle_and_width(values: Sequence[float]) -> tuple[float, float]:
    """Returns the median, and eight robust standard deviations."""
    middle = float(torch.tensor(values, dtype=torch.float64).quantile(0.5))
    spread = float((torch.tensor(values, dtype=torch.float64) - middle).abs().quantile(0.5))
    return middle, 8 * 1.4826 * spread


def _flag_problem(flag: Flag, original: Tensors, copy: Tensors) -> str | None:
    """Returns why a flag about two tensors is false; None where it is true or judged elsewhere."""
    if flag.kind == "renamed":
        one, other = original[flag.tensor], copy[flag.text.rpartition(" as ")[2]]
        return None if _is_near(one, other, 0.35) else "the two are not alike"
    if flag.kind == "another layer":
        one, other = copy[flag.tensor], original[flag.text.rpartition(" from ")[2]]
        own = original[flag.tensor]
        is_nearer = _distance(one, other) < 0.5 * _distance(one, own)
        return None if is_nearer else "the other layer's tensor is not nearer"
    if flag.kind == "repeated":
        found = re.fullmatch(r"it has the same numbers as (.+) in the copy", flag.text)
        same = found is not None and torch.equal(copy[flag.tensor], copy[found[1]])
        return None if same else "the two are not equal"
    if flag.kind == "permuted":
        return _order_problem(original[flag.tensor].float(), copy[flag.tensor].float())
    return None


def _is_near(one: Tensor, other: Tensor, share: float) -> bool:
    return one.shape == other.shape and _distance(other, one) < share


def _distance(one: Tensor, other: Tensor) -> float:
    return (one.double() - other.double()).norm().item() / max(other.double().norm().item(), 1e-30)


def _order_problem(original: Tensor, copy: Tensor) -> str | None:
    """Returns why the numbers are not the original's in another order: by sorted magnitudes."""
    if copy.shape != original.shape or _distance(copy, original) < 0.25:
        return "the two do not differ by their order"
    pairs = [(original.flatten(), copy.flatten())]
    if original.ndim > 1:
        rows = original.flatten(1).norm(dim=1), copy.flatten(1).norm(dim=1)
        columns = original.flatten(1).norm(dim=0), copy.flatten(1).norm(dim=0)
        pairs += [rows, columns]
    alike = all(_distance(b.sort().values, a.sort().values) < 0.1 for a, b in pairs)
    return None if alike else "the magnitudes are others"
