"""The errors of a layer behind the ReLU that follows it, summed over tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(kw_only=True)
class Behind:
    """Sums over tokens of ||relu(W x + b) - relu(M x + c)||^2 for several (M, c); float32 products,
    their squares summed in float64."""

    weight: Tensor
    """W (m, n) float32."""
    bias: Tensor
    """b (m,) float32; zeros where the layer has none."""
    fitted: Tensor
    """Z (m, n) float32, from the written tensors."""
    new_bias: Tensor
    """The written bias (m,) float32."""
    simple: Tensor
    """Plain SVD of W at the rank of Z, (m, n) float32; it keeps b."""
    num_tokens: int = 0
    stored: float = 0.0
    """Of (Z, new bias)."""
    old_bias: float = 0.0
    """Of (Z, b)."""
    svd: float = 0.0
    """Of (plain SVD, b)."""
    total: float = 0.0
    """Of outputs that are all dead."""

    def add(self, rows: Tensor) -> None:
        """Add inputs (t, n) float32."""
        wanted = (rows @ self.weight.T + self.bias).relu_()
        fitted = rows @ self.fitted.T
        self.stored += _squares(wanted - (fitted + self.new_bias).relu_())
        self.old_bias += _squares(wanted - fitted.add_(self.bias).relu_())
        self.svd += _squares(wanted - (rows @ self.simple.T + self.bias).relu_())
        self.total += _squares(wanted)
        self.num_tokens += len(rows)

    def metric(self) -> dict[str, float]:
        """Squared errors per token; none has a provable optimum."""
        sums = {"stored": self.stored, "svd": self.svd, "total": self.total}
        return {name: value / max(self.num_tokens, 1) for name, value in sums.items()}


def _squares(rows: Tensor) -> float:
    return torch.linalg.vector_norm(rows, dim=1).double().square().sum().item()
