"""The config is a set of frozen dataclasses: fields, defaults and docstrings are the reference.

The reader, the JSON Schema and the messages are all derived from the annotations here.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from lrc_cli.config.compression import Compression
from lrc_cli.config.constraints import (
    ByteSize,
    Count,
    Device,
    Factory,
    FieldError,
    FilePart,
    Fraction,
    Positive,
    Seed,
    SequenceLength,
    Text,
    parse_bytes,
)

Dtype = Literal["auto", "float32", "float16", "bfloat16"]
RuntimeDtype = Literal["auto", "float64", "float32", "float16", "bfloat16"]


def hidden_flag() -> Any:
    """A field that is no key of the config. Only the reader sets such a field."""
    return field(default=False, compare=False, metadata={"hidden": True})


@dataclass(frozen=True, kw_only=True)
class Model:
    """The checkpoint to compress."""

    path: Text
    """Transformers directory, weight file (.safetensors .bin .pt .pth) or distributed directory."""
    factory: Factory | None = None
    """"package.module:function" that returns the torch.nn.Module; null: a transformers model."""
    trust_remote_code: bool = False
    """Whether code that comes with the checkpoint may run."""
    state_dict: Text | None = None
    """Keys to one of several state dicts: state_dict.ema, or . (the top); null: the only one."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The data that the factors are fitted to."""

    path: Text
    """Texts (.txt .jsonl .csv .parquet), inputs (.safetensors .npz), folder of images or audio."""
    part: FilePart | None = None
    """Share of the file, by position; null: all."""
    text_field: Text = "text"
    """Field of a record (.jsonl .csv .parquet) that holds the text, or a list of token ids."""
    chat_template: bool = False
    """Whether records hold conversations (in "messages"), to be rendered by the chat template."""
    num_sequences: Count = 64
    """Number of sequences. Left out: 64, or as many as give layers with nine tenths of the weights
    20 rows for each input; fewer if the data has fewer. A given number is neither raised nor
    lowered."""
    sequence_length: SequenceLength = 512
    """Tokens in a sequence."""
    seed: Seed = 0
    """Seed of the permutation that draws the sequences of every purpose."""
    num_sequences_is_default: bool = hidden_flag()
    """Whether num_sequences was left out of the config."""


@dataclass(frozen=True, kw_only=True)
class Certification:
    """Data held back for statements: never used for fitting or choosing."""

    path: Text | None = None
    """Separate data, read in the same way as calibration data; null: the calibration data."""
    part: FilePart | None = None
    """Share of the file, by position; null: all."""
    num_sequences: Count = 128
    """Number of sequences; the default is lowered if the data has fewer, a given number is not."""
    sequence_length: SequenceLength | None = None
    """Tokens in a sequence; null: as in `calibration`."""
    confidence: Fraction = 0.95
    """Probability with which all statements hold together."""
    quantile: Fraction = 0.95
    """Share of sequences that a bound on the error covers."""
    num_sequences_is_default: bool = hidden_flag()
    """Whether num_sequences was left out of the config."""


@dataclass(frozen=True, kw_only=True)
class EvaluationText:
    """One text on which quality is measured before and after."""

    name: Text
    """Name of the text's row in the report; every text has another name."""
    path: Text
    """Data of any kind that `calibration.path` takes."""
    part: FilePart | None = None
    """Share of the file, by position; null: all."""
    num_sequences: Count = 64
    """Number of sequences; the default is lowered if the data has fewer, a given number is not."""
    sequence_length: SequenceLength | None = None
    """Tokens in a sequence; null: as in `calibration`."""
    text_field: Text = "text"
    """Field of a record that holds the text, or a list of token ids."""
    chat_template: bool = False
    """Whether records hold conversations, as in `calibration`."""
    num_sequences_is_default: bool = hidden_flag()
    """Whether num_sequences was left out of the config."""


