"""These dataclasses are report.json, from which the card, the page and scripts are made.

The order of the fields is the order of the keys. Each field says its unit and when it is null;
*absent* means that the key is not in the file.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lrc_cli.checkpoint.fused import Fused
from lrc_cli.forms import DENSE
from lrc_cli.quality.certificate_record import Certificate, NoCertificate, read_certificate
from lrc_cli.quality.records import QualityRow, WorstCase
from lrc_cli.reading import read_json
from lrc_cli.runtime.json_records import ABSENT, INLINE, JsonRecord

REPORT = "report.json"
SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class LossRecord(JsonRecord):
    """Describes the loss that `curvature` was taken of."""

    description: str
    """The loss in words."""
    kind: str
    """next_token | masked_token | sampled | output."""
    unit: str = ""
    """The unit of the layers' estimates of its increase; early outputs have no such key."""


@dataclass(frozen=True, kw_only=True)
class Target(JsonRecord):
    """Says what was asked for."""

    name: str
    """size | max_layer_error | max_loss_increase | threshold."""
    value: float
    """The limit that the config gives."""
    of: str | None
    """The whole of which a size is a share: compressible | checkpoint; null for other targets."""
    met: bool
    """Whether the written files are within the limit."""


@dataclass(frozen=True, kw_only=True)
class SequentialDecision(JsonRecord):
    """Says whether layers were fitted to the compressed network's inputs."""

    used: bool
    """Whether any layer was fitted so."""
    reason: str
    """The reason for this decision, in words."""
    held_back: int
    """Calibration sequences that no layer was fitted to."""


@dataclass(frozen=True, kw_only=True)
class RecoveredWindow(JsonRecord):
    """Says what training one window gave, on sequences that nothing was trained on."""

    blocks: tuple[str, ...]
    """The window's blocks, by module name."""
    layers: tuple[str, ...]
    """The window's factorised layers, which were trained together."""
    before: float
    """The squared error of the window's output with the factors as they were fitted.

    The error is relative to the square of the original's output. All windows before were trained.
    """
    after: float
    """The error with the factors that were best; never above `before`."""
    rate: float | None
    """The learning rate, relative to the root mean square of each tensor; null: none gained."""
    trials: Mapping[str, float | None]
    """The error after a short trial of each rate; null where it was not finite."""
    steps: int
    """The steps that were taken."""
    planned_steps: int
    """The steps that were asked for; training ends early where it gains nothing more."""

    @property
    def gained(self) -> bool:
        """Whether the window's factors are better than before."""
        return self.after < self.before


@dataclass(frozen=True, kw_only=True)
class Recovery(JsonRecord):
    """Says what training the factors gave, on sequences that nothing was trained on."""

    scope: str
    """The part of the network that was trained at a time: model or block."""
    reason: str | None = field(default=None, metadata=ABSENT)
    """Why this scope was taken, in words; absent where the config names it."""
    objective: str
    """What was lowered, in words."""
    before: float
    """The objective with the factors as they were fitted."""
    after: float
    """The objective with the factors as they are written; never above `before`."""
    rate: float | None
    """The learning rate, relative to the root mean square of each tensor; null: none gained, or
    every window has its own."""
    trials: Mapping[str, float | None]
    """The objective after a short trial of each rate; null where it was not finite. Windows have
    their own."""
    steps: int
    """The steps that were taken; where windows are trained, the most that one took."""
    planned_steps: int
    """The steps that were asked for; training ends early where it gains nothing more."""
    tokens: int
    """The tokens that the steps trained on, repeated ones included."""
    planned_tokens: int
    """The tokens that were asked for; as `recover.tokens` they give the same training again."""
    num_sequences: int
    """The sequences that were trained on."""
    num_held_out: int
    """The sequences that were held out to judge the training."""
    num_left_out: int
    """The drawn sequences that equal one of certification or evaluation, or one held out."""
    norms: tuple[str, ...] | None = field(default=None, metadata=ABSENT)
    """The norms' tensors that are written as they were trained; absent where none are."""
    windows: tuple[RecoveredWindow, ...] | None = field(default=None, metadata=ABSENT)
    """The windows that were trained one after the other; absent for the scope model."""

    @property
    def gained(self) -> bool:
        """Whether the factors that are written are trained ones."""
        return self.after < self.before


@dataclass(frozen=True, kw_only=True)
class BeforeAfter(JsonRecord):
    """Holds a number of the original and of the output."""

    before: int
    """The number in the original."""
    after: int
    """The number in the output."""


