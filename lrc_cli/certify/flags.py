"""Tensors that a person should look at are flagged: a flag is no proof, and its absence is none."""

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import Tensor

from lrc_cli.certify.record import Flag
from lrc_cli.certify.sentences import kind_of
from lrc_cli.certify.weights import Compared, apart, sketch
from lrc_cli.text import count, small

KINDS = {
    "missing": "the copy lacks it",
    "extra": "the original has no such tensor",
    "renamed": "the copy has its numbers under another name",
    "shape": "it has another shape in the copy",
    "not finite": "it holds NaN or infinity in the copy",
    "constant": "its entries are all equal in the copy",
    "repeated": "the copy has the same numbers under two names",
    "permuted": "the copy has its numbers in another order",
    "another layer": "it is nearer to another layer's tensor of the original",
    "changed": "its whole numbers are others in the copy",
    "far": "it is farther from the original than others of its kind",
    "scale": "it is scaled unlike others of its kind",
    "grid": "more of it than of others of its kind lies beyond one step of its grid",
}
"""The kinds of flags, each with its meaning."""
NEARER = 0.25
"""The share of its own distance at which another layer's tensor is nearer beyond doubt."""
LEAST_OF_A_KIND = 4
"""The least number of tensors that have a usual distance."""
DEVIATIONS = 8.0
"""The number of robust standard deviations that a tensor of a kind may be off."""
TIMES = 2.0
"""The number of times its kind's median that an error may be."""
LEAST_ERROR, LEAST_SCALE = 1e-6, 0.005
"""The least error, and the least difference of scales, that are looked at."""
LEAST_SHARE = 0.01
"""The least share of numbers beyond one step that is looked at."""
MAD_TO_DEVIATION = 1.4826
"""A normal distribution's standard deviation over its median absolute deviation."""


def find_flags(
    original: Mapping[str, Tensor], copy: Mapping[str, Tensor], compared: Sequence[Compared]
) -> tuple[Flag, ...]:
    """Returns every flag, in the order of KINDS.

    Args:
        original: the original's tensors by name.
        copy: the copy's.
        compared: the tensors that both have.
    """
    misplaced = list(_misplaced(compared))
    explained = {flag.tensor for flag in misplaced}
    explained |= {x.name for x in compared if x.reordered or x.constant_rows or x.num_not_finite}
    usual = [x for x in compared if x.name not in explained]
    unusual = list(_unusual(usual))
    explained |= {flag.tensor for flag in unusual}
    found = [
        *_names(original, copy),
        *_single(compared),
        *_repeated(compared),
        *misplaced,
        *unusual,
        *_off_grid(x for x in usual if x.name not in explained),
    ]
    order = list(KINDS)
    return tuple(sorted(found, key=lambda flag: order.index(flag.kind)))


def _names(original: Mapping[str, Tensor], copy: Mapping[str, Tensor]) -> Iterator[Flag]:
    missing = [name for name in original if name not in copy]
    extra = [name for name in copy if name not in original]
    for name in missing:
        wanted = original[name]
        same = (x for x in extra if copy[x].shape == wanted.shape and _is_like(copy[x], wanted))
        other = next(same, None)
        if other is None:
            yield Flag(tensor=name, kind="missing", text="no file of the copy has it")
        else:
            extra.remove(other)
            yield Flag(tensor=name, kind="renamed", text=f"the copy has its numbers as {other}")
    for name in extra:
        yield Flag(tensor=name, kind="extra", text="no file of the original has it")


def _is_like(one: Tensor, other: Tensor) -> bool:
    return apart(sketch(one), sketch(other)) < NEARER


