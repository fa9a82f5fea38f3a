"""This module replaces fused experts by lists where the checkpoint holds fused tensors.

The attributes that transformers' decorator sets tell fused experts. Without them, the parameters
and a trial run tell. In the output's files each expert's matrices take the place of the fused
tensors (checkpoint/fused.py).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lrc_cli.checkpoint.fused import MARK_DTYPE, Fused, is_mark
from lrc_cli.checkpoint.headers import TensorInfo
from lrc_cli.network.disk_names import module_names
from lrc_cli.network.experts import FUSED, Expert, Experts, linear_of
from lrc_cli.network.low_rank.stored import replace_modules


class SortedExperts(Experts):
    """A list whose experts are given a row for every token: zeros for tokens of other experts."""

    def forward(self, hidden: Tensor) -> Tensor:  # type: ignore[override]
        """Maps rows (experts * t, n), the first expert's rows first, to (experts * t, n)."""
        parts = []
        for expert, rows in zip(self, hidden.view(len(self), -1, hidden.shape[-1]), strict=True):
            (token,) = torch.where((rows != 0).any(dim=-1))
            total = torch.zeros_like(rows)
            if len(token):  # without biases, zeros stay zeros
                total = total.index_add(0, token, expert(rows[token]).to(rows.dtype))
            parts.append(total)
        return torch.cat(parts)


@dataclass(frozen=True)
class Stored:
    """A fused module whose fused tensors the checkpoint holds, and the way to take it apart."""

    first: str
    """The name of the parameter that is applied first; `down_proj` is applied to its outputs."""
    is_transposed: bool
    has_bias: bool
    kind: type[Experts]
    activate: Callable[..., Tensor]
    shell: nn.Module
    """The fused module, without its parameters once it is taken apart."""

    @property
    def matrices(self) -> tuple[str, str]:
        """The names of the parameters with matrices."""
        return self.first, "down_proj"

    def apart(self) -> Experts:
        """Returns the list of experts, whose weights are views; the fused module keeps none."""
        held = {name: parameter.detach() for name, parameter in self.shell.named_parameters()}
        self.shell._parameters.clear()
        layers = []
        for index in range(len(held[self.first])):
            pairs = [
                (held[name][index], held[f"{name}_bias"][index] if self.has_bias else None)
                for name in self.matrices
            ]
            layers.append([linear_of(w.T if self.is_transposed else w, bias) for w, bias in pairs])
        experts = self.kind([Expert(self.matrices, x, self.activate) for x in layers])
        experts.stored = self
        return experts.train(self.shell.training)

    def together(self, experts: Experts) -> nn.Module:
        """Returns the fused module again, from a list of dense experts."""
        for name in self.matrices:
            layers: list[Any] = [expert.get_submodule(name) for expert in experts]
            weights = [x.weight.detach().T if self.is_transposed else x.weight for x in layers]
            new = {name: torch.stack([x.detach() for x in weights])}
            if self.has_bias:
                new[f"{name}_bias"] = torch.stack([x.bias.detach() for x in layers])
            for key, tensor in new.items():
                self.shell.register_parameter(key, nn.Parameter(tensor))
        return self.shell.train(experts.training)

    def fused(self, name: str) -> dict[str, Fused]:
        """Returns how each parameter of the module `name` is taken apart, by parameter name."""
        found = {}
        for matrix in self.matrices:
            part = f"{matrix}.weight"
            found[matrix] = Fused(experts=name, part=part, is_transposed=self.is_transposed)
            if self.has_bias:
                found[f"{matrix}_bias"] = Fused(experts=name, part=f"{matrix}.bias")
        return found