@dataclass(frozen=True, kw_only=True)
class Size(JsonRecord):
    """Holds bytes and parameters."""

    compressible_bytes: BeforeAfter
    """Bytes of the compressible weights."""
    checkpoint_bytes: BeforeAfter
    """Bytes of all tensors."""
    parameters: BeforeAfter
    """Numbers in all tensors, permutations excepted."""
    kept_compressible: float
    """compressible_bytes, after / before."""
    kept_checkpoint: float
    """checkpoint_bytes, after / before."""
    kept_parameters: float
    """parameters, after / before."""
    file_bytes: int
    """Bytes of the written weight files, headers included."""


@dataclass(frozen=True, kw_only=True)
class MetricErrors(JsonRecord):
    """Holds a layer's errors in what its method minimises, in `unit`."""

    floor: float
    """The numerical floor: an error below it is rounding."""
    inherited: float | None = field(default=None, metadata=ABSENT)
    """The part that no factors could have avoided; absent unless fitted sequentially."""
    optimum: float | None
    """The least error of any matrix of the rank; null where none can be proved."""
    stored: float
    """The error of the factors as they are written."""
    svd: float | None
    """The error of plain SVD of the rank; null for a form without a rank."""
    total: float
    """The error of the zero matrix."""
    unit: str
    """The unit, in words."""


@dataclass(frozen=True, kw_only=True)
class OutputErrors(JsonRecord):
    """Holds a layer's output errors relative to ||W X||_F."""

    floor: float
    """The numerical floor: an error below it is rounding."""
    inputs: str
    """X: calibration | white | compressed (the inputs in the compressed network)."""
    optimum: float | None
    """The error of the method's solution of the rank, not rounded; null without a rank."""
    stored: float
    """The error of the factors as they are written."""
    svd: float | None
    """The error of plain SVD of the rank; null for a form without a rank."""


@dataclass(frozen=True, kw_only=True)
class HeldOutErrors(JsonRecord):
    """Holds a layer's errors over all certification sequences, relative to ||W x||.

    See docs/theory.md, C3. y = W x + b in the dense network, y~ = Z x~ + b~ in the compressed one.
    """

    deployed: float
    """||y - y~||: the layer's error in the compressed network."""
    inherited: float
    """||W x - W x~||: the error that came from the layers before."""
    new: float
    """||W x~ + b - y~||: the error that the layer's own factors add."""
    same_input: float
    """||y - (Z x + b~)||: the change by its factors on the dense network's inputs."""
    worst_sequence: float
    """The largest error on one certification sequence, of the kind that the certificate bounds."""
    tolerance: float
    """The largest such error on one selection sequence."""
    num_sequences: int
    """The number of certification sequences that were measured."""


@dataclass(frozen=True, kw_only=True)
class LayerErrors(JsonRecord):
    """Holds a factorised layer's errors, from the written tensors."""

    metric: MetricErrors
    """The errors in what the method minimises."""
    output: OutputErrors
    """The errors of the layer's outputs."""
    held_out: HeldOutErrors | None = field(default=None, metadata=ABSENT)
    """The errors on certification data; absent where the layer was not measured on any."""


@dataclass(frozen=True, kw_only=True)
class ReluRank(JsonRecord):
    """Says how `relu` solved one rank."""

    gap: float
    """A proven bound: the objective exceeds its least value by at most this."""
    objective: float
    """The value of the convex programme that the search begins with."""
    penalty: float
    """That programme's penalty on the nuclear norm."""
    rank: int
    """The rank."""
    start: str
    """The factors from which polishing began."""
    steps: int
    """The number of steps that the programme took."""


