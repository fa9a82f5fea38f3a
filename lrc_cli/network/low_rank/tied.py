"""A tied head and a second embedding use the stored tensors of another embedding in these modules.

State dicts have the tensors once, under the embedding's name.
"""

from torch import Tensor, nn

from lrc_cli.network.embeddings import Scale, new_embedding
from lrc_cli.network.low_rank.stored import StoredLayer


class Tied(nn.Module):
    """The base class of a tied head and of a second embedding with the same table.

    Args:
        table: the embedding that is not stored densely.
    """

    def __init__(self, table: StoredLayer) -> None:
        super().__init__()
        self.share(table)

    @property
    def table(self) -> StoredLayer:
        """The embedding that is not stored densely."""
        return self._table[0]

    def share(self, table: StoredLayer) -> None:
        """Uses another table from now on; the table does not become a part of this module."""
        self._table = (table,)

    def dense(self, table: nn.Module) -> nn.Module:
        """Returns the dense module, with the weight of the dense table."""
        raise NotImplementedError


class TiedHead(Tied):
    """A head that computes y = Z x + b with an embedding's table Z (m, n).

    Args:
        table: the embedding that is not stored densely.
        bias: the head's bias (m,), or None.
    """

    def __init__(self, table: StoredLayer, bias: nn.Parameter | None) -> None:
        super().__init__(table)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """Maps inputs (..., n) to outputs (..., m)."""
        y = self.table.product(x)
        return y if self.bias is None else y + self.bias

    def dense(self, table: nn.Module) -> nn.Module:
        """Returns the dense head, with the weight of the dense table."""
        m, n = self.table.shape
        dense = nn.Linear(n, m, bias=self.bias is not None, device="meta")
        dense.weight = table.get_parameter("weight")
        if self.bias is not None:
            dense.bias = self.bias
        return dense.train(self.training)


class TiedEmbedding(Tied):
    """A second embedding with the same table.

    Args:
        table: the embedding that is not stored densely.
        scale: the scale of the second embedding.
    """

    def __init__(self, table: StoredLayer, scale: Scale) -> None:
        super().__init__(table)
        self.scale = scale

    @property
    def num_embeddings(self) -> int:
        """The rows of the table."""
        m, n = self.table.shape
        return m if self.table.layout.picks_rows else n

    @property
    def weight(self) -> Tensor:
        """The weight of the table; some models read the dtype or the device of a weight."""
        weight = self.table.weight
        assert isinstance(weight, Tensor)
        return weight

    def forward(self, numbers: Tensor) -> Tensor:
        """Maps numbers (...) to vectors."""
        table = self.table
        return self.scale(
            table.rows(numbers) if table.layout.picks_rows else table.product(numbers)
        )

    def dense(self, table: nn.Module) -> nn.Module:
        """Returns the dense embedding, with the weight of the dense table."""
        weight = table.get_parameter("weight")
        num, width = weight.shape
        dense = new_embedding(num, width, self.scale, device="meta")
        dense.weight = weight
        return dense.train(self.training)