@dataclass(frozen=True, kw_only=True)
class Recover:
    """Optional training of the factors."""

    scope: Literal["none", "block", "model", "auto"] = "none"
    """The part of the network that is trained at a time; none: nothing is trained. auto: model
    where its memory fits runtime.memory_limit, or the device without one, else block."""
    tokens: Literal["auto"] | Count = "auto"
    """Number of training tokens, repeated ones included; auto: four times the data."""
    minutes: Positive | None = None
    """Time for the whole stage, in place of tokens: the speed is measured first, and sets their
    number; null: tokens sets it."""
    norms: bool = False
    """Whether the norms' vectors are trained too; every other tensor stays as it is."""
    path: Text | None = None
    """Data to train on, read in the same way as calibration data; null: the calibration data."""
    part: FilePart | None = None
    """Share of the file, by position; null: all, or the part of the calibration data."""
    num_sequences: Count | None = None
    """Number of sequences to draw for training alone; null: the calibration sequences, and 1024
    where a path is given."""

    def __post_init__(self) -> None:
        if self.part is not None and self.path is None and self.num_sequences is None:
            raise FieldError("part", "has no meaning without path or num_sequences; set one")
        if self.minutes is not None and self.tokens != "auto":
            raise FieldError("minutes", "and tokens exclude each other; leave one out")

    @property
    def is_used(self) -> bool:
        """Whether anything is trained."""
        return self.scope != "none"

    @property
    def has_own_data(self) -> bool:
        """Whether sequences are drawn for training alone."""
        return self.path is not None or self.num_sequences is not None


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """Where and how the job runs."""

    device: Device = "auto"
    """Device; auto: a GPU where there is one."""
    dtype: RuntimeDtype = "auto"
    """Data type of activations; auto: the stored one where the device is fast in it, else float32.
    Networks whose own code needs float64 need it here too."""
    memory_limit: ByteSize | None = None
    """Memory that activations and gradients between blocks may take; the rest goes to disk."""
    work_dir: Text | None = None
    """Directory of finished units; null: .lrc-work/<statistics fingerprint> beside the output."""
    seed: Seed = 0
    """Seed of everything random except the draw of sequences."""

    @property
    def memory_bytes(self) -> int | None:
        """memory_limit in bytes; None: no limit."""
        return None if self.memory_limit is None else parse_bytes(self.memory_limit)


@dataclass(frozen=True, kw_only=True)
class Output:
    """The checkpoint that is written."""

    path: Text
    """Directory to write."""
    dtype: Dtype = "auto"
    """Data type of all floating-point tensors; auto: as in the source."""
    shard_size: ByteSize = "5GB"
    """Largest size of one weight file, such as 5GB, 500MB or 1GiB, or a number of bytes."""
    remote_code: bool = False
    """Whether a self-registering modeling file is written beside the weights."""

    def __post_init__(self) -> None:
        if self.shard_bytes < 1:
            raise FieldError("shard_size", "must be at least one byte")

    @property
    def shard_bytes(self) -> int:
        """shard_size in bytes."""
        return parse_bytes(self.shard_size)


@dataclass(frozen=True, kw_only=True)
class Gates:
    """Limits on the measured figures; a miss is exit code 3."""

    max_perplexity_increase: Positive | None = None
    """Largest relative increase on any evaluation text: 0.25 is +25 %."""
    max_layer_error: Fraction | None = None
    """Largest relative error of any layer on certification data."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole compression job."""

    model: Model
    """The checkpoint to compress."""
    calibration: Calibration
    """The data that the factors are fitted to."""
    certification: Certification | None = None
    """Data held back for statements; null: none is held back."""
    evaluation: tuple[EvaluationText, ...] | None = None
    """Texts to measure quality on; null: sequences held back from calibration data; []: none."""
    compression: Compression
    """How much is compressed, and how."""
    recover: Recover = field(default_factory=Recover)
    """Optional training of the factors."""
    runtime: Runtime = field(default_factory=Runtime)
    """Where and how the job runs."""
    output: Output
    """The checkpoint that is written."""
    gates: Gates = field(default_factory=Gates)
    """Limits on the measured figures."""

    def __post_init__(self) -> None:
        names = [text.name for text in self.evaluation or ()]
        for i, name in enumerate(names):
            if name in names[:i]:
                raise FieldError(f"evaluation.{i}.name", f"{name!r} is given twice; rename one")
            if name in ("calibration", "certification", "recover"):
                raise FieldError(f"evaluation.{i}.name", f"{name!r} is a section's name; rename it")
