"""Numbers that are unusual have true figures: each case is compared with float64 and verified."""

import copy
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import lrc_cli

SOURCE = """
from torch import nn


def wide():
    return nn.Sequential(nn.Linear(24, 16))


def tall():
    return nn.Sequential(nn.Linear(12, 32))


def three():
    return nn.Sequential(nn.Linear(24, 32), nn.Linear(32, 32), nn.Linear(32, 16))


def relus():
    parts = nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16)
    return nn.Sequential(*parts)
"""
BUILD: dict[str, Any] = {}
exec(SOURCE, BUILD)
FLOOR = 2.0**-11
"""Relative errors up to twice the numerical floor of reports say nothing."""

Weights = Callable[[list[nn.Linear]], None]
Rows = Callable[[Tensor], Tensor]


def as_they_are(layers: list[nn.Linear]) -> None:
    """Leaves the weights."""


def times(*factors: float, bias: float | None = None) -> Weights:
    """Multiplies each layer's weight; biases follow the sizes of the outputs, unless given."""

    def change(layers: list[nn.Linear]) -> None:
        size = 1.0
        for layer, factor in zip(layers, factors, strict=True):
            size *= factor
            layer.weight.mul_(factor)
            layer.bias.mul_(size if bias is None else bias)

    return change


def mixed(axis: int) -> Weights:
    """Puts rows, or columns, of 1e-20 beside others of 1e20."""

    def change(layers: list[nn.Linear]) -> None:
        for layer in layers:
            shape = [1, 1]
            shape[axis] = layer.weight.shape[axis]
            sizes = torch.tensor([1e-20, 1e20]).repeat(shape[axis] // 2)
            layer.weight.mul_(sizes.view(shape))
            layer.bias.zero_()

    return change


def equal_rows(layers: list[nn.Linear]) -> None:
    """Makes the first weight one of rank 1."""
    layers[0].weight.copy_(layers[0].weight[:1].expand_as(layers[0].weight))


def dead(layers: list[nn.Linear]) -> None:
    """Lets no output of the first layer be above 0 on rows that are not negative."""
    layers[0].weight.abs_().neg_()
    layers[0].bias.fill_(-1)


def plain(rows: Tensor) -> Tensor:
    return rows


def scaled(factor: float) -> Rows:
    return lambda rows: rows * factor


def beside(factor: float) -> Rows:
    """Puts columns of 1 / factor beside columns of factor."""
    return lambda rows: rows * torch.tensor([factor, 1 / factor]).repeat(rows.shape[1] // 2)


def outlier(rows: Tensor) -> Tensor:
    return torch.cat([rows[:-1], rows[-1:] * 1e18])


def constant(rows: Tensor) -> Tensor:
    return rows[:1].expand_as(rows)


def duplicates(rows: Tensor) -> Tensor:
    return rows[:4].repeat(len(rows) // 4, 1)


def one_rank(rows: Tensor) -> Tensor:
    return rows[:, :1] * torch.linspace(1, 2, rows.shape[1])


def one_row(rows: Tensor) -> Tensor:
    return rows[:1]


def without_columns(rows: Tensor) -> Tensor:
    return rows * (torch.arange(rows.shape[1]) % 2)


@dataclass(frozen=True, kw_only=True)
class Case:
    """Names a network, what its weights and its data are, and how it is compressed."""

    net: str
    weights: Weights = as_they_are
    rows: Rows = plain
    method: str = "frobenius"
    more: dict[str, Any] = field(default_factory=dict)


CENTER = {"compression.center": True}
SEQUENTIAL = {"compression.sequential": True}
HELD = {"certification.num_sequences": 16}
CASES = {
    # weights
    "tiny-wide": Case(net="wide", weights=times(1e-30), more=HELD),
    "tiny-tall": Case(net="tall", weights=times(1e-30)),
    "tiny-curvature": Case(net="wide", weights=times(1e-30), method="curvature"),
    "tiny-nuclear": Case(net="wide", weights=times(1e-30), method="nuclear"),
    "tiny-svd": Case(net="wide", weights=times(1e-30), method="svd"),
    "tiny-center": Case(net="tall", weights=times(1e-30), more=CENTER),
    "huge-wide": Case(net="wide", weights=times(1e30), more=HELD),
    "huge-tall": Case(net="tall", weights=times(1e30)),
    "huge-curvature": Case(net="tall", weights=times(1e30), method="curvature"),
    "huge-svd": Case(net="tall", weights=times(1e30), method="svd"),
    "subnormal": Case(net="wide", weights=times(1e-40)),
    "1e20": Case(net="wide", weights=times(1e20)),
    "tiny-then-huge": Case(net="three", weights=times(1e-25, 1e25, 1), more=HELD),
    "huge-then-tiny": Case(net="three", weights=times(1e25, 1e-25, 1), more=SEQUENTIAL),
    "all-small-sequential": Case(net="three", weights=times(1e-10, 1e-10, 1e-10), more=SEQUENTIAL),
    "rows-mixed": Case(net="wide", weights=mixed(0)),
    "rows-mixed-tall-curvature": Case(net="tall", weights=mixed(0), method="curvature"),
    "columns-mixed": Case(net="wide", weights=mixed(1)),
    "rank-1-weight": Case(net="three", weights=equal_rows),
    "tiny-gradients": Case(net="three", weights=times(1, 1, 1e-30), method="curvature"),
    "tiny-gradients-first": Case(net="three", weights=times(1e-30, 1, 1), method="curvature"),
    "huge-gradients": Case(net="three", weights=times(1, 1, 1e30, bias=0), method="curvature"),
    # inputs
    "tiny-inputs": Case(net="wide", rows=scaled(1e-30)),
    "tiny-inputs-center": Case(net="wide", rows=scaled(1e-30), more=CENTER),
    "tiny-inputs-curvature": Case(net="tall", rows=scaled(1e-22), method="curvature"),
    "tiny-inputs-sequential": Case(
        net="three", weights=times(1, 1, 1, bias=0), rows=scaled(1e-25), more=SEQUENTIAL
    ),
    "huge-inputs": Case(net="wide", rows=scaled(1e25), more=HELD),
    "huge-inputs-center": Case(net="tall", rows=scaled(1e25), more=CENTER),
    "subnormal-inputs": Case(net="wide", rows=scaled(1e-40)),
    "columns-of-inputs-mixed": Case(net="wide", rows=beside(1e20)),
    "columns-of-inputs-mixed-center": Case(net="tall", rows=beside(1e15), more=CENTER),
    "outlier": Case(net="wide", rows=outlier),
    # behind a ReLU
    "relu-tiny": Case(net="relus", weights=times(1e-30, 1, 1), method="relu"),
    "relu-huge": Case(net="relus", weights=times(1e28, 1e-28, 1), method="relu"),
    "relu-small": Case(net="relus", weights=times(1e-10, 1e-10, 1e-10), method="relu"),
    "relu-huge-inputs": Case(
        net="relus", weights=times(1, 1, 1, bias=0), rows=scaled(1e30), method="relu"
    ),
    "relu-dead": Case(net="relus", weights=dead, rows=torch.abs, method="relu"),
    # nothing to tell
    "zero-layer": Case(net="three", weights=times(1, 0, 1)),
    "zero-layer-curvature": Case(net="three", weights=times(1, 0, 1), method="curvature"),
    "zero-first-layer-center": Case(net="three", weights=times(0, 1, 1), more=CENTER),
    "zero-network": Case(net="three", weights=times(0, 0, 0), more=HELD),
    "zero-network-curvature": Case(net="three", weights=times(0, 0, 0), method="curvature"),
    "dead": Case(net="relus", weights=dead, rows=torch.abs, more=HELD),
    "constant": Case(net="three", rows=constant),
    "constant-center": Case(net="three", rows=constant, more=CENTER),
    "constant-curvature-center": Case(net="three", rows=constant, method="curvature", more=CENTER),
    "zero-inputs": Case(net="three", rows=scaled(0)),
    "zero-inputs-center": Case(net="three", rows=scaled(0), more=CENTER),
    "zero-inputs-no-bias": Case(net="wide", weights=times(1, bias=0), rows=scaled(0), more=HELD),
    "one-row": Case(net="three", rows=one_row),
    "one-row-center": Case(net="three", rows=one_row, more=CENTER),
    "one-row-curvature": Case(net="three", rows=one_row, method="curvature"),
    "duplicates": Case(net="three", rows=duplicates),
    "rank-1-data": Case(net="three", rows=one_rank),
    "rank-1-data-tall": Case(net="tall", rows=one_rank),
    "columns-of-zeros": Case(net="wide", rows=without_columns),
}


@pytest.fixture(scope="module", autouse=True)
def factories(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Makes SOURCE the module unusual_nets."""
    directory = tmp_path_factory.mktemp("factories")
    (directory / "unusual_nets.py").write_text(SOURCE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(directory)
        yield


def network(case: Case) -> nn.Sequential:
    generator = torch.Generator().manual_seed(0)
    module: nn.Sequential = BUILD[case.net]()
    layers = [part for part in module if isinstance(part, nn.Linear)]
    with torch.no_grad():
        for layer in layers:
            width = layer.weight.shape[1]
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) / width**0.5)
            layer.bias.copy_(torch.randn(layer.bias.shape, generator=generator) / 10)
        case.weights(layers)
    return module


def data(case: Case, width: int, seed: int) -> Tensor:
    colour = torch.randn(width, width, generator=torch.Generator().manual_seed(5))
    rows = torch.randn(64, width, generator=torch.Generator().manual_seed(seed))
    return case.rows(rows @ colour).contiguous()


def linears(module: nn.Module, x: Tensor) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Returns W, b and the inputs of every linear layer by name, in float64."""
    found: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    x = x.double()
    for name, part in copy.deepcopy(module).double().named_children():
        if isinstance(part, nn.Linear):
            found[name] = part.weight.detach(), part.bias.detach(), x
        x = part(x).detach()
    return found


def share(error: Tensor, whole: Tensor) -> float:
    """Returns ||error|| / ||whole||, and 0 for 0 / 0, of numbers of any size."""
    size = whole.abs().amax()
    if not size:
        assert not error.any()
        return 0.0
    return float((error / size).norm() / (whole / size).norm())


def near(stated: float, wanted: float) -> bool:
    return abs(stated - wanted) <= 4e-3 * wanted + FLOOR


def check_figures(
    row: dict[str, Any], layer: tuple[Tensor, ...], state: pico.State, *, is_free: bool
) -> None:
    """Compares a row of the report with the errors of the written tensors in float64.

    Args:
        is_free: whether the bias may change, so that it takes over the mean.
    """
    (weight, bias, inputs), name = layer, row["name"]
    output, metric = row["errors"]["output"], row["errors"]["metric"]
    z = state[f"{name}.up.weight"].double() @ state[f"{name}.weight"].double()
    change = state.get(f"{name}.bias", bias).double() - bias
    rank = row["rank"]
    if output["inputs"] == "white":
        inputs, change = torch.eye(weight.shape[1]).double(), torch.zeros_like(bias)
    whole = inputs @ weight.T
    varying = whole - whole.mean(0) if is_free else whole
    size = weight.abs().amax().clamp(min=1e-300)
    u, s, v = torch.linalg.svd(weight / size, full_matrices=False)
    simple = inputs @ (weight - (u[:, :rank] * s[:rank]) @ v[:rank] * size).T
    assert near(output["stored"], share(inputs @ (weight - z).T - change, whole))
    if not is_free:
        assert near(output["svd"], share(simple, whole))
    scale = varying.abs().amax().clamp(min=1e-300)
    least = torch.linalg.svdvals(varying / scale)[rank:].norm() * scale
    assert near(output["optimum"], share(least[None], whole))
    numbers = [metric[key] for key in ("stored", "svd", "total", "floor")]
    assert all(math.isfinite(x) and x >= 0 for x in numbers)
    if row["method"] == "frobenius" and not is_free:
        energy = float(whole.square().sum() / len(whole))
        assert metric["total"] == pytest.approx(energy, rel=4e-3)
        assert metric["stored"] == pytest.approx(output["stored"] ** 2 * energy, rel=1e-2)


def check_loaded(output: Path, case: Case, module: nn.Module, x: Tensor) -> None:
    """The loaded output must be the network with the products of the factors in float64."""
    state = pico.read_state(output)
    dense = {key: tensor.double() for key, tensor in state.items()}
    for name in pico.factorised_keys(state):
        dense[f"{name}.weight"] = dense.pop(f"{name}.up.weight") @ dense[f"{name}.weight"]
    wanted = copy.deepcopy(module).double()
    wanted.load_state_dict(dense)
    loaded = lrc_cli.load(output, factory=f"unusual_nets:{case.net}")
    with torch.no_grad():
        assert share(loaded(x).double() - wanted(x.double()), wanted(x.double())) < 1e-4


def job_of(case: Case, module: nn.Module, directory: Path) -> dict[str, Any]:
    """Writes a case's files and returns the changes of a config."""
    save_file(module.state_dict(), directory / "net.safetensors")
    width = next(module.parameters()).shape[1]
    for seed, name in enumerate(("rows", "held", "others")):
        save_file({"x": data(case, width, seed)}, directory / f"{name}.safetensors")
    count = len(data(case, width, 0))
    held = {"certification.path": str(directory / "others.safetensors")}
    return {
        "model.path": str(directory / "net.safetensors"),
        "model.factory": f"unusual_nets:{case.net}",
        "calibration.path": str(directory / "rows.safetensors"),
        "calibration.num_sequences": count,
        "evaluation": [
            {
                "name": "held",
                "path": str(directory / "held.safetensors"),
                "num_sequences": min(16, count),
            }
        ],
        "compression.method": case.method,
        "compression.sequential": False,
        "compression.storage": "factors",
        "compression.rank_multiple": 1,
        **({"compression.loss": "output"} if case.method == "curvature" else {}),
        **(held if "certification.num_sequences" in case.more else {}),
        **case.more,
    }


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_figures_are_true(case: Case, tmp_path: Path) -> None:
    module = network(case)
    output, report = pico.compressed(tmp_path, job_of(case, module, tmp_path))
    rows = pico.read_state(tmp_path / "rows.safetensors")["x"]
    state, layers = pico.read_state(output), linears(module, rows)
    factorised = [row for row in report["layers"] if row["storage"] == "factors"]
    assert factorised
    for row in factorised:
        if row.get("sequential") is not True:  # else the figures are about other inputs
            is_free = row["method"] == "relu" or "compression.center" in case.more
            check_figures(row, layers[row["name"]], state, is_free=is_free)
    check_loaded(output, case, module, rows)
    error = report["quality"][0]["relative_output_error"]
    held = pico.read_state(tmp_path / "held.safetensors")["x"][:16]
    assert math.isfinite(error) and (error > 0 or not held.any() or error < FLOOR)
    ended = pico.call(
        "verify",
        output,
        "--against",
        tmp_path / "net.safetensors",
        "--factory",
        f"unusual_nets:{case.net}",
    )
    assert ended.code == 0, ended.out
    assert "NaN" not in (output / "report.json").read_text()
    json.loads((output / "report.json").read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize("method", ["frobenius", "curvature"])
@pytest.mark.parametrize("net", ["wide", "tall"])
def test_weights_that_float64_cannot_compare_stay_dense(
    net: str, method: str, tmp_path: Path
) -> None:
    """Columns of 1e-20 read inputs of 1e20: they matter, and no product of W knows them."""
    case = Case(net=net, weights=mixed(1), rows=beside(1e20), method=method)
    file = pico.job(tmp_path, job_of(case, network(case), tmp_path))
    for command in (("compress", file), ("plan", file)):
        ended = pico.call(*command)
        assert ended.code == 2 and ended.err.count("error: ") == 1
        assert "0: could not be solved: the sizes of its weights differ by more" in ended.err
