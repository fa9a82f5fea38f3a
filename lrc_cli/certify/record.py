"""certificate.json has this form: both checkpoints, statements, weights, flags and gates."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lrc_cli.checkpoint.headers import UPGRADE
from lrc_cli.errors import InputError
from lrc_cli.quality.certificate_record import (
    Certificate,
    NoCertificate,
    read_certificate,
)
from lrc_cli.reading import read_json
from lrc_cli.report.record import Gate
from lrc_cli.runtime.json_records import ABSENT, JsonRecord

CERTIFICATE, PAGE, SECTION, BADGE, CONFIG = (
    "certificate.json",
    "certificate.html",
    "certificate.md",
    "badge.svg",
    "certify.yaml",
)
"""The files of a certificate, beside manifest.json."""
CERTIFICATE_VERSION = 1
DIRECTION = "original to copy"
"""The order of both networks in a divergence."""


@dataclass(frozen=True, kw_only=True)
class CheckpointFacts(JsonRecord):
    """Describes one of the two checkpoints."""

    name: str
    """The name of its directory or file."""
    form: str
    """How its weights are stored, in words."""
    architecture: str
    """The class of the module that was run."""
    num_parameters: int
    """The number of entries of all stored tensors."""
    num_bytes: int
    """The bytes of all stored tensors."""
    sha256: Mapping[str, str]
    """The sha256 of every file that makes the network or its inputs, by name."""


@dataclass(frozen=True, kw_only=True)
class Arithmetic(JsonRecord):
    """Names the arithmetic that was run, for which alone the statements hold."""

    device: str
    """The kind of device, as torch calls it."""
    activation_dtype: str
    """The dtype of activations of both networks."""
    torch_version: str
    """The version of torch."""
    transformers_version: str
    """The version of transformers."""
    sentences: tuple[str, ...]
    """What a reader must know of it."""


@dataclass(frozen=True, kw_only=True)
class WorstSequence(JsonRecord):
    """Names the drawn sequence on which a quantity is largest."""

    quantity: str
    """The quantity."""
    value: float
    """Its value there."""
    index: int
    """The number of the sequence in the draw, from 0."""


@dataclass(frozen=True, kw_only=True)
class GridFacts(JsonRecord):
    """Holds the distribution of (weight - grid), in steps, of a tensor that lies on grids."""

    group: int
    """The numbers of neighbours in a row that have one step."""
    levels: int
    """The most levels of a group among the groups that were sampled."""
    beyond_half: float
    """The share of numbers farther than half a step from the original's."""
    beyond_one: float
    """The share of numbers farther than one step."""
    largest: float
    """The largest distance, in steps."""


@dataclass(frozen=True, kw_only=True)
class TensorFacts(JsonRecord):
    """Holds how far one tensor of the copy is from the original's."""

    name: str
    """The name in the network."""
    shape: tuple[int, ...]
    """The shape in the original."""
    error: float | None
    """||W' - W|| / ||W||; null where the two cannot be subtracted."""
    scale: float | None
    """<W', W> / <W, W>, the factor by which W explains W' best; null likewise."""
    input_error: float | None = field(default=None, metadata=ABSENT)
    """||(W' - W) x|| / ||W x|| over the selection data; absent where it was not measured."""
    grid: GridFacts | None = field(default=None, metadata=ABSENT)
    """The distance in steps; absent where the copy's numbers lie on no grid."""


@dataclass(frozen=True, kw_only=True)
class Flag(JsonRecord):
    """Names a tensor that a person should look at, and why."""

    tensor: str
    """The name in the network."""
    kind: str
    """A key of `flags.KINDS`."""
    text: str
    """What was found, in a sentence."""


@dataclass(frozen=True, kw_only=True)
class Weights(JsonRecord):
    """Holds what comparing both checkpoints tensor by tensor came to."""

    tensors: tuple[TensorFacts, ...]
    """All tensors that both have, in the original's order."""
    flags: tuple[Flag, ...]
    """What a person should look at."""


@dataclass(frozen=True, kw_only=True)
class CopyRecord(JsonRecord):
    """Holds all of certificate.json."""

    certificate_version: int = CERTIFICATE_VERSION
    """The version of this form."""
    lrc_version: str
    """The version of lrc that wrote it."""
    original: CheckpointFacts
    """The checkpoint that the copy was made from."""
    other: CheckpointFacts
    """The copy."""
    arithmetic: Arithmetic
    """The arithmetic that was run."""
    differences: tuple[str, ...]
    """How the two networks or their tokenizers differ beside their weights, in sentences."""
    certificate: Certificate | NoCertificate = field(metadata={"read": read_certificate})
    """The statements, or why there are none."""
    worst: tuple[WorstSequence, ...]
    """The worst of the drawn sequences, for each quantity."""
    weights: Weights
    """The comparison tensor by tensor."""
    gates: tuple[Gate, ...]
    """Every limit that was set."""
    config: str
    """The resolved config, as YAML."""


def read_record(directory: Path) -> CopyRecord:
    """Reads certificate.json.

    Raises:
        InputError: it cannot be read, or a newer lrc wrote it.
    """
    file = directory / CERTIFICATE
    found = read_json(file)
    version = found.get("certificate_version")
    if isinstance(version, int) and version > CERTIFICATE_VERSION:
        raise InputError(
            f"{file} has certificate_version {version}, and this lrc reads up to"
            f" {CERTIFICATE_VERSION}",
            UPGRADE,
        )
    return CopyRecord.from_json(found, str(file))
