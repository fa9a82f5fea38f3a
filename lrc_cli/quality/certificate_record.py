"""A certificate has this form in report.json: its data, its values, its statements."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from lrc_cli.runtime.json_records import INLINE, JsonRecord, read_value

CERTIFIED, CANNOT = "certified", "cannot certify"


@dataclass(frozen=True, kw_only=True)
class Population(JsonRecord):
    """Describes the finite set that the certification sequences were drawn from."""

    description: str
    """The population in words."""
    file: str
    """Name of the data file."""
    part: tuple[float, ...]
    """The two ends of the share of the file that was drawn from."""
    size: int
    """The number of sequences in the population."""
    file_sha256: str
    """sha256 of the data file, in hexadecimal."""


@dataclass(frozen=True, kw_only=True)
class Selection(JsonRecord):
    """Describes the sequences that tolerances and clipping limits were chosen on."""

    purpose: str
    """The purpose that they were drawn for."""
    num_sequences: int
    """The number of sequences that were used."""
    num_tokens: int
    """Their tokens, or rows."""
    sha256: str
    """sha256 of all the data drawn for that purpose, in hexadecimal."""


@dataclass(frozen=True, kw_only=True)
class CertificateData(JsonRecord):
    """Says what was drawn, from what, and what was chosen on which data."""

    sequence_length: int | None
    """Tokens of a sequence; null where a member of the population is a row."""
    unit: str
    """The meaning of one sequence, in words."""
    sampling: str
    """The way in which sequences were drawn, in words."""
    population: Population
    """The population that they were drawn from."""
    data_sha256: str
    """sha256 of the certification data, in hexadecimal."""
    selection: Selection
    """The data that tolerances and limits were chosen on."""
    predictions: str
    """The kind of predictions that was compared, in words."""
    activation_dtype: str
    """The dtype of activations, as torch calls it."""
    not_covered: tuple[str, ...]
    """Factorised layers that no statement is about."""


@dataclass(frozen=True, kw_only=True)
class SequenceValues(JsonRecord):
    """Holds the values of statements: one per certification sequence, in drawn order."""

    quantities: Mapping[str, tuple[float, ...]]
    """The values of each quantity; `all_layers` is the largest error / tolerance of any layer."""
    layers: Mapping[str, tuple[float, ...]] | None = None
    """The errors of each layer; absent where layers have no statements of their own."""

    def to_json(self) -> dict[str, Any]:
        """Returns the quantities as keys, and `layers` where there are any."""
        found: dict[str, Any] = {name: list(x) for name, x in self.quantities.items()}
        if self.layers is not None:
            found["layers"] = {name: list(x) for name, x in self.layers.items()}
        return found

    @classmethod
    def from_json(cls, value: Any, file: str, path: str = "") -> Self:
        """Reads the values as JsonRecord.from_json does."""
        by_name = read_value(Mapping[str, Any], value, file, path)
        rest = {name: found for name, found in by_name.items() if name != "layers"}
        hint = Mapping[str, tuple[float, ...]]
        quantities = read_value(hint, rest, file, path)
        if "layers" not in by_name:
            return cls(quantities=quantities)
        layers = read_value(hint, by_name["layers"], file, f"{path}.layers")
        return cls(quantities=quantities, layers=layers)


@dataclass(frozen=True, kw_only=True)
class Statement(JsonRecord):
    """Holds one statement: a bound of a quantity's mean or quantile, or why there is none."""

    id: str
    """Quantity, layer if any, and kind, joined by dots."""
    quantity: str
    """The bounded quantity; see `certificate.UNITS`."""
    kind: str
    """mean | quantile."""
    layer: str | None
    """The layer of the statement; null for the whole network or for all layers."""
    status: str
    """certified | cannot certify."""
    bound: float | None
    """The bound, in `unit`; null where nothing is certified."""
    observed: float | None
    """The mean (after clipping) or quantile of the sample; null where nothing is claimed."""
    worst: float | None
    """The largest value of the sample; null where nothing is claimed."""
    unit: str
    """The unit of bound, observed and worst, in words."""
    clip: tuple[float, ...] | None
    """The two limits that values were clipped at before a mean was bounded; null otherwise."""
    num_clipped: int = 0
    """The number of values beyond these limits."""
    delta: float
    """The risk of this statement alone."""
    order: int | None
    """The bound is the value of this order in the sample, smallest first; null without one."""
    num_needed: int | None
    """The least number of sequences that serve for such a quantile; null for means."""
    text: str
    """The statement in words."""


@dataclass(frozen=True, kw_only=True)
class Certificate(JsonRecord):
    """Holds statements that are true together at a confidence (docs/theory.md, C2)."""

    confidence: float
    """The probability that all statements hold, over the draw of the sequences."""
    quantile: float
    """The share of the population that quantile statements are about."""
    num_statements: int
    """The number of statements that share the risk."""
    num_sequences: int
    """The number of certification sequences that were measured."""
    data: CertificateData = field(metadata=INLINE)
    """The data that were drawn, and their source."""
    tolerances: Mapping[str, float]
    """The largest error of each layer on selection data, by which its errors are divided."""
    clips: Mapping[str, float]
    """The limit of each quantity, at which values are clipped before their mean is bounded."""
    values: SequenceValues
    """The measured values, sequence by sequence."""
    note: str | None
    """Always null: there are statements."""
    statements: tuple[Statement, ...]
    """All statements, also what could not be certified."""
    assumptions: tuple[str, ...]
    """The assumptions of the statements, in sentences."""


@dataclass(frozen=True, kw_only=True)
class NoCertificate(JsonRecord):
    """Stands in a report that certifies nothing."""

    statements: tuple[Statement, ...] = ()
    """Always empty."""
    note: str | None = None
    """The reason why there are no statements."""


def read_certificate(value: Any, file: str, path: str) -> Certificate | NoCertificate:
    """Returns either kind of certificate, by its statements; raises as JsonRecord.from_json."""
    if isinstance(value, dict) and value.get("statements") == []:
        return NoCertificate.from_json(value, file, path)
    return Certificate.from_json(value, file, path)