def _single(compared: Iterable[Compared]) -> Iterator[Flag]:
    """Yields flags that a tensor and its counterpart give by themselves."""
    for x in compared:
        if x.shape != x.copy_shape:
            text = f"{list(x.copy_shape)} in the copy, {list(x.shape)} in the original"
            yield Flag(tensor=x.name, kind="shape", text=text)
        if x.num_not_finite:
            text = f"{count(x.num_not_finite)} entries are NaN or infinite"
            yield Flag(tensor=x.name, kind="not finite", text=text)
        if x.constant_rows:
            text = f"all entries are equal in {count(x.constant_rows)} of {count(x.num_rows)} rows"
            yield Flag(tensor=x.name, kind="constant", text=text)
        if x.reordered:
            text = f"its {x.reordered} are the original's in another order"
            yield Flag(tensor=x.name, kind="permuted", text=text)
        if x.is_changed:
            text = "its whole numbers are not the original's"
            yield Flag(tensor=x.name, kind="changed", text=text)


def _repeated(compared: Iterable[Compared]) -> Iterator[Flag]:
    """Yields tensors of the copy that are equal where the original's are not."""
    first: dict[str, Compared] = {}
    for x in compared:
        if not x.sha256:
            continue
        other = first.setdefault(x.sha256, x)
        if other is not x and other.original_sha256 != x.original_sha256:
            text = f"it has the same numbers as {other.name} in the copy"
            yield Flag(tensor=x.name, kind="repeated", text=text)


def _misplaced(compared: Sequence[Compared]) -> Iterator[Flag]:
    """Yields tensors that are nearer to another layer's of the same kind and shape."""
    for group in _by_kind(compared).values():
        for x in group:
            if x.sketch is None or x.original_sketch is None or not x.error:
                continue
            own = apart(x.sketch, x.original_sketch)
            others = [
                (apart(x.sketch, y.original_sketch), y.name)
                for y in group
                if y is not x and y.original_sketch is not None and y.shape == x.shape
            ]
            nearest, name = min(others, default=(own, ""))
            if nearest < NEARER * own:
                text = f"relative error {small(x.error)}, and {small(nearest)} from {name}"
                yield Flag(tensor=x.name, kind="another layer", text=text)


def _by_kind(compared: Iterable[Compared]) -> dict[str, list[Compared]]:
    groups: dict[str, list[Compared]] = {}
    for x in compared:
        groups.setdefault(kind_of(x.name), []).append(x)
    return groups


def _unusual(compared: Iterable[Compared]) -> Iterator[Flag]:
    """Yields tensors whose error or scale is unlike the others' of their kind."""
    for kind, group in _by_kind(compared).items():
        known = [
            (x, x.error, x.scale) for x in group if x.error is not None and x.scale is not None
        ]
        if len(known) < LEAST_OF_A_KIND:
            continue
        error, error_limit = _usual([e for _, e, _ in known])
        scale, scale_limit = _usual([s for _, _, s in known])
        for x, own_error, own_scale in known:
            if own_error > max(error + error_limit, TIMES * error, LEAST_ERROR):
                text = f"relative error {small(own_error)}; the median of {kind} is {small(error)}"
                yield Flag(tensor=x.name, kind="far", text=text)
            elif abs(own_scale - scale) > max(scale_limit, LEAST_SCALE):
                text = f"scaled by {own_scale:.4f}; the median of {kind} is {scale:.4f}"
                yield Flag(tensor=x.name, kind="scale", text=text)


def _off_grid(compared: Iterable[Compared]) -> Iterator[Flag]:
    """Yields tensors of which more lies beyond one step of their grids than of their kind's."""
    for kind, group in _by_kind(compared).items():
        known = [(x, x.grid.beyond_one) for x in group if x.grid is not None]
        if len(known) < LEAST_OF_A_KIND:
            continue
        middle, limit = _usual([share for _, share in known])
        for x, share in known:
            if share > max(middle + limit, TIMES * middle, LEAST_SHARE):
                text = f"{share:.1%} lie beyond one step; the median of {kind} is {middle:.1%}"
                yield Flag(tensor=x.name, kind="grid", text=text)


def _usual(values: Sequence[float]) -> tuple[float, float]:
    """Returns the median, and how far from the median is still usual."""
    middle = statistics.median(values)
    spread = statistics.median(abs(value - middle) for value in values)
    return middle, DEVIATIONS * MAD_TO_DEVIATION * spread
