"""This module turns LSTM and GRU into linear layers with a recurrence around the layers.

torch keeps all matrices as parameters of one module. Each matrix is factorised alone: matrices on
inputs are fitted to x_t, matrices on hidden states to h_(t-1). So a module takes the place of
torch's module that computes the same step by step, and whose matrices are layers. State dicts keep
torch's names.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from lrc_cli.network.keys import BIAS, WEIGHT, Keys
from lrc_cli.network.low_rank.stored import replace_modules

State = tuple[Tensor, ...]
"""The states of a layer: (h, c) in an LSTM, (h,) in a GRU."""


class RecurrentMatrix(nn.Linear):
    """A matrix of a recurrent module, such as `weight_ih_l0`, with its bias."""


def _lstm(given: Tensor, recalled: Tensor, h: Tensor, c: Tensor) -> State:
    """Makes a step from the products of the input and of h with their matrices, (b, 4 hidden)."""
    i, f, g, o = (given + recalled).chunk(4, dim=-1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru(given: Tensor, recalled: Tensor, h: Tensor) -> State:
    """Makes a step from the products of the input and of h with their matrices, (b, 3 hidden)."""
    r, z, n = given.chunk(3, dim=-1)
    from_r, from_z, from_n = recalled.chunk(3, dim=-1)
    z = (z + from_z).sigmoid()
    n = (n + (r + from_r).sigmoid() * from_n).tanh()
    return ((1 - z) * n + z * h,)


STEPS: dict[type[nn.Module], Callable[..., State]] = {nn.LSTM: _lstm, nn.GRU: _gru}


class Recurrent(nn.Module):
    """A module that computes what `nn.LSTM` or `nn.GRU` does, and whose matrices are layers.

    Arguments and results are the same as torch's. Products with the inputs are computed for all
    steps at once.

    Args:
        dense: torch's module; its parameters are shared.
    """

    real: Tensor | None = None
    """(batch, steps), true where a step is not padding; set by `observed`."""

    def __init__(self, dense: nn.RNNBase) -> None:
        super().__init__()
        self.input_size, self.hidden_size = dense.input_size, dense.hidden_size
        self.num_layers, self.bidirectional = dense.num_layers, dense.bidirectional
        self.batch_first, self.dropout = dense.batch_first, dense.dropout
        self._step, self._num_states = STEPS[type(dense)], 2 if isinstance(dense, nn.LSTM) else 1
        for name, weight in dense._parameters.items():
            if weight is not None and name.startswith(WEIGHT):
                self.add_module(name, _matrix(weight, dense._parameters.get(Keys(name).bias)))
        self.register_state_dict_post_hook(_to_torch_names)
        self.register_load_state_dict_pre_hook(_from_torch_names)
        self.train(dense.training)

    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> tuple[Any, Any]:
        """Returns the last layer's outputs and the states after the last step, as torch does.

        Args:
            input: (batch, steps, n) with `batch_first`, else (steps, batch, n), (steps, n) without
                a batch, or packed sequences.
            hx: the states before the first step; None: zeros.
        """
        states = (hx,) if isinstance(hx, Tensor) else hx
        output: Tensor | PackedSequence
        if isinstance(input, PackedSequence):
            output, after = self._packed(input, states)
        elif input.ndim == 2:
            states = states and tuple(state.unsqueeze(1) for state in states)
            alone, after = self._padded(input[None], states)
            output, after = alone[0], tuple(state.squeeze(1) for state in after)
        elif self.batch_first:
            output, after = self._padded(input, states)
        else:
            y, after = self._padded(input.transpose(0, 1), states)
            output = y.transpose(0, 1)
        return output, after if len(after) > 1 else after[0]

    def _padded(self, x: Tensor, states: State | None) -> tuple[Tensor, State]:
        """Runs sequences x (batch, steps, n)."""
        real = self.real if self.real is not None and self.real.shape == x.shape[:2] else None
        return self._run(
            x,
            states,
            len(x),
            split=lambda y: y.unbind(1),
            join=lambda y: torch.stack(y, dim=1),
            real=None if real is None else real.unbind(1),
        )

    def _packed(self, packed: PackedSequence, states: State | None) -> tuple[PackedSequence, State]:
        """Runs packed sequences, the longest first: each step has rows for the first so many."""
        sizes, order, back = packed.batch_sizes.tolist(), packed[2], packed[3]
        if sizes[0] == sizes[-1]:
            # Sequences of one length run in the batch's order, so hooks know whose a row is.
            x, _ = pad_packed_sequence(packed, batch_first=True)
            y, states = self._padded(x, states)
            rows = (y if order is None else y.index_select(0, order)).transpose(0, 1).flatten(0, 1)
            return PackedSequence(rows, *packed[1:]), states
        if states is not None and order is not None:
            states = tuple(state.index_select(1, order) for state in states)
        rows, states = self._run(
            packed.data, states, sizes[0], split=lambda y: y.split(sizes), join=torch.cat
        )
        if back is not None:
            states = tuple(state.index_select(1, back) for state in states)
        return PackedSequence(rows, *packed[1:]), states

    def _run(
        self,
        x: Tensor,
        states: State | None,
        batch: int,
        *,
        split: Callable[[Tensor], Sequence[Tensor]],
        join: Callable[[list[Tensor]], Tensor],
        real: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, State]:
        """Runs all layers, in both directions.

        Args:
            x: the inputs of all steps.
            states: the states before the first step; None: zeros.
            batch: the number of sequences.
            split: maps rows of all steps to each step's rows (b, width), with b at most `batch`.
            join: the reverse of `split`.
            real: which rows (b,) of each step are not padding; None: all rows.
        """
        directions = ("", "_reverse") if self.bidirectional else ("",)
        last: list[State] = []
        for layer in range(self.num_layers):
            if layer and self.dropout:
                x = F.dropout(x, self.dropout, self.training)
            outputs = []
            for direction in directions:
                ih, hh = (
                    self.get_submodule(f"weight_{kind}_l{layer}{direction}")
                    for kind in ("ih", "hh")
                )
                given = split(ih(x))
                if states is None:
                    zeros = given[0].new_zeros(batch, self.hidden_size)
                    state: State = (zeros,) * self._num_states
                else:
                    state = tuple(each[len(last)] for each in states)
                found, state = self._pass(given, hh, state, real, backwards=bool(direction))
                outputs.append(join(found))
                last.append(state)
            x = torch.cat(outputs, dim=-1)
        return x, tuple(torch.stack(each) for each in zip(*last, strict=True))

    def _pass(
        self,
        given: Sequence[Tensor],
        hh: nn.Module,
        state: State,
        real: Sequence[Tensor] | None,
        *,
        backwards: bool,
    ) -> tuple[list[Tensor], State]:
        """Runs one layer in one direction; returns all steps' hidden states and the last states."""
        outputs = []
        numbers = range(len(given))
        for number in reversed(numbers) if backwards else numbers:
            step = given[number]
            b = len(step)
            now = tuple(each[:b] for each in state)
            recalled = hh(now[0]) if real is None else _recalled(hh, now[0], real[number])
            new = self._step(step, recalled, *now)
            outputs.append(new[0])
            state = tuple(torch.cat([each, old[b:]]) for each, old in zip(new, state, strict=True))
        return outputs[::-1] if backwards else outputs, state

    def flatten_parameters(self) -> None:
        """Does nothing: there is no fused kernel whose memory could be arranged."""

    def extra_repr(self) -> str:
        """Returns the sizes that `print(model)` shows."""
        return f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}"


