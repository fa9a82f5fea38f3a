"""A linear layer of a network: its name, shape, layout and where its tensors lie."""

from dataclasses import dataclass

import torch

from lrc_cli.checkpoint.source import Source
from lrc_cli.network.keys import Keys
from lrc_cli.network.layouts import LINEAR, Layout


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A linear layer that can be factorised: y = W x + b with W of shape (m, n)."""

    name: str
    """Module name in the running network."""
    keys: Keys
    """Names of its tensors on disk."""
    kind: str
    """Class of the dense module."""
    shape: tuple[int, int]
    """(m, n), whatever the layout on disk."""
    layout: Layout = LINEAR
    """How W lies in the weight, and rows in inputs and outputs."""
    dtype: torch.dtype
    tied_to: str | None = None
    """The embedding whose table its weight is; it is factorised with the layer."""
    unit: str
    """The block it belongs to: an entry of the outermost list of modules, or the empty string."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the dense weight as stored."""
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

    @property
    def solve_cost(self) -> float:
        """Of an eigenproblem on the small side, and products with the large one: multiplications.

        It grows with n^3.
        """
        small, large = sorted(self.shape)
        return float(small**3 * 4 + small * large * (small + large))

    def weight(self, source: Source) -> torch.Tensor:
        """The matrix W (m, n): a view of the mapped file."""
        return self.layout.matrix(source.read(self.keys.weight))

    def bias(self, source: Source) -> torch.Tensor | None:
        """The bias (m,): a view of the mapped file; None where the layer has none."""
        key = self.keys.bias
        return source.read(key) if key in source.tensors else None