@dataclass(frozen=True, kw_only=True)
class LayerFacts(JsonRecord):
    """Says what became of a layer. A dense layer has only fallback, reason and storage."""

    block: int | None = field(default=None, metadata=ABSENT)
    """Rows of a row group of the permutation, 1 without permutation; absent for a dense layer."""
    correction: float | None = field(default=None, metadata=ABSENT)
    """Share of the drift that a sequential fit makes up for; absent otherwise."""
    errors: LayerErrors | None = field(default=None, metadata=ABSENT)
    """The layer's errors; absent for a dense layer."""
    fallback: bool
    """Whether the layer was meant to be factorised and could not be."""
    max_coefficient: float | None = None
    """The largest interpolation coefficient.

    It is null without permutation, and absent for a dense layer.
    """
    rank: int | None = field(default=None, metadata=ABSENT)
    """The rank; absent for a dense layer."""
    parameters: Mapping[str, Any] | None = field(default=None, metadata=ABSENT)
    """The parameters in the layer table of a form without a rank; absent for other layers."""
    reason: str | None
    """The reason for this storage, or for staying dense, in words; null without one."""
    relu: tuple[ReluRank, ...] | None = field(default=None, metadata=ABSENT)
    """Every rank that `relu` solved; absent for other methods."""
    sequential: bool | None = field(default=None, metadata=ABSENT)
    """Whether it was fitted to the compressed network's inputs; absent where no layer was."""
    sequential_failed: bool | None = field(default=None, metadata=ABSENT)
    """Whether a sequential fit failed; absent where `sequential` is true or absent."""
    sequential_reason: str | None = field(default=None, metadata=ABSENT)
    """The reason for a plain fit; absent where `sequential` is true or absent."""
    storage: str
    """dense | factors | interpolative, or another form."""
    trained: bool | None = field(default=None, metadata=ABSENT)
    """Whether its factors were trained after they were fitted; absent otherwise."""
    threshold: float | None = field(default=None, metadata=ABSENT)
    """The threshold at which `nuclear` cut the singular values; absent for other methods."""
    threshold_share: float | None = field(default=None, metadata=ABSENT)
    """`threshold` as a share of the largest singular value; absent for other methods."""

    @property
    def is_dense(self) -> bool:
        """Whether the layer has no factors."""
        return self.storage == DENSE

    @property
    def stated(self) -> dict[str, Any]:
        """Returns the form and its parameters, by the names of a layer table."""
        own = {"storage": self.storage, "rank": self.rank, "block": self.block}
        return own | dict(self.parameters or {})

    @property
    def held_out(self) -> HeldOutErrors | None:
        """The errors on certification data; None where there are none."""
        return None if self.errors is None else self.errors.held_out

    def to_json(self) -> dict[str, Any]:
        """Writes the facts as JsonRecord.to_json does; a dense layer has no null."""
        found = super().to_json()
        if self.is_dense:
            del found["max_coefficient"]
        return found


@dataclass(frozen=True, kw_only=True)
class LayerRecord(JsonRecord):
    """Holds what is said of one compressible layer."""

    name: str
    """The name of the layer's module."""
    kind: str
    """The class of the layer's module."""
    tied_to: str | None = None
    """The layer that has the same weight; null where none has."""
    shape: tuple[int, ...]
    """Rows and columns (m, n) of the layer's matrix."""
    method: str
    """The method that it was fitted with."""
    method_reason: str | None = None
    """The reason why this is not the method that was asked for; null where it is."""
    bytes_before: int
    """Bytes of the layer's weight in the original."""
    bytes_after: int
    """Bytes of the tensors in the weight's place, with a bias that the layer has gained."""
    dtype: str
    """The dtype of the written tensors, as torch calls it."""
    facts: LayerFacts = field(metadata=INLINE)
    """The outcome for the layer."""


@dataclass(frozen=True, kw_only=True)
class SkippedTensor(JsonRecord):
    """Holds what is said of a tensor that is not compressible."""

    name: str
    """The tensor's key on the disk."""
    reason: str
    """The reason, in words."""
    bytes: int
    """The tensor's bytes in the original."""
    share: float
    """The tensor's share of the original's bytes."""


@dataclass(frozen=True, kw_only=True)
class DrawnSequences(JsonRecord):
    """Describes the sequences that were drawn for one purpose."""

    num_sequences: int
    """The number of sequences."""
    num_tokens: int
    """Their tokens, or rows."""
    population: int
    """The number of sequences to draw from."""
    one_in: int | None = field(default=None, metadata=ABSENT)
    """One passage of the file in so many was read; absent where the whole file was."""
    sha256: str
    """sha256 of them all, in hexadecimal."""


@dataclass(frozen=True, kw_only=True)
class DataFound(JsonRecord):
    """Says how much of the data that was asked for reached the network, for one purpose."""

    asked: int
    """The number of sequences that was asked for."""
    found: int
    """The number of sequences that were drawn."""
    repeated: int = 0
    """The drawn sequences that equal another one, of the same or of an earlier purpose."""
    unread: float | None = None
    """Share of a text's characters that no token stands for, or only the unknown one; null: there
    is no text, or the tokenizer does not tell."""
    turns: int = 0
    """The turns with a text in the file's conversations."""
    dropped_turns: int = 0
    """The turns of which the chat template prints nothing."""
    shortened_turns: int = 0
    """The turns of which the chat template prints a part."""
    empty_records: int = 0
    """The file's records without text."""


