"""C3 once more: the worst-case bound of a plain feed-forward network.

The run takes Lipschitz constants from a table; here they are the largest slopes on a grid.
"""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from lrc_cli.purposes import CALIBRATION
from lrc_cli.verify.bench import Bench
from lrc_cli.verify.moments import Checked

TOLERANCE = 1e-4
"""Relative, of norms: both sides compute in float64 from the same files."""
CONSTANT_TOLERANCE = 2e-3
"""Relative, for every activation: its constant in the run is rounded up."""


def check_worst_case(bench: Bench) -> None:
    """The figures of report["worst_case"], where there are any."""
    assert bench.written.report is not None
    stated = bench.written.report.get("worst_case")
    if stated is None:
        return
    what = "the worst-case bound is the product of the layers' norms"
    if CALIBRATION not in bench.sequences:
        bench.findings.not_checked("c3.worst_case", what, "the calibration data is not there")
        return
    with bench.findings.guard("c3.worst_case", what):
        bench.findings.judge("c3.worst_case", what, _problem(bench, stated))


@torch.no_grad()
def _problem(bench: Bench, stated: Mapping[str, Any]) -> str | None:
    (inputs,) = bench.sequences[CALIBRATION].inputs.values()
    x = inputs.to(bench.before.device, torch.float64)
    dense, compressed = (
        deepcopy(network.module).double() for network in (bench.before, bench.after)
    )
    change, outputs = compressed(x.clone()) - dense(x.clone()), dense(x.clone())
    words = {"label": "worst case", "inputs": "calibration", "num_inputs": len(x)}
    for name, word in words.items():
        if stated[name] != word:
            return f"{name} is stated as {stated[name]}, not {word}"
    checked = {one.layer.name: one for one in bench.checked}
    bound, layers, num_constants = _propagated(dense, compressed, checked, x.clone())
    exact = {"measured": _norms(change).max().item(), "output_norm": _norms(outputs).max().item()}
    slack = TOLERANCE + num_constants * CONSTANT_TOLERANCE
    pairs = [(key, stated[key], value, TOLERANCE) for key, value in exact.items()]
    pairs.append(("bound", stated["bound"], bound, slack))
    for one, other in zip(stated["layers"], layers, strict=True):
        pairs += [(key, one[key], other[key], slack) for key in ("error", "amplification")]
    for key, value, found, tolerance in pairs:
        # The bound may be a little too large, by the rounding of its constants, but not too small.
        if not found * (1 - TOLERANCE) <= value <= found * (1 + tolerance):
            return f"{key} is stated as {value}, found {found}"
    return None


def _propagated(
    dense: nn.Module, compressed: nn.Module, checked: Mapping[str, Checked], x: Tensor
) -> tuple[float, list[dict[str, float]], int]:
    """The largest bound over the inputs x, each linear layer's own error with the factor on it, and
    how many activations have a constant."""
    bound, slope, num_constants = x.new_zeros(len(x)), 1.0, 0
    layers: list[dict[str, float]] = []
    names = {part: name for name, part in dense.named_modules()}
    for part in _chain(dense):
        if not isinstance(part, nn.Linear):
            if not isinstance(part, (nn.Flatten, nn.Dropout)):
                slope, num_constants = slope * steepest(part), num_constants + 1
            x = part(x)
            continue
        fitted = _written(compressed, checked, names[part])
        change = x @ (part.weight - fitted).T
        if part.bias is not None:
            change += part.bias - compressed.get_parameter(f"{names[part]}.bias")
        own, norm = _norms(change), torch.linalg.matrix_norm(fitted, 2).item()
        bound = own + slope * norm * bound
        for layer in layers:
            layer["amplification"] *= slope * norm
        layers.append({"error": own.max().item(), "amplification": 1.0})
        x, slope = part(x), 1.0
    for layer in layers:
        layer["amplification"] *= slope
    return bound.max().item() * slope, layers, num_constants


def _written(compressed: nn.Module, checked: Mapping[str, Checked], name: str) -> Tensor:
    """The matrix (m, n) float64 that was written for a layer."""
    if name in checked:
        return checked[name].fitted().to(checked[name].weight.device)
    return compressed.get_parameter(f"{name}.weight")


def _chain(module: nn.Module) -> Iterator[nn.Module]:
    """The parts of nested sequences, in the order in which they run."""
    if not isinstance(module, nn.Sequential):
        yield module
        return
    for part in module:  # `children` would leave out a part that runs twice
        yield from _chain(part)


def steepest(part: nn.Module) -> float:
    """The largest slope of an elementwise function on a grid.

    Raises:
        ValueError: it is not elementwise there.
    """
    grid = torch.linspace(-12, 12, 24_001, dtype=torch.float64).requires_grad_()
    with torch.enable_grad():
        values = part(grid.clone())
        (slopes,) = torch.autograd.grad(values.sum(), grid)
    reverse = part(grid.detach().flip(0)).flip(0)
    if values.shape != grid.shape or not torch.equal(reverse, values.detach()):
        raise ValueError(f"{type(part).__name__} is no elementwise function")
    return slopes.abs().max().item()


def _norms(rows: Tensor) -> Tensor:
    """2-norm of each input's entries, (N,)."""
    return torch.linalg.vector_norm(rows.flatten(1), dim=1)
