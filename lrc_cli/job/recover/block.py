"""A window of the compressed network is trained to give what the original's window gives.

The window's input is what the compressed network gives it, with all windows before it trained. The
original's output on the original's input is matched, so a window also makes up for the errors of
the windows before it.
"""

from collections.abc import Callable, Mapping, Sequence

import torch

from lrc_cli.data.padding import masks_of, unpadded
from lrc_cli.execution.network import reading_outputs
from lrc_cli.execution.precision import recast_in_backward
from lrc_cli.execution.walk import Walk
from lrc_cli.job.recover.model import order_of
from lrc_cli.job.recover.windows import Window
from lrc_cli.runtime.processes import Processes


class WindowDistance:
    """The squared error of a window's output, relative to the output's square (`Objective`).

    Padding counts in neither. All processes make the same calls. Each runs some of a step's
    micro-batches, and all get the summed gradients.

    Args:
        walk: the compressed network, which has come to the window, over all micro-batches.
        wanted: the original's outputs of the window, by micro-batch.
        num_trained: how many of the first micro-batches are trained on; the others are held out.
        in_step: the micro-batches in a step.
        parameters: what is trained.
        advance: called with the number of sequences that ran, and whether with gradients.
    """

    def __init__(
        self,
        walk: Walk,
        window: Window,
        wanted: Mapping[int, torch.Tensor],
        parameters: Sequence[torch.nn.Parameter],
        *,
        num_trained: int,
        in_step: int,
        seed: int,
        processes: Processes,
        advance: Callable[[int, bool], None],
    ) -> None:
        self.walk, self.window, self.wanted, self.parameters = walk, window, wanted, parameters
        self.num_trained, self.in_step, self.seed = num_trained, in_step, seed
        self.processes, self.advance = processes, advance
        real = [self._real(index, wanted[index]) for index in range(len(wanted))]
        self.squares = [x.double().square().sum().item() for x in real]
        self.counts = [x.numel() for x in real]

    def add_gradients(self, step: int) -> float:
        """See Objective."""
        places = range(step * self.in_step, (step + 1) * self.in_step)
        number = self.num_trained
        chosen = [order_of(self.seed, x // number, number)[x % number] for x in places]
        mean_square = sum(self.squares[:number]) / sum(self.counts[:number])
        mean_square = mean_square or 1.0
        total = mean_square * sum(self.counts[index] for index in chosen)
        # A number's share of a mean has a gradient that float16 does not hold.
        is_half = self.walk.network.dtype == torch.float16
        scale = total / mean_square / self.wanted[chosen[0]].shape[-1] if is_half else 1.0
        value = torch.zeros((), dtype=torch.float64)
        for place in self.processes.share(len(chosen)):
            with recast_in_backward(self.walk.network.casts):
                mean = self._distance(chosen[place], gradients=True) / total
            if mean.requires_grad:  # a micro-batch may reach none of a network's experts
                (mean * scale).backward()
            value += mean.detach().double().cpu()
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if is_half:
                parameter.grad /= scale
            self.processes.sum_to(None, parameter.grad)
        self.processes.sum_to(None, value)
        return value.item()

    def held_out(self) -> float:
        """See Objective."""
        held_out = range(self.num_trained, len(self.wanted))
        value = torch.zeros((), dtype=torch.float64)
        for place in self.processes.share(len(held_out)):
            value += self._distance(held_out[place], gradients=False).double().cpu()
        self.processes.sum_to(None, value)
        return value.item() / (sum(self.squares[self.num_trained :]) or 1.0)

    def _distance(self, index: int, *, gradients: bool) -> torch.Tensor:
        """Returns the summed squared error on a micro-batch, a scalar in float32."""
        hidden: torch.Tensor | None = None
        for segment in self.window.segments:
            hidden = self.walk.run(segment, index, hidden, gradients=gradients)
        assert hidden is not None
        with torch.set_grad_enabled(gradients), reading_outputs(self.walk.network):
            wanted = self.wanted[index].to(hidden.device)
            found = self._real(index, hidden.float() - wanted.float()).square().sum()
        self.advance(len(next(iter(self.walk.batches[index].values()))), gradients)
        return found

    def _real(self, index: int, tensor: torch.Tensor) -> torch.Tensor:
        return unpadded(tensor, masks_of(self.walk.batches[index]))
