"""Measurements of quality have this form in report.json: scores and the worst case."""

from dataclasses import dataclass, field

from lrc_cli.runtime.json_records import ABSENT, INLINE, JsonRecord


@dataclass(frozen=True, kw_only=True)
class Scores(JsonRecord):
    """Holds figures of both networks on the same sequences.

    A figure is absent where the network has none.
    """

    num_sequences: int
    """The number of sequences that were run."""
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
    """Holds the quality on one evaluation text."""

    text: str
    """The name of the text."""
    scores: Scores = field(metadata=INLINE)
    """The figures that were measured on it."""
    population: int | None = field(default=None, metadata=ABSENT)
    """The number of sequences in the text; absent in scores of `lrc eval`."""
    one_in: int | None = field(default=None, metadata=ABSENT)
    """One passage of the text in so many was read; absent where the whole text was."""
    sha256: str
    """sha256 of the sequences that were drawn, in hexadecimal."""


@dataclass(frozen=True, kw_only=True)
class OwnError(JsonRecord):
    """Holds one linear layer's part in the worst-case bound."""

    error: float
    """The layer's own largest error on one input, 2-norm."""
    amplification: float
    """The factor by which that error may grow up to the output."""


@dataclass(frozen=True, kw_only=True)
class WorstCase(JsonRecord):
    """Holds the worst-case bound of a plain feed-forward network (docs/theory.md, C3)."""

    label: str
    """The name of the bound."""
    inputs: str
    """The purpose whose inputs are bounded."""
    num_inputs: int
    """The number of these inputs."""
    bound: float
    """The largest ||f~(x) - f(x)||_2 over the inputs that the layers' norms allow."""
    measured: float
    """The largest ||f~(x) - f(x)||_2 over the inputs that was found."""
    output_norm: float
    """The largest ||f(x)||_2 over the inputs."""
    layers: tuple[OwnError, ...]
    """Every linear layer, in the order in which they run."""
