"""Two checkpoints are compared tensor by tensor, a pair of tensors in memory at a time."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lrc_cli.certify.grid import grid_facts
from lrc_cli.certify.record import GridFacts
from lrc_cli.quality.compare import LARGEST_RATIO

CHUNK = 1 << 22
"""The number of entries that are converted to float64 at a time."""
SKETCH = 4096
"""The number of entries, evenly spaced, by which tensors are told apart before they are read."""
SAMPLED_ROWS = 64
"""The number of rows by which a permutation of rows is looked for."""
ALIKE = 0.9
"""The least cosine of a row and its counterpart elsewhere."""
SAME_ENTRIES = 0.015
"""The largest relative distance of two sorted vectors that have the same entries."""
FAR = 0.3
"""The relative error from which on another order of rows or columns is looked for."""


@dataclass(frozen=True, kw_only=True)
class Compared:
    """Holds what is known of one tensor of the copy and its counterpart in the original."""

    name: str
    shape: tuple[int, ...]
    """The shape in the original."""
    copy_shape: tuple[int, ...]
    error: float | None = None
    """||W' - W|| / ||W||; None where the two cannot be subtracted."""
    scale: float | None = None
    """<W', W> / <W, W>; None likewise."""
    num_not_finite: int = 0
    """The entries of the copy that are NaN or infinite where the original's are finite."""
    constant_rows: int = 0
    """The rows of the copy whose entries are all equal where the original's are not."""
    num_rows: int = 0
    """The rows that were looked at for it; 0 for tensors without rows of several entries."""
    reordered: str | None = None
    """"rows", "columns" or "entries" if the copy has the original's in another order."""
    grid: GridFacts | None = None
    """The distance in steps, if the copy's numbers lie on grids and the original's differ."""
    is_changed: bool = False
    """Whether whole numbers, for which there is no error, are others."""
    sketch: Tensor | None = None
    """Evenly spaced entries of the copy, float32."""
    original_sketch: Tensor | None = None
    """The same entries of the original."""
    sha256: str = ""
    """The hash of the copy's numbers, as float32."""
    original_sha256: str = ""


def compare_tensors(name: str, original: Tensor, copy: Tensor) -> Compared:
    """Returns what two tensors of one name come to.

    Args:
        name: the name in the network.
        original: the original's tensor, on the CPU.
        copy: the copy's.
    """
    bare = Compared(name=name, shape=tuple(original.shape), copy_shape=tuple(copy.shape))
    if original.shape != copy.shape:
        return bare
    if not (original.is_floating_point() and copy.is_floating_point()):
        return replace(bare, is_changed=not torch.equal(original, copy.to(original.dtype)))
    error, scale, not_finite = _distance(original, copy)
    constant, num_rows = _constant_rows(original, copy)
    return replace(
        bare,
        error=error,
        scale=scale,
        num_not_finite=not_finite,
        constant_rows=constant,
        num_rows=num_rows,
        reordered=_reordered(original, copy) if error is not None and error > FAR else None,
        grid=grid_facts(original, copy) if error else None,
        sketch=sketch(copy),
        original_sketch=sketch(original),
        sha256=_hash(copy),
        original_sha256=_hash(original),
    )


def sketch(tensor: Tensor) -> Tensor:
    """Returns at most SKETCH evenly spaced entries, float32."""
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // SKETCH)][:SKETCH].float()


def apart(one: Tensor, other: Tensor) -> float:
    """Returns ||one - other|| / ||other||, at most LARGEST_RATIO; 0 for equal tensors."""
    return _ratio(
        float((one - other).double().square().sum()), float(other.double().square().sum())
    )


def _ratio(error: float, energy: float) -> float:
    if error == 0:
        return 0.0
    return min(LARGEST_RATIO, (error / energy) ** 0.5) if energy else LARGEST_RATIO


def _distance(original: Tensor, copy: Tensor) -> tuple[float | None, float | None, int]:
    """Returns error and scale (None where an entry is not finite), and how many entries are not."""
    energy = difference = product = 0.0
    not_finite = 0
    for w, z in zip(_chunks(original), _chunks(copy), strict=True):
        finite = torch.isfinite(w)
        not_finite += int((finite & ~torch.isfinite(z)).sum())
        energy += float(w.square().sum())
        difference += float((z - w).square().sum())
        product += float((z * w).sum())
    if not difference < float("inf"):  # NaN too
        return None, None, not_finite
    return _ratio(difference, energy), product / energy if energy else 1.0, not_finite


def _chunks(tensor: Tensor) -> Iterator[Tensor]:
    for part in tensor.detach().reshape(-1).split(CHUNK):
        yield part.double()


def _constant_rows(original: Tensor, copy: Tensor) -> tuple[int, int]:
    """Returns how many rows of the copy are constant where the original's are not, and of how many.

    A vector is one row.
    """
    rows, others = (x.detach().reshape(len(x) if x.ndim > 1 else 1, -1) for x in (copy, original))
    if rows.shape[1] < 2:
        return 0, 0
    low, high = rows.aminmax(dim=1)
    old_low, old_high = others.aminmax(dim=1)
    return int(((low == high) & (old_low != old_high)).sum()), len(rows)


def _reordered(original: Tensor, copy: Tensor) -> str | None:
    """Returns what of the copy stands in another order: rows, columns, or a vector's entries."""
    if original.ndim < 2:
        # Vectors of one distribution are alike once they are sorted.
        first, second = (x.float().reshape(-1).sort().values for x in (original, copy))
        return "entries" if apart(second, first) < SAME_ENTRIES else None
    w, z = original.float().flatten(1), copy.float().flatten(1)
    if _is_permuted(w, z):
        return "rows"
    return "columns" if _is_permuted(w.T, z.T) else None


def _is_permuted(w: Tensor, z: Tensor) -> bool:
    """Returns whether sampled rows of z are like other rows of w, each like another one."""
    sampled = torch.arange(0, len(z), max(1, len(z) // SAMPLED_ROWS))[:SAMPLED_ROWS]
    norms = w.norm(dim=1).clamp(min=1e-30)
    own = z[sampled]
    cosines = (own @ w.T) / norms / own.norm(dim=1, keepdim=True).clamp(min=1e-30)
    best, place = cosines.max(dim=1)
    alike = best > ALIKE
    moved = alike & (place != sampled)
    distinct = len(place[alike].unique()) == int(alike.sum())
    return bool(alike.float().mean() > ALIKE) and bool(moved.any()) and distinct


def _hash(tensor: Tensor) -> str:
    digest = hashlib.sha256(str(tuple(tensor.shape)).encode())
    for part in tensor.detach().reshape(-1).split(CHUNK):
        digest.update(part.float().contiguous().numpy().data)
    return digest.hexdigest()


def compare_all(
    original: Mapping[str, Tensor],
    copy: Mapping[str, Tensor],
    advance: Callable[[float], None] = lambda _: None,
) -> list[Compared]:
    """Returns every tensor that both checkpoints have, in the original's order."""
    found = []
    for name in original:
        if name in copy:
            found.append(compare_tensors(name, original[name], copy[name]))
        advance(1)
    return found
