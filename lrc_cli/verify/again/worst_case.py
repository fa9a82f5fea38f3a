"""C3 is computed once more: the worst-case bound of a plain feed-forward network.

The run takes Lipschitz constants from a table. Here they are the largest slopes on a grid.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lrc_cli.data.purposes import CALIBRATION
from lrc_cli.network.low_rank.stored import affine
from lrc_cli.verify.again.networks import OpenedRun

TOLERANCE = 1e-4
"""The relative tolerance of norms: both sides compute in float64 from the same files."""
CONSTANT_TOLERANCE = 2e-3
"""The relative tolerance for every activation: its constant in the run is rounded up."""


def check_worst_case(run: OpenedRun) -> None:
    """Checks the figures of report["worst_case"], where there are any."""
    assert run.written.report is not None
    stated = run.written.report.get("worst_case")
    if stated is None:
        if isinstance(run.before.module, nn.Sequential):
            what = "the network has no worst-case bound"
            run.findings.not_checked("c3.worst_case", what, "it is a chain of layers")
        return
    what = "the worst-case bound is the product of the layers' norms"
    if CALIBRATION not in run.sequences:
        run.findings.not_checked("c3.worst_case", what, "the calibration data is not there")
        return
    with run.findings.guard("c3.worst_case", what):
        run.findings.judge("c3.worst_case", what, _problem(run, stated))


@torch.no_grad()
def _problem(run: OpenedRun, stated: Mapping[str, Any]) -> str | None:
    (inputs,) = run.sequences[CALIBRATION].inputs.values()
    x = inputs.to(run.before.device, torch.float64, copy=True)
    words = {"label": "worst case", "inputs": "calibration", "num_inputs": len(x)}
    for name, word in words.items():
        if stated[name] != word:
            return f"{name} is stated as {stated[name]}, not {word}"
    exact, bounds, num_constants = _followed(run.before.module, run.after.module, x)
    slack = TOLERANCE + num_constants * CONSTANT_TOLERANCE
    pairs = [(key, stated[key], value, TOLERANCE) for key, value in exact.items()]
    pairs.append(("bound", stated["bound"], bounds["bound"], slack))
    for one, other in zip(stated["layers"], bounds["layers"], strict=True):
        pairs += [(key, one[key], other[key], slack) for key in ("error", "amplification")]
    for key, value, found, tolerance in pairs:
        # The bound may be a little too large, by the rounding of its constants, but not too small.
        if not found * (1 - TOLERANCE) <= value <= found * (1 + tolerance):
            return f"{key} is stated as {value}, found {found}"
    return None


def _followed(
    dense: nn.Module, compressed: nn.Module, x: Tensor
) -> tuple[dict[str, float], dict[str, Any], int]:
    """Runs both networks on the inputs x, in float64 with their weights as they are read.

    Returns:
        What was measured at the end; the bound, with the error and the factor of each linear layer;
        how many activations have a constant.
    """
    old, new, bound = x, x.clone(), x.new_zeros(len(x))
    slope, num_constants = 1.0, 0
    layers: list[dict[str, float]] = []
    names = {part: name for name, part in dense.named_modules()}
    for part in _chain(dense):
        if not isinstance(part, nn.Linear):
            if not isinstance(part, (nn.Flatten, nn.Dropout)):
                slope, num_constants = slope * steepest(part), num_constants + 1
            old, new = part(old), part(new)
            continue
        (weight, bias), (fitted, new_bias) = (
            affine(module) for module in (part, compressed.get_submodule(names[part]))
        )
        own = _norms(old @ (weight - fitted).T + (bias - new_bias))
        norm = torch.linalg.matrix_norm(fitted, 2).item()
        bound = own + slope * norm * bound
        for layer in layers:
            layer["amplification"] *= slope * norm
        layers.append({"error": own.max().item(), "amplification": 1.0})
        old, new, slope = old @ weight.T + bias, new @ fitted.T + new_bias, 1.0
    for layer in layers:
        layer["amplification"] *= slope
    measured = {
        "measured": _norms(new - old).max().item(),
        "output_norm": _norms(old).max().item(),
    }
    return measured, {"bound": bound.max().item() * slope, "layers": layers}, num_constants


def _chain(module: nn.Module) -> Iterator[nn.Module]:
    """Yields the parts of nested sequences, in the order in which they run."""
    if not isinstance(module, nn.Sequential):
        yield module
        return
    for part in module:  # `children` would leave out a part that runs twice
        yield from _chain(part)


def steepest(part: nn.Module) -> float:
    """Returns the largest slope of an elementwise function on a grid.

    Raises:
        ValueError: the function is not elementwise there.
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
    """Returns the 2-norm of each input's entries, (N,)."""
    return torch.linalg.vector_norm(rows.flatten(1), dim=1)
