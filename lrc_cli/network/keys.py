"""What a layer's tensors are called, in checkpoints and in state dicts (docs/format.md)."""

from collections.abc import Container
from dataclasses import dataclass

WEIGHT, BIAS = "weight", "bias"
"""What a layer's tensors are called below it; its form of storage names the others."""


@dataclass(frozen=True)
class Keys:
    """The names of one layer's tensors."""

    weight: str
    """Of the dense weight, and of the inner factor that takes its place: mostly `X.weight`. A
    recurrent module's matrix is a parameter with a name of its own, such as `rnn.weight_ih_l0`."""
    named_bias: str | None = None
    """Of a bias whose name does not follow from the weight's: a tied head has the embedding's key
    for its weight."""

    @classmethod
    def of(cls, layer: str, known: Container[str]) -> "Keys":
        """Those of a layer, among the names of all tensors."""
        weight = f"{layer}.{WEIGHT}"
        return cls(layer if layer in known and weight not in known else weight)

    @property
    def layer(self) -> str:
        """The layer's name: that of its weight without `.weight`."""
        return self.weight.removesuffix(f".{WEIGHT}")

    def key(self, name: str) -> str:
        """The key of the tensor that is called `name` below the layer."""
        if name == WEIGHT:
            return self.weight
        return self.bias if name == BIAS else f"{self.layer}.{name}"

    @property
    def bias(self) -> str:
        """Of the bias: `X.bias`, and `rnn.bias_ih_l0` beside `rnn.weight_ih_l0`."""
        parent, dot, leaf = self.weight.rpartition(".")
        return self.named_bias or parent + dot + leaf.replace(WEIGHT, BIAS, 1)
