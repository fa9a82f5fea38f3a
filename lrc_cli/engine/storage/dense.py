"""A layer that stays as it is has a form of storage too."""

import torch

from lrc_cli.engine.budget.choices import Choice, Predicted
from lrc_cli.engine.problem import SolveError
from lrc_cli.engine.storage.storage import Problem, Storage, Stored
from lrc_cli.forms import DENSE, WEIGHT, Packed


class StoreDense(Storage):
    """Stores W itself: one choice, at error 0."""

    name = DENSE
    is_trainable = True

    def choices(
        self,
        shape: tuple[int, int],
        itemsize: int,
        predicted: Predicted | None = None,
        *,
        rank_multiple: int = 1,
        extra: int = 0,
    ) -> list[Choice]:
        """Returns the only choice; a layer that stays as it is gains nothing."""
        m, n = shape
        return [Choice(self.name, None, m * n * itemsize, 0.0)]

    def pack(
        self,
        problem: Problem,
        choice: Choice,
        dtype: torch.dtype,
        *,
        rank_multiple: int = 1,
    ) -> Stored:
        """Returns W in the stored dtype."""
        m, n = problem.weight.shape
        weight = problem.weight.to(dtype)
        if not weight.isfinite().all():
            raise SolveError(f"the weight does not fit {dtype}")
        packed = Packed(form=self.name, shape=(m, n), tensors={WEIGHT: weight})
        return Stored(packed=packed, errors=problem.errors(weight.double()), reason="dense")


DENSE_STORAGE = StoreDense()
