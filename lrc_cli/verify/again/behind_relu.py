"""The errors of a layer behind the ReLU that follows it are summed over tokens here."""

from dataclasses import dataclass

from torch import Tensor

from lrc_cli.verify.again.magnitudes import energy, product


@dataclass(kw_only=True)
class Behind:
    """Sums ||relu(W x + b) - relu(M x + c)||^2 over tokens for several (M, c).

    Products are in float32 where they fit; their squares are summed in float64.
    """

    bias: Tensor
    """b (m,) float32; zeros where the layer has none."""
    new_bias: Tensor
    """The written bias (m,) float32."""
    leading: Tensor
    """(k, r) float32: W's leading singular vectors of its smaller side, for plain SVD."""
    num_tokens: int = 0
    stored: float = 0.0
    """The sum for Z and the new bias."""
    old_bias: float = 0.0
    """The sum for Z and b."""
    svd: float = 0.0
    """The sum for plain SVD at the rank of Z, and b."""
    total: float = 0.0
    """The sum for outputs that are all dead."""

    def add(self, rows: Tensor, weight: Tensor, difference: Tensor) -> None:
        """Adds inputs (t, n) of a layer with W and W - Z (m, n)."""
        outputs = product(rows, weight)
        fitted, wanted = outputs - product(rows, difference), (outputs + self.bias).relu()
        leading = self.leading.to(outputs)
        if len(weight) <= len(weight.T):
            simple = outputs @ leading @ leading.T
        else:
            simple = rows.to(outputs) @ leading @ (weight.to(outputs) @ leading).T
        self.stored += energy(wanted - (fitted + self.new_bias).relu())
        self.old_bias += energy(wanted - (fitted + self.bias).relu())
        self.svd += energy(wanted - (simple + self.bias).relu())
        self.total += energy(wanted)
        self.num_tokens += len(rows)

    def metric(self) -> dict[str, float]:
        """Returns squared errors per token; none has a provable optimum."""
        sums = {"stored": self.stored, "svd": self.svd, "total": self.total}
        return {name: value / max(self.num_tokens, 1) for name, value in sums.items()}
