"""What measurements of quality are in report.json: scores and the worst case."""

from dataclasses import dataclass, field

from lrc_cli.runtime.json_records import ABSENT, INLINE, JsonRecord


@dataclass(frozen=True, kw_only=True)
class Scores(JsonRecord):
    """Both networks on the same sequences. A figure is absent where the network has none."""

    num_sequences: int
    """How many sequences were run."""
    num_scored: int
    """Positions that were scored; for networks without a likelihood the output's positions."""
    relative_output_error: float | None = field(default=None, metadata=ABSENT)
    """||f~(x) - f(x)|| / ||f(x)|| over the first output; absent where tokens are scored."""
    scored: str | None = field(default=None, metadata=ABSENT)
    """The loss in words; absent, as are the next four, where no token has a likelihood."""
    loss_before: float | None = field(default=None, metadata=ABSENT)
    """Mean loss of the dense network, nats per scored token."""
    loss_after: float | None = field(default=None, metadata=ABSENT)
    """Mean loss of the compressed network, nats per scored token."""
    perplexity_before: float | None = field(default=None, metadata=ABSENT)
    """exp(loss_before); infinite where a float cannot hold it."""
    perplexity_after: float | None = field(default=None, metadata=ABSENT)
    """exp(loss_after); infinite where a float cannot hold it."""
    kl: float | None = field(default=None, metadata=ABSENT)
    """KL divergence of the predictions, dense to compressed, nats; absent without predictions."""
    top1_agreement: float | None = field(default=None, metadata=ABSENT)
    """Share of predictions with the same most likely outcome; absent without predictions."""

    @property
    def loss_increase(self) -> float | None:
        """loss_after - loss_before, nats per scored token; None where there is no loss."""
        if self.loss_before is None or self.loss_after is None:
            return None
        return self.loss_after - self.loss_before


@dataclass(frozen=True, kw_only=True)
class QualityRow(JsonRecord):
    """The quality on one evaluation text."""

    text: str
    """The name of the text."""
    scores: Scores = field(metadata=INLINE)
    """What was measured on it."""
    population: int | None = field(default=None, metadata=ABSENT)
    """How many sequences the text has; absent in scores of `lrc eval`."""
    sha256: str
    """sha256 of the sequences that were drawn, in hexadecimal."""


@dataclass(frozen=True, kw_only=True)
class OwnError(JsonRecord):
    """One linear layer in the worst-case bound."""

    error: float
    """The layer's own largest error on one input, 2-norm."""
    amplification: float
    """The factor by which that error may grow up to the output."""


@dataclass(frozen=True, kw_only=True)
class WorstCase(JsonRecord):
    """The worst-case bound of a plain feed-forward network (docs/theory.md, C3)."""

    label: str
    """What the bound is called."""
    inputs: str
    """The purpose whose inputs are bounded."""
    num_inputs: int
    """How many inputs these are."""
    bound: float
    """The largest ||f~(x) - f(x)||_2 over the inputs that the layers' norms allow."""
    measured: float
    """The largest ||f~(x) - f(x)||_2 over the inputs that was found."""
    output_norm: float
    """The largest ||f(x)||_2 over the inputs."""
    layers: tuple[OwnError, ...]
    """Every linear layer, in the order in which they run."""