def take_apart(model: nn.Module, tensors: Mapping[str, TensorInfo]) -> dict[str, Fused]:
    """Replaces fused experts by lists, in place, where the checkpoint holds fused tensors.

    Where the checkpoint has marks in the place of fused tensors, the lists have the marks too.

    Args:
        model: the module; changed in place.
        tensors: the checkpoint's headers.

    Returns:
        How to take each of the checkpoint's fused tensors apart, by key.
    """
    pairs = ((name, _stored(part)) for name, part in model.named_modules())
    found = {name: stored for name, stored in pairs if stored is not None}
    if not found:
        return {}
    keys = {name: key for key, name in module_names(model, tensors).items()}
    new: dict[nn.Module, nn.Module] = {}
    fused: dict[str, Fused] = {}
    known: dict[type[nn.Module], bool] = {}
    for name, stored in found.items():
        parameters = stored.fused(name)
        here = {keys[f"{name}.{x}"]: x for x in parameters if f"{name}.{x}" in keys}
        marks = [x for key, x in here.items() if is_mark(tensors[key])]
        # Otherwise transformers has merged the experts' tensors, or no file holds the experts.
        if not marks and len(here) < len(parameters):
            continue
        kind = type(stored.shell)
        if kind not in known:
            known[kind] = _computes_what_it_seems(stored)
        if not known[kind]:
            continue
        new[stored.shell] = experts = stored.apart()
        for mark in marks:
            ranks = torch.zeros(len(experts), dtype=MARK_DTYPE, device=_device(experts))
            experts.register_buffer(mark, ranks)
        if not marks:
            fused |= {key: parameters[x] for key, x in here.items()}
    replace_modules(model, new)
    return fused


def put_together(model: nn.Module) -> None:
    """Makes lists from `take_apart` fused modules again; all experts must be dense."""
    lists = [part for part in model.modules() if isinstance(part, Experts)]
    replace_modules(model, {x: x.stored.together(x) for x in lists if x.stored is not None})


def _stored(module: nn.Module) -> Stored | None:
    """Returns a module as fused experts; None for a module that cannot be taken apart."""
    flags = vars(module)
    activation = getattr(module, "act_fn", None)
    if "has_gate" not in flags:
        if set(module._parameters) != set(FUSED) or activation is None:
            return None
        # No attribute says what the module computes: see `_computes_what_it_seems`.
        return Stored("gate_up_proj", True, False, SortedExperts, _Gated(activation), module)
    if flags.get("has_post_expert_norm") or not hasattr(module, "_apply_gate"):
        return None
    first, bias = "gate_up_proj" if flags["has_gate"] else "up_proj", bool(flags["has_bias"])
    activate: Any = module._apply_gate if flags["has_gate"] else activation
    wanted = {first, "down_proj"} | ({f"{first}_bias", "down_proj_bias"} if bias else set())
    if set(module._parameters) != wanted or activate is None:
        return None
    return Stored(first, bool(flags["is_transposed"]), bias, Experts, activate, module)


@dataclass(frozen=True)
class _Gated:
    """Returns up * activation(gate) for (gate, up) in one tensor; a class, for pickled models."""

    activation: Callable[[Tensor], Tensor]

    def __call__(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return up * self.activation(gate)


def _computes_what_it_seems(stored: Stored) -> bool:
    """Returns whether a module without attributes maps a few rows as a list of its experts does.

    A module on the meta device has no values and counts as checked: it belongs to a checkpoint with
    marks, and the checkpoint was checked when it was compressed.
    """
    module = stored.shell
    if stored.kind is not SortedExperts or _device(module).type == "meta":
        return True
    first, down = (module.get_parameter(name) for name in stored.matrices)
    if first.ndim != 3 or down.ndim != 3 or first.shape[2] != 2 * down.shape[1]:
        return False
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2 * len(first), first.shape[1], generator=generator)
    rows = rows.to(first.device, first.dtype)
    try:
        with torch.no_grad():
            wanted = module(rows)
            gate_up = torch.bmm(rows.view(len(first), 2, -1), first)
            got = torch.bmm(stored.activate(gate_up), down).view(wanted.shape)
    except (RuntimeError, TypeError):  # it takes other inputs
        return False
    return bool((got - wanted).norm() <= 0.01 * wanted.norm())


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
