"""The config of `lrc certify` is a set of frozen dataclasses, read as strictly as a job's."""

from dataclasses import dataclass, field

from lrc_cli.config.constraints import (
    ByteSize,
    Count,
    Device,
    Factory,
    FilePart,
    Fraction,
    NotNegative,
    Positive,
    Seed,
    SequenceLength,
    Share,
    Text,
    parse_bytes,
)
from lrc_cli.config.sections import RuntimeDtype, hidden_flag


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One of the two checkpoints."""

    path: Text
    """Transformers directory, weight file, distributed directory, or an output of lrc's."""
    factory: Factory | None = None
    """"package.module:function" that returns the torch.nn.Module; null: a transformers model."""
    trust_remote_code: bool = False
    """Whether code that comes with the checkpoint may run."""
    state_dict: Text | None = None
    """Keys to one of several state dicts: state_dict.ema, or . (the top); null: the only one."""


@dataclass(frozen=True, kw_only=True)
class CertifiedData:
    """The population that statements are about, and the draw from it."""

    path: Text
    """Texts (.txt .jsonl .csv .parquet), inputs (.safetensors .npz), folder of images or audio."""
    part: FilePart | None = None
    """Share of the file, by position; null: all."""
    text_field: Text = "text"
    """Field of a record (.jsonl .csv .parquet) that holds the text, or a list of token ids."""
    chat_template: bool = False
    """Whether records hold conversations (in "messages"), to be rendered by the chat template."""
    num_sequences: Count = 128
    """Number of sequences; the default is lowered if the data has fewer, a given number is not."""
    sequence_length: SequenceLength = 512
    """Tokens in a sequence."""
    seed: Seed = 0
    """Seed of the permutation that draws the sequences, and of masked tokens."""
    num_sequences_is_default: bool = hidden_flag()
    """Whether num_sequences was left out of the config."""


@dataclass(frozen=True, kw_only=True)
class CopyGates:
    """Limits on certified bounds and on flags; a miss is exit code 3.

    A bound that could not be certified misses its gate.
    """

    max_kl_mean: Positive | None = None
    """Largest bound on the mean of the KL divergence, nats."""
    max_kl_quantile: Positive | None = None
    """Largest bound on the quantile of the KL divergence, nats."""
    max_top1_disagreement_mean: Share | None = None
    """Largest bound on the mean share of changed predictions."""
    max_top1_disagreement_quantile: Share | None = None
    """Largest bound on the quantile of the share of changed predictions."""
    max_loss_difference_mean: Positive | None = None
    """Largest bound on the mean increase of the loss, nats per token."""
    max_loss_difference_quantile: Positive | None = None
    """Largest bound on the quantile of the increase of the loss, nats per token."""
    max_relative_output_error_mean: Positive | None = None
    """Largest bound on the mean relative error of the outputs."""
    max_relative_output_error_quantile: Positive | None = None
    """Largest bound on the quantile of the relative error of the outputs."""
    max_flags: NotNegative | None = None
    """Largest number of flags on weights."""


@dataclass(frozen=True, kw_only=True)
class CertifyRuntime:
    """Where and how both networks run."""

    device: Device = "auto"
    """Device; auto: a GPU where there is one."""
    dtype: RuntimeDtype = "auto"
    """Data type of activations of both networks; auto: the original's stored one where the device
    is fast in it, else float32."""
    memory_limit: ByteSize | None = None
    """Memory that activations between blocks may take; the rest goes to disk."""

    @property
    def memory_bytes(self) -> int | None:
        """memory_limit in bytes; None: no limit."""
        return None if self.memory_limit is None else parse_bytes(self.memory_limit)


@dataclass(frozen=True, kw_only=True)
class CertificateOutput:
    """The directory that is written."""

    path: Text = "certificate"
    """Directory to write."""


@dataclass(frozen=True, kw_only=True)
class CertifyConfig:
    """A whole comparison of a copy with its original."""

    original: Checkpoint
    """The dense checkpoint that the copy was made from."""
    other: Checkpoint
    """The copy."""
    data: CertifiedData
    """The population that statements are about, and the draw from it."""
    confidence: Fraction = 0.95
    """Probability with which all statements hold together."""
    quantile: Fraction = 0.95
    """Share of sequences that a bound on a quantile covers."""
    gates: CopyGates = field(default_factory=CopyGates)
    """Limits on certified bounds and on flags."""
    runtime: CertifyRuntime = field(default_factory=CertifyRuntime)
    """Where and how both networks run."""
    output: CertificateOutput = field(default_factory=CertificateOutput)
    """The directory that is written."""
