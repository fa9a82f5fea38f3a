"""A `Layer` describes a linear layer of a network: its name, shape, layout and keys on disk."""

from dataclasses import dataclass

import torch

from lrc_cli.checkpoint.source import Source
from lrc_cli.network.keys import Keys
from lrc_cli.network.layouts import LINEAR, Layout


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A linear layer that can be factorised: y = W x + b with W of shape (m, n)."""

    name: str
    """The module's name in the running network."""
    keys: Keys
    """The keys of the layer's tensors on disk."""
    kind: str
    """The class of the dense module."""
    shape: tuple[int, int]
    """(m, n), for any layout on disk."""
    layout: Layout = LINEAR
    """How W lies in the weight, and rows in inputs and outputs."""
    dtype: torch.dtype
    tied_to: str | None = None
    """The embedding whose table is the layer's weight; both are factorised together."""
    unit: str
    """The block of the layer: an entry of the outermost list of modules, or the empty string."""

    @property
    def num_bytes(self) -> int:
        """The bytes of the dense weight in the files."""
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

    @property
    def solve_cost(self) -> float:
        """The number of multiplications of a solve; for a square layer it grows with n^3.

        A solve is an eigenproblem on the small side, and products with the large side.
        """
        small, large = sorted(self.shape)
        return float(small**3 * 4 + small * large * (small + large))

    def weight(self, source: Source) -> torch.Tensor:
        """Reads the matrix W (m, n), as a view of the mapped file."""
        return self.layout.matrix(source.read(self.keys.weight))

    def bias(self, source: Source) -> torch.Tensor | None:
        """Reads the bias (m,), as a view of the mapped file; None where the layer has no bias."""
        key = self.keys.bias
        return source.read(key) if key in source.tensors else None
