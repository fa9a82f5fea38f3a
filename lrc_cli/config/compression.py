"""The section `compression` of the config is defined here, with its settings for single layers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from lrc_cli.config.constraints import (
    Count,
    FieldError,
    Fraction,
    OneOf,
    Pattern,
    Portion,
    Positive,
    Share,
)
from lrc_cli.config.patterns import matches


@dataclass(frozen=True, kw_only=True)
class MethodRules:
    """The facts about a method that the section's checks use; the engine's solver says the same."""

    predicts_loss: bool = False
    """Whether the target may be `max_loss_increase`."""
    takes_threshold: bool = False
    """Whether the target may be `threshold`."""


METHODS: dict[str, MethodRules] = {
    "svd": MethodRules(),
    "frobenius": MethodRules(),
    "nuclear": MethodRules(takes_threshold=True),
    "relu": MethodRules(),
    "curvature": MethodRules(predicts_loss=True),
}
"""The methods, by name; the engine has a solver of the same name for each."""

Method = Annotated[str, OneOf(METHODS)]
Loss = Literal["auto", "nll", "sampled", "output"]
Allocation = Literal["global", "relative", "uniform"]
STORAGES = ["auto", "interpolative", "factors"]
"""The storages that a config may name; the engine has one of the same name for each."""

Storage = Annotated[str, OneOf(STORAGES)]

TARGETS = ("size", "max_layer_error", "max_loss_increase", "threshold")


def _given(**values: object) -> list[str]:
    """The names of the values that are not None."""
    return [name for name, value in values.items() if value is not None]


def default_allocation(method: Method) -> Allocation:
    """How ranks are shared out where the config does not say.

    Only errors that predict the loss are in one unit, in which layers can be compared.
    """
    return "global" if METHODS[method].predicts_loss else "relative"


def _derived_allocation(values: Mapping[str, Any]) -> Allocation:
    """The allocation that follows from the other keys that are written in the section."""
    return default_allocation(values.get("method", Compression.method))


def _not_null(key: str) -> dict[str, Any]:
    """The JSON Schema that asks for the key, with a value that is not null."""
    return {"required": [key], "properties": {key: {"not": {"type": "null"}}}}


@dataclass(frozen=True, kw_only=True)
class LayerOverride:
    """Settings of some layers that differ from the other layers; null: as the other layers."""

    SCHEMA: ClassVar = {"not": {"allOf": [_not_null("size"), _not_null("rank")]}}

    size: Share | None = None
    """Share of the layer's weight bytes to keep; 1: stays dense."""
    rank: Count | None = None
    """Rank, in place of a size."""
    method: Method | None = None
    """Method for these layers."""
    storage: Storage | None = None
    """Storage for these layers."""

    def __post_init__(self) -> None:
        if len(_given(size=self.size, rank=self.rank)) > 1:
            raise FieldError("rank", "at most one of size, rank may be given; leave one out")


@dataclass(frozen=True, kw_only=True)
class Compression:
    """How much is compressed, and how; exactly one of the four targets is given."""

    SCHEMA: ClassVar = {"oneOf": [_not_null(target) for target in TARGETS]}

    method: Method = "curvature"
    """The metric in which factors are best."""
    loss: Loss = "auto"
    """The loss whose curvature is taken, for method curvature."""
    size: Share | None = None
    """Target: share of the bytes to keep."""
    max_layer_error: Fraction | None = None
    """Target: the largest relative error of any layer's output on calibration data."""
    max_loss_increase: Positive | None = None
    """Target: predicted increase of the loss per token (per sequence where data has no tokens),
    for ranks before rounding; for curvature."""
    threshold: Fraction | None = None
    """Target: singular values to cut, as a share of each layer's largest; for nuclear."""
    size_of: Literal["compressible", "checkpoint"] = "compressible"
    """The tensors that `size` is a share of: the layers that can be compressed, or all tensors."""
    allocation: Allocation = field(default="global", metadata={"derived": _derived_allocation})
    """How ranks are shared out; left out: global for method curvature, relative for others."""
    sequential: Literal["auto"] | bool = "auto"
    """Whether each layer is fitted to the inputs that the compressed layers before it give."""
    ridge: Positive = 0.01
    """Ridge of sequential fitting and of relu, relative to the Gram matrix's mean diagonal."""
    correction: Literal["auto"] | Portion = "auto"
    """How much of the drift of its inputs a sequential layer makes up for; auto: as much as pays on
    an eighth of the calibration sequences, which is then held back from these fits."""
    center: bool = False
    """Whether the bias is fitted too, so that factors only approximate what varies."""
    storage: Storage = "auto"
    """How factors are stored; auto: the form with the lower stored error in the same bytes."""
    rank_multiple: Literal["auto"] | Count = "auto"
    """The number that ranks are multiples of; auto: 32 where both sides are 1024 or more, else 8
    where both sides are multiples of 8, else 1."""
    include: tuple[Pattern, ...] = ("*",)
    """Layers to compress: globs or "re:..." on whole module names."""
    exclude: tuple[Pattern, ...] = ("lm_head",)
    """Layers to leave as they are, taken from the included layers; `lm_head` is the language-model
    head, also where the model calls it otherwise."""
    embeddings: bool = False
    """Whether a transformers model's token embedding is compressed too, and a head tied to it."""
    layers: Mapping[Pattern, LayerOverride] = field(default_factory=dict)
    """Differences for some layers, by pattern; of several that match, the last one counts."""

    def __post_init__(self) -> None:
        given = _given(**{target: getattr(self, target) for target in TARGETS})
        if len(given) != 1:
            remedy = f"set all but one of {', '.join(given)} to null" if given else "none is"
            message = f"exactly one of {', '.join(TARGETS)} must be given; {remedy}"
            raise FieldError(given[1] if given else "", message)
        if self.max_loss_increase is not None:
            self._check_method("max_loss_increase", lambda rules: rules.predicts_loss)
        if self.threshold is not None:
            self._check_method("threshold", lambda rules: rules.takes_threshold)
        if self.threshold is not None and self.rank_multiple != "auto":
            message = "must be auto with threshold, which alone decides the ranks"
            raise FieldError("rank_multiple", message)

    def _check_method(self, target: str, is_able: Callable[[MethodRules], bool]) -> None:
        if not is_able(METHODS[self.method]):
            able = " or ".join(name for name, rules in METHODS.items() if is_able(rules))
            message = f"needs method {able}, not {self.method}; set size instead"
            raise FieldError(target, message)

    @property
    def target(self) -> tuple[str, float]:
        """The only target that is given: its key and its value."""
        (name,) = _given(**{target: getattr(self, target) for target in TARGETS})
        return name, getattr(self, name)

    def num_held_back(self, num_sequences: int) -> int:
        """The number of calibration sequences at the end that no sequential layer is fitted to."""
        alone = self.correction != "auto" or num_sequences < 2
        return 0 if alone else max(1, num_sequences // 8)

    def override(self, name: str) -> LayerOverride:
        """The settings of the last pattern that matches the module name."""
        found = [layer for pattern, layer in self.layers.items() if matches(pattern, name)]
        return found[-1] if found else LayerOverride()

    def selects(self, name: str) -> bool:
        """Whether include and exclude together choose the layer of this module name."""
        included = any(matches(pattern, name) for pattern in self.include)
        return included and not any(matches(pattern, name) for pattern in self.exclude)
