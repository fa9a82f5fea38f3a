"""The whole compressed network is trained to give the original's outputs."""

from collections.abc import Callable, Iterator
from functools import lru_cache

import torch

from lrc_cli.data.draw import Sequences, micro_batch
from lrc_cli.data.kinds import Batch
from lrc_cli.data.padding import masks_of
from lrc_cli.execution.chain import Chain
from lrc_cli.execution.divergence import divergence
from lrc_cli.execution.in_parts import InParts
from lrc_cli.execution.losses import Loss, count_tokens, drawing, prepare
from lrc_cli.execution.network import Network, reading_outputs
from lrc_cli.execution.recomputing import recomputing
from lrc_cli.runtime.processes import Processes

MICRO_BATCH_TOKENS = 1024
"""The tokens that are run at once, one sequence at least."""
STEP_TOKENS = 2048
"""The tokens between two changes of the factors, one sequence at least."""
HELD_OUT = 8
"""One sequence in so many is held out."""
MOST_HELD_OUT = 16
"""The most sequences that are held out."""
JUDGING = 0.4
"""The time of a token that is only judged, as a fraction of a token's that is trained on: two
passes forwards, beside three forwards and one backward, which takes two."""


class OutputDivergence:
    """The mean distance of the compressed network's outputs from the original's (`Objective`).

    All processes make the same calls. Each runs some of a step's micro-batches, and all get the
    summed gradients.

    Args:
        dense: the original network.
        compressed: the network with factors, some of whose parameters have gradients.
        chain: the blocks of both.
        sequences: the sequences to train on; the last ones are held out.
        loss: what the outputs are.
        seed: the seed of the order of the sequences, and of masked tokens.
        processes: the processes that share the work.
        advance: called with the number of tokens that were run.
    """

    def __init__(
        self,
        dense: Network,
        compressed: Network,
        chain: Chain,
        sequences: Sequences,
        *,
        loss: Loss,
        seed: int,
        processes: Processes,
        advance: Callable[[float], None],
    ) -> None:
        self.dense, self.compressed, self.chain, self.loss = dense, compressed, chain, loss
        self.seed, self.processes, self.advance = seed, processes, advance
        self.trained, self.kept_out = split(sequences)
        self.step_size = step_size(self.trained)
        self.size = min(self.step_size, micro_batch(sequences, MICRO_BATCH_TOKENS))
        self.parameters = [x for x in compressed.module.parameters() if x.requires_grad]

    def add_gradients(self, step: int) -> float:
        """See Objective."""
        batches = list(self._batches_of(step))
        count = sum(count_tokens(batch) for _, batch in batches)
        # A token's share of a mean has a gradient that float16 does not hold; a sum has no such.
        scale = count if self.compressed.dtype == torch.float16 else 1
        value = torch.zeros((), dtype=torch.float64)
        for index in self.processes.share(len(batches)):
            value += self._distance(*batches[index], count, scale, gradients=True)
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if scale != 1:
                parameter.grad /= scale
            self.processes.sum_to(None, parameter.grad)
        self.processes.sum_to(None, value)
        return value.item()

    def held_out(self) -> float:
        """See Objective."""
        batches = list(self.kept_out.batches(self.size))
        value = torch.zeros((), dtype=torch.float64)
        for index in self.processes.share(len(batches)):
            # The places before zero draw other masked tokens than any step.
            value += self._distance(-1 - index, batches[index], gradients=False)
        self.processes.sum_to(None, value)
        return value.item() / sum(map(count_tokens, batches))

    def _batches_of(self, step: int) -> Iterator[tuple[int, Batch]]:
        """Yields the micro-batches of a step, each with the place of its first sequence.

        The sequences come in a new order in every epoch.
        """
        number = len(self.trained)
        places = range(step * self.step_size, (step + 1) * self.step_size)
        chosen = [order_of(self.seed, place // number, number)[place % number] for place in places]
        for start in range(0, len(chosen), self.size):
            rows = torch.tensor(chosen[start : start + self.size])
            yield places[start], {name: x[rows] for name, x in self.trained.inputs.items()}

    def _distance(
        self, place: int, batch: Batch, count: int = 1, scale: int = 1, *, gradients: bool
    ) -> torch.Tensor:
        """Returns the summed distance on a micro-batch divided by `count`, in float64.

        With `gradients`, `scale` times the gradients by the trained parameters are added to them.
        """
        inputs, labels = prepare(self.loss, batch, drawing(self.seed, place))
        total = torch.zeros((), dtype=torch.float64)
        with torch.no_grad():
            dense = InParts(self.dense, self.chain, inputs)
        with torch.set_grad_enabled(gradients), recomputing(self.compressed, self.chain):
            compressed = InParts(self.compressed, self.chain, inputs)
            for part in compressed.parts:
                with torch.no_grad():
                    wanted = dense.outputs(part)
                outputs, masks = compressed.outputs(part), masks_of(part.cut(inputs))
                own = None if labels is None else part.of(labels)
                with reading_outputs(self.compressed):
                    found = divergence(self.loss, wanted, outputs, own, masks) / count
                    if gradients and not found.requires_grad:
                        raise ValueError("they have no gradient")
                total += found.detach().double().cpu()
                if gradients:
                    (found * scale).backward()
                    compressed.collect()
            compressed.backward()
        cost = 1.0 if gradients else JUDGING
        self.advance(cost * count_tokens(batch) * self.processes.size)
        return total


def split(sequences: Sequences) -> tuple[Sequences, Sequences]:
    """Returns the sequences to train on, and the last ones, which are held out: one at least.

    No sequence to train on equals one that is held out.
    """
    held_out = max(1, min(len(sequences) // HELD_OUT, MOST_HELD_OUT))
    trained, kept_out = sequences.split(len(sequences) - held_out)
    return trained.apart_from([kept_out]), kept_out


def step_size(trained: Sequences) -> int:
    """Returns the number of sequences in a step."""
    return min(micro_batch(trained, STEP_TOKENS), len(trained))


def step_tokens(trained: Sequences) -> float:
    """Returns the number of tokens in a step, on average."""
    return step_size(trained) * trained.num_tokens / len(trained)


@lru_cache(maxsize=2)
def order_of(seed: int, epoch: int, number: int) -> list[int]:
    """Returns the order of the sequences in an epoch."""
    order: list[int] = torch.randperm(number, generator=drawing(seed, -1 - epoch)).tolist()
    return order
