"""A copy whose numbers lie on grids tells its steps, in which its distance can be counted.

No format is asked: the numbers of a group, such as 32 neighbours in a row, lie on a grid if all
gaps between them are multiples of the smallest gap and there are at most 256 levels.
"""

import torch
from torch import Tensor

from lrc_cli.certify.record import GridFacts

GROUPS = (128, 64, 32)
"""The numbers of neighbours that are tried after whole rows."""
MOST_LEVELS = 256
SAMPLED = 64
"""The number of groups by which a grid is looked for."""
SLACK = 0.05
"""The share of a step by which a gap may miss a multiple, and a number its half step."""
NEARLY_ALL = 0.95
ROWS = 4096
"""The number of groups that are looked at together."""


def grid_facts(original: Tensor, copy: Tensor) -> GridFacts | None:
    """Returns how far, in steps, the copy's numbers are from the original's; None without a grid.

    Args:
        original: the original's tensor.
        copy: the copy's, of the same shape.
    """
    if copy.ndim != 2 or not copy.numel():
        return None
    width = copy.shape[1]
    for size in (width, *(x for x in GROUPS if x < width and width % x == 0)):
        groups = copy.reshape(-1, size)
        spread = max(1, len(groups) // SAMPLED)
        steps, levels = steps_of(groups[::spread][:SAMPLED].float())
        if float((steps > 0).float().mean()) >= NEARLY_ALL:
            return _counted(original.reshape(-1, size), groups, size, int(levels.max()))
    return None


def steps_of(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the step and the number of levels of each group; a step of 0: there is no grid.

    Args:
        groups: (groups, numbers), float32.
    """
    values = groups.sort(dim=1).values
    gaps = values.diff(dim=1)
    noise = 1e-6 * values.abs().amax(dim=1, keepdim=True)
    step = gaps.masked_fill(gaps <= noise, torch.inf).amin(dim=1, keepdim=True)
    ratio = gaps.masked_fill(gaps <= noise, 0.0) / step
    fits = ((ratio - ratio.round()).abs() <= SLACK * ratio.clamp(min=1.0)).all(dim=1)
    levels = ((values[:, -1:] - values[:, :1]) / step).round()[:, 0] + 1
    found = fits & (levels <= MOST_LEVELS) & step[:, 0].isfinite()
    return step[:, 0].where(found, 0.0), levels.where(found, 0.0)


def _counted(original: Tensor, groups: Tensor, size: int, levels: int) -> GridFacts | None:
    half = one = total = 0
    largest = 0.0
    for old, new in zip(original.split(ROWS), groups.split(ROWS), strict=True):
        step, _ = steps_of(new.float())
        known = step > 0
        away = (new[known].float() - old[known].float()).abs() / step[known, None]
        total += away.numel()
        half += int((away > 0.5 + SLACK).sum())
        one += int((away > 1 + SLACK).sum())
        largest = max(largest, float(away.max()) if away.numel() else 0.0)
    if not total or largest == float("inf") or largest != largest:
        return None
    return GridFacts(
        group=size,
        levels=levels,
        beyond_half=half / total,
        beyond_one=one / total,
        largest=largest,
    )