@dataclass(frozen=True, kw_only=True)
class Provenance(JsonRecord):
    """Says where the output comes from; hashes are sha256 in hexadecimal."""

    lrc_version: str
    """Version of lrc."""
    code_sha256: str = ""
    """Hash of lrc's sources that can change a number; early outputs have no such key."""
    python: str
    """Version of Python."""
    packages: Mapping[str, str]
    """Name -> version of the packages that compute."""
    platform: str
    """The processor's architecture."""
    device: str
    """The device, as torch calls it."""
    device_name: str | None = None
    """The GPU's name; null without one."""
    activation_dtype: str
    """The dtype of activations, as torch calls it."""
    seed: int
    """runtime.seed."""
    config_sha256: str
    """Hash of the resolved config, without keys that change no number."""
    config: str
    """The resolved config, YAML."""
    evaluation: tuple[Mapping[str, Any], ...] | None
    """The config's evaluation section; null: the data that calibration left free."""
    checkpoint_sha256: Mapping[str, str]
    """Hash of every file of the original, by name."""
    data_files_sha256: Mapping[str, str]
    """Hash of every data file, and of the factory's file, by name."""
    sequences: Mapping[str, DrawnSequences]
    """The sequences that were drawn for calibration and certification."""
    data: Mapping[str, DataFound] = field(default_factory=dict)
    """How much of the data reached the network, by purpose; early outputs have no such key."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """The original's files and folders that are not carried over, each with why."""


@dataclass(frozen=True, kw_only=True)
class Gate(JsonRecord):
    """Holds a limit of the config's gates and what was measured."""

    name: str
    """The key in `gates`."""
    limit: float
    """The limit."""
    measured: float | None
    """The worst figure; null where nothing was measured."""
    where: str | None
    """The text or the layer with that figure; null where nothing was measured."""
    met: bool
    """Whether the figure is within the limit; false where nothing was measured."""
    reason: str | None
    """The reason why nothing was measured, or a remark; null otherwise."""


@dataclass(frozen=True, kw_only=True)
class Record(JsonRecord):
    """Holds all of report.json."""

    schema_version: int = SCHEMA_VERSION
    """The version of this form."""
    model: str
    """The name of the original's directory or file."""
    architecture: str | None
    """The transformers class; null for other checkpoints."""
    method: str
    """compression.method."""
    loss: LossRecord | None
    """The loss that `curvature` was taken of; null for other methods."""
    target: Target
    """The target that was asked for."""
    allocation: str
    """compression.allocation."""
    sequential: SequentialDecision
    """The decision whether layers are fitted to the compressed network's inputs."""
    recovery: Recovery | None = field(default=None, metadata=ABSENT)
    """What training the factors gave; absent where nothing was trained."""
    size: Size
    """Bytes and parameters."""
    quality: tuple[QualityRow, ...]
    """A row for every evaluation text."""
    layers: tuple[LayerRecord, ...]
    """Every compressible layer, in the network's order."""
    skipped: tuple[SkippedTensor, ...]
    """Every other tensor."""
    copies: Mapping[str, str] = field(default_factory=dict)
    """Keys of copies that the original holds of tied tensors -> the key that was kept."""
    fused: Mapping[str, Fused] = field(default_factory=dict)
    """The way in which tensors that hold all experts' matrices were taken apart, by key."""
    certificate: Certificate | NoCertificate = field(metadata={"read": read_certificate})
    """The statements that hold at a confidence."""
    worst_case: WorstCase | None = None
    """The worst-case bound; null for networks that have none."""
    timing: Mapping[str, float]
    """Wall time by phase, seconds."""
    memory: Mapping[str, int]
    """Peak bytes: host_resident, and gpu_allocated where there is a GPU."""
    provenance: Provenance
    """Versions, hashes, seed, config and data."""
    gates: tuple[Gate, ...] = ()
    """A row for every gate that is set."""

    @property
    def factorised(self) -> list[LayerRecord]:
        """The layers that were replaced by factors."""
        return [layer for layer in self.layers if not layer.facts.is_dense]

    @property
    def errors(self) -> list[LayerErrors]:
        """The errors of the layers that were replaced by factors."""
        return [layer.facts.errors for layer in self.layers if layer.facts.errors is not None]

    @property
    def fallen_back(self) -> list[LayerRecord]:
        """The layers that were meant to be factorised and could not be."""
        return [layer for layer in self.layers if layer.facts.fallback]


def parse_record(value: Any) -> Record:
    """Returns report.json from its parsed JSON; raises InputError as `JsonRecord.from_json`."""
    return Record.from_json(value, REPORT)


def read_record(directory: Path) -> Record:
    """Returns report.json of an output directory.

    Raises InputError as `JsonRecord.from_json` does.
    """
    return parse_record(read_json(directory / REPORT))
