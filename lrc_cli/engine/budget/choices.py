"""What a layer may become: the choices between which a budget is shared."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from lrc_cli.forms import DENSE


class Choice(NamedTuple):
    """One alternative for one layer."""

    form: str
    """The form's name in `FORMS`, or a name under which several forms are tried (`auto`)."""
    rank: int | None
    """The rank; None for a form that has none."""
    num_bytes: int
    """Bytes on the disk, with all that the layer gains (a new bias)."""
    error: float
    """The predicted error, in the unit of the allocation."""

    @property
    def is_dense(self) -> bool:
        """Whether the layer stays as it is."""
        return self.form == DENSE


@dataclass(frozen=True)
class Choices:
    """The alternatives of one layer, in any order and of any form.

    Raises:
        ValueError: there is none, or an error is negative or not finite.
    """

    each: Sequence[Choice]

    def __post_init__(self) -> None:
        if not self.each:
            raise ValueError("a layer needs at least one choice")
        if not all(math.isfinite(choice.error) and choice.error >= 0 for choice in self.each):
            raise ValueError("errors must be finite and not negative")

    @cached_property
    def num_bytes(self) -> Tensor:
        """(k,) int64"""
        return torch.tensor([choice.num_bytes for choice in self.each], dtype=torch.int64)

    @cached_property
    def errors(self) -> Tensor:
        """(k,) float64, finite and >= 0; the unit is shared by all layers of an allocation."""
        return torch.tensor([choice.error for choice in self.each], dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """What phase one knows of a layer's errors, all in one unit."""

    spectrum: Tensor
    """(k,) float64: spectrum[r:].sum() is the error of rank r."""
    measured: Tensor | None = None
    """(j,) float64: the errors of the choices that the layer's form has measured.

    None: the form has measured nothing, or not yet.
    """

    @property
    def total(self) -> float:
        """The error of Z = 0."""
        return self.spectrum.sum().item()

    def relative(self) -> "Predicted":
        """The same as shares of the total, where that is not 0."""
        total = self.total
        if total <= 0:
            return self
        measured = None if self.measured is None else self.measured / total
        return Predicted(spectrum=self.spectrum / total, measured=measured)


def tail_sums(spectrum: Tensor) -> Tensor:
    """(k + 1,) float64: entry r is spectrum[r:].sum(), summed from the small end."""
    sums = spectrum.double().flip(0).cumsum(0).flip(0)
    return torch.cat([sums, sums.new_zeros(1)])