def _recalled(hh: nn.Module, h: Tensor, real: Tensor) -> Tensor:
    """Returns the product with h (b, n), in which hooks see zeros for the rows of padding.

    Rows of padding say nothing of the layer, and get no gradient. The states do not change.
    """
    kept = real.to(h.device, torch.bool)[:, None]
    return torch.where(kept, hh(torch.where(kept, h, 0.0)), type(hh).forward(hh, h))


@contextmanager
def observed(module: nn.Module, batch: Mapping[str, Tensor]) -> Iterator[None]:
    """A context in which hooks of the matrices on hidden states see no padded steps of a batch."""
    parts = [part for part in module.modules() if isinstance(part, Recurrent)]
    try:
        for part in parts:
            part.real = batch.get("attention_mask")
        yield
    finally:
        for part in parts:
            part.real = None


def unroll(model: nn.Module, holders: Collection[str] | None = None) -> None:
    """Replaces `nn.LSTM` and `nn.GRU` by modules whose matrices are layers, in place.

    Models of transformers stay as they are: the loader knows parameters only by modules' names.

    Args:
        model: the model.
        holders: the names of the modules to replace, where possible; None: all modules.
    """
    if hasattr(model, "base_model_prefix"):
        return
    new = {
        part: Recurrent(part)
        for name, part in model.named_modules(remove_duplicate=False)
        if _is_known(part) and (holders is None or name in holders)
    }
    replace_modules(model, new)


def _is_known(module: nn.Module) -> bool:
    # A derived class may compute its matrices, and with `proj_size` there is a third matrix.
    return type(module) in STEPS and not module.proj_size


def _matrix(weight: nn.Parameter, bias: nn.Parameter | None) -> RecurrentMatrix:
    m, n = weight.shape
    layer = RecurrentMatrix(n, m, bias=bias is not None, device="meta")
    layer.weight = weight
    if bias is not None:
        layer.bias = bias
    return layer


def _renamed(module: nn.Module, prefix: str) -> dict[str, str]:
    """Maps the matrices' weights and biases from their names in modules to torch's names."""
    names: dict[str, str] = {}
    for name in module._modules:
        keys = Keys(prefix + name)
        names |= {f"{keys.layer}.{WEIGHT}": keys.weight, f"{keys.layer}.{BIAS}": keys.bias}
    return names


def _to_torch_names(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for ours, torchs in _renamed(module, prefix).items():
        if ours in state:
            state[torchs] = state.pop(ours)


def _from_torch_names(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    for ours, torchs in _renamed(module, prefix).items():
        if torchs in state:
            state[ours] = state.pop(torchs)
