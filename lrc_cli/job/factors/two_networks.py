"""The dense and the compressed network walk through the calibration data side by side.

The compressed network is the checkpoint opened again, with parameters that are views of the same
files. A layer becomes low-rank in it as soon as the layer has factors.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from lrc_cli.data.draw import Batch
from lrc_cli.data.padding import masks_of, unpadded
from lrc_cli.engine import Drift
from lrc_cli.errors import RunError
from lrc_cli.execution.chain import Chain, Segment
from lrc_cli.execution.hooks import around_calls
from lrc_cli.execution.network import Network, StopForward, make_network
from lrc_cli.execution.precision import DTYPES, cast_on_read
from lrc_cli.execution.walk import Keep, Pair, Walk
from lrc_cli.forms import DENSE, FORMS
from lrc_cli.job.plan import Plan
from lrc_cli.job.statistics.moments import GramSum
from lrc_cli.job.work import Tensors
from lrc_cli.network.experts import is_expert
from lrc_cli.network.keys import BIAS
from lrc_cli.network.layer import Layer
from lrc_cli.network.layouts import table_layout
from lrc_cli.network.low_rank.slots import stored_module
from lrc_cli.network.low_rank.stored import replace_modules
from lrc_cli.network.low_rank.tied import TiedHead
from lrc_cli.network.norms import norms_by_key
from lrc_cli.network.opening import open_module
from lrc_cli.network.parts import part_of
from lrc_cli.report.record import LayerFacts
from lrc_cli.runtime.processes import Processes


class DriftSum:
    """The sums behind a `Drift`, as data streams by: products in float32, sums in float64."""

    def __init__(self, width: int, device: torch.device, *, center: bool) -> None:
        self.compressed, self.drift = (GramSum(width, device, center=center) for _ in range(2))
        self.cross = torch.zeros_like(self.compressed.total)
        self._center = center

    def add(self, x: torch.Tensor, compressed: torch.Tensor) -> None:
        """Adds the inputs (t, n) of the same tokens in the dense and in the compressed network."""
        compressed = compressed.float()
        drift, read = self.drift.add(x.float() - compressed), self.compressed.add(compressed)
        self.cross += drift.times(read).to(self.cross.device)
        drift.correct(self.cross, read)

    def sum_over(self, processes: Processes) -> None:
        """Sums over all processes. Every process gets the sum."""
        own = self.num_tokens
        drift, read = (x.sum_to(None, processes) for x in (self.drift, self.compressed))
        if drift is not None and read is not None:
            self.cross.addr_(drift, read, alpha=own)
        processes.sum_to(None, self.cross)

    @property
    def is_finite(self) -> bool:
        """Whether all inputs were finite, in both networks."""
        diagonals = self.compressed.total.diagonal(), self.drift.total.diagonal()
        return all(bool(torch.isfinite(diagonal.sum())) for diagonal in diagonals)

    @property
    def num_tokens(self) -> int:
        """The number of tokens that were added."""
        return self.compressed.num_rows

    def mean(self) -> Drift:
        """Returns the moments per token, around the means if the object was made with `center`."""
        num_tokens = self.num_tokens
        mean = self.compressed.mean_row() if self._center else None
        return Drift(
            compressed=self.compressed.mean(),
            cross=self.cross / num_tokens,
            drift=self.drift.mean(),
            mean=None if mean is None else mean + self.drift.mean_row(),
            mean_compressed=mean,
            num_tokens=num_tokens,
        )


Hold = Callable[[Tensors], Tensors]


def _cloned(tensors: Tensors) -> Tensors:
    return {name: tensor.clone() for name, tensor in tensors.items()}


class TwoNetworks(Pair):
    """The dense and the compressed network, which run over the same micro-batches.

    Args:
        chain: the blocks of the network.
        batches: this process's micro-batches of model inputs.
        num_held_back: how many of the last micro-batches nothing is fitted to.
        keep: where hidden states stay between segments; see `HostMemory.keep`.
        hold: where a layer's factors stay; see `HostMemory.hold`.
    """

    def __init__(
        self,
        plan: Plan,
        chain: Chain,
        batches: Sequence[Batch],
        num_held_back: int = 0,
        keep: Keep = torch.Tensor.detach,
        hold: Hold = _cloned,
    ) -> None:
        network, self.norms = _open_again(plan)
        super().__init__(plan.network, network, chain, batches, keep)
        self.plan, self.batches, self.hold = plan, batches, hold
        self.num_fitted = len(batches) - num_held_back

    def install(self, layer: Layer, tensors: Tensors, facts: LayerFacts) -> None:
        """Puts a layer, as stored, into the compressed network. A dense layer stays as it is.

        Args:
            tensors: the stored tensors, by disk name.
            facts: the facts of the layer, with its form and the form's parameters.
        """
        form = FORMS[facts.storage]
        if form.name == DENSE:
            return
        keys = {name: layer.keys.key(name) for name in (*form.tensors, BIAS)}
        own = {name: tensors[key] for name, key in keys.items() if key in tensors}
        # Copies are made because the rounding of a matrix product may depend on where in memory a
        # tensor begins. A resumed run reads from a file what this run computed.
        own = self.hold(own)
        bias = layer.bias(self.plan.source)
        if bias is not None and BIAS not in own:
            own[BIAS] = bias.to(DTYPES.get(self.plan.config.output.dtype, bias.dtype))
        network = self.compressed.network
        replaced = part_of(network.module, layer.name)
        new: dict[nn.Module, nn.Module] = {}
        if layer.tied_to is None:
            new[replaced] = stored_module(replaced, own, layer.layout, layer.shape, facts.stated)
        else:
            bias, table = own.pop(BIAS, None), part_of(network.module, layer.tied_to)
            layout = table_layout(table)
            assert layout is not None, layer.tied_to
            new[table] = factors = stored_module(table, own, layout, layer.shape, facts.stated)
            new[replaced] = TiedHead(factors, None if bias is None else nn.Parameter(bias))
        for part in new.values():
            network.placement.adopt(part.requires_grad_(False), layer.name)
            cast_on_read(part, network.dtype, network.casts)
        replace_modules(network.module, new)

    def drift(
        self, segment: Segment, layer: Layer, step: Callable[[], None]
    ) -> tuple[Drift, Drift | None] | None:
        """Measures the moments of a layer's inputs in both networks, over all processes' data.

        Args:
            segment: the segment that both networks have come to, in which the layer first runs.
            step: called after every micro-batch.

        Returns:
            The moments over the micro-batches to fit to, and over the micro-batches held back (None
            where no token is held back). The result is None where the networks themselves choose
            which tokens go through the layer.

        Raises:
            RunError: an input is NaN or infinite.
        """
        if is_expert(self.plan.network.module, layer.name):
            return None
        center = self.plan.config.compression.center
        fitted, held = (DriftSum(layer.shape[1], self.plan.device, center=center) for _ in range(2))
        # The numbers of tokens per sequence tell who chooses them: the data's shape gives one
        # number, a router several. None stands for inputs that cannot be compared.
        counts: set[float | None] = set()
        for index, batch in enumerate(self.batches):
            pair = [input_of(walk, segment, index, layer) for walk in (self.dense, self.compressed)]
            x, compressed = pair
            if x is None or compressed is None or x.shape != compressed.shape:
                counts.add(None)
                break
            counts.add(x[..., 0].numel() / len(next(iter(batch.values()))))
            if len(counts) > 1:
                break
            masks = masks_of(batch)
            sums = fitted if index < self.num_fitted else held
            sums.add(*(unpadded(t, masks).reshape(-1, t.shape[-1]) for t in (x, compressed)))
            step()
        everywhere = set().union(*self.plan.processes.gather(counts))
        if None in everywhere or len(everywhere) > 1:
            return None
        for sums in (fitted, held):
            sums.sum_over(self.plan.processes)
        if not (fitted.is_finite and held.is_finite):
            raise RunError(
                f"{layer.name}: NaN or infinity in its inputs on the calibration data, once the"
                " layers before it are compressed",
                "set runtime.dtype: float32, or compression.sequential: false",
            )
        if not fitted.num_tokens:
            return None
        return fitted.mean(), held.mean() if held.num_tokens else None

    def advance(self, segment: Segment) -> None:
        """Takes both networks through a segment."""
        self.dense.advance(segment)
        self.compressed.advance(segment)


def input_of(walk: Walk, segment: Segment, index: int, layer: Layer) -> torch.Tensor | None:
    """Returns what a layer reads when it first runs. The segment runs no further.

    Args:
        index: the number of the micro-batch.

    Returns:
        Rows (..., n), or None where the layer is not reached.
    """
    seen: list[torch.Tensor] = []

    def look(_: str, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> None:
        seen.append([*args, *kwargs.values()][0])
        raise StopForward

    with around_calls(walk.network.module, [layer.name], before=look):
        walk.run(segment, index)
    return layer.layout.inputs(seen[0]) if seen else None


def _open_again(plan: Plan) -> tuple[Network, dict[str, str]]:
    """Opens the checkpoint as a second network and rounds its tensors as they will be written.

    Returns:
        The network; and {disk key: name of the parameter} of its norms, if they are trained.
    """
    model, recover = plan.config.model, plan.config.recover
    module, _ = open_module(
        plan.source, factory=model.factory, trust_remote_code=model.trust_remote_code
    )
    written = DTYPES.get(plan.config.output.dtype)
    for tensor in module.state_dict(keep_vars=True).values():
        if written is not None and tensor.is_floating_point():
            tensor.data = tensor.data.to(written)
    trained = recover.is_used and recover.norms
    norms = norms_by_key(module, plan.source.tensors) if trained else {}
    return make_network(module, device=plan.device, dtype=plan.network.dtype), norms
