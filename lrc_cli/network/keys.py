"""This module names a layer's tensors, in checkpoints and in state dicts (docs/format.md)."""

from collections.abc import Container
from dataclasses import dataclass

WEIGHT, BIAS = "weight", "bias"
"""The names of a layer's tensors below the layer; its form of storage names the others."""


@dataclass(frozen=True)
class Keys:
    """The keys of one layer's tensors."""

    weight: str
    """The key of the dense weight, and of the inner factor in its place: mostly `X.weight`. A
    recurrent module's matrix is a parameter with another name, such as `rnn.weight_ih_l0`."""
    named_bias: str | None = None
    """The key of a bias whose name does not follow from the weight's key: a tied head's weight has
    the embedding's key."""

    @classmethod
    def of(cls, layer: str, known: Container[str]) -> "Keys":
        """Returns the keys of a layer, among the names of all tensors."""
        weight = f"{layer}.{WEIGHT}"
        return cls(layer if layer in known and weight not in known else weight)

    @property
    def layer(self) -> str:
        """The layer's name on disk: the weight's key without `.weight`."""
        return self.weight.removesuffix(f".{WEIGHT}")

    def key(self, name: str) -> str:
        """Returns the key of the tensor that is called `name` below the layer."""
        if name == WEIGHT:
            return self.weight
        return self.bias if name == BIAS else f"{self.layer}.{name}"

    @property
    def bias(self) -> str:
        """The key of the bias: `X.bias`, and `rnn.bias_ih_l0` beside `rnn.weight_ih_l0`."""
        parent, dot, leaf = self.weight.rpartition(".")
        return self.named_bias or parent + dot + leaf.replace(WEIGHT, BIAS, 1)
