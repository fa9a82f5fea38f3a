"""Fused experts in the output stay whole, or are written apart where a matrix is factorised."""

from collections.abc import Iterator

import torch

from lrc_cli.checkpoint.fused import MARK_DTYPE, NO_RANK
from lrc_cli.checkpoint.headers import FLOAT_DTYPES
from lrc_cli.checkpoint.writer import Entry
from lrc_cli.execution.precision import DTYPES
from lrc_cli.job.factors.fit import read_facts
from lrc_cli.job.plan import Plan
from lrc_cli.job.work import WorkDirectory


class ExpertsApart:
    """The fused experts that are written apart, because some of their matrices are factorised."""

    def __init__(self, plan: Plan, work: WorkDirectory, folder: str) -> None:
        self.source, self.dtype = plan.source, DTYPES.get(plan.config.output.dtype)
        self.ranks: dict[str, int] = {}
        """{key of a factorised matrix: its rank}."""
        for unit, layers in plan.units.items():
            facts = read_facts(work, folder, unit)
            for layer in layers:
                fact, key = facts[layer.name], layer.keys.weight
                if key in plan.source.parts and not fact.is_dense:
                    self.ranks[key] = NO_RANK if fact.rank is None else fact.rank
        self.experts = {self._experts(key) for key in self.ranks}

    def _experts(self, key: str) -> str:
        return self.source.fused[self.source.parts[key][0]].experts

    def is_apart(self, key: str) -> bool:
        """Returns whether a part of a fused tensor is written as a tensor of its own."""
        return self._experts(key) in self.experts

    def whole_before(self, key: str) -> Iterator[Entry]:
        """Yields what is written under a fused tensor's own key, when its first part comes."""
        whole, index = self.source.parts[key]
        fused, info = self.source.fused[whole], self.source.weights.tensors[whole]
        if index:
            return
        if not self.is_apart(key):
            is_cast = self.dtype is not None and info.dtype in FLOAT_DTYPES
            dtype = self.dtype if is_cast and self.dtype is not None else info.dtype

            def read() -> torch.Tensor:
                return self.source.weights.read(whole).to(dtype)

            yield Entry(key=whole, shape=info.shape, dtype=dtype, read=read)
        elif fused.has_mark:
            ranks = [self.ranks.get(part, 0) for part in fused.keys(info.shape[0])]
            mark = torch.tensor(ranks, dtype=MARK_DTYPE)
            yield Entry(key=whole, shape=(len(ranks),), dtype=MARK_DTYPE, read=lambda: mark)
