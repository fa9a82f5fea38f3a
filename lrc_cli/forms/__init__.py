"""A form of storage says what a layer's tensors are called, and which matrix they stand for."""

from lrc_cli.forms.form import DENSE, WEIGHT, Form, Orientation, Packed
from lrc_cli.forms.known import FORMS, dense
from lrc_cli.forms.low_rank import PERM, UP, Interpolative, LowRank, TwoFactors

__all__ = [
    "DENSE",
    "FORMS",
    "PERM",
    "UP",
    "WEIGHT",
    "Form",
    "Interpolative",
    "LowRank",
    "Orientation",
    "Packed",
    "TwoFactors",
    "dense",
]
