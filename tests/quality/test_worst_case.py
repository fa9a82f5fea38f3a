"""The worst-case bound of plain feed-forward networks holds, and is offered to no others."""

import copy
from pathlib import Path

import pytest
import torch
from pico import compressed as compress
from pico import write_model, write_plain
from torch import Tensor, nn

from lrc_cli.network.layouts import LINEAR
from lrc_cli.network.low_rank.modules import LowRankModule
from lrc_cli.network.low_rank.slots import low_rank_module
from lrc_cli.network.low_rank.stored import replace_modules
from lrc_cli.quality.records import OwnError, WorstCase
from lrc_cli.quality.worst_case import LIPSCHITZ, worst_case


def randomised(module: nn.Module, seed: int, scale: float = 1.0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(scale * noise / parameter.shape[-1] ** 0.5)
    return module.eval()


def low_rank(layer: nn.Linear, rank: int, *, interpolative: bool = False) -> LowRankModule:
    """Returns the layer at a rank, by truncated SVD or by any rows of a matrix of that rank."""
    u, s, v = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
    outer, inner = u[:, :rank] * s[:rank], v[:rank]
    tensors = {"weight": inner, "up.weight": outer}
    if interpolative:
        order = torch.randperm(len(outer), generator=torch.Generator().manual_seed(3))
        rows = outer[order]
        coefficients = rows[rank:] @ torch.linalg.inv(rows[:rank])
        perm = order.argsort().to(torch.int32)
        tensors = {"weight": rows[:rank] @ inner, "up.weight": coefficients, "perm": perm}
    if layer.bias is not None:
        tensors["bias"] = layer.bias.detach() + 0.01
    return low_rank_module(layer, tensors, LINEAR, (layer.out_features, layer.in_features))


def factorised(module: nn.Module, rank: int, *, interpolative: bool = False) -> nn.Module:
    """Returns a copy that has factors for every linear layer that is large enough at that rank."""
    found = copy.deepcopy(module)
    layers = [part for part in found.modules() if isinstance(part, nn.Linear)]
    new = {p: low_rank(p, rank, interpolative=interpolative) for p in layers}
    replace_modules(found, dict(new))
    return found.eval()


def bounded(module: nn.Module, other: nn.Module, x: Tensor) -> WorstCase:
    found = worst_case(module, other, {"x": x})
    assert found is not None
    return found


def mlp(activation: nn.Module) -> nn.Sequential:
    tail = nn.Sequential(nn.Dropout(0.5), nn.Linear(16, 12), activation, nn.Identity())
    layers = nn.Flatten(), nn.Linear(20, 24), activation, nn.Linear(24, 16), tail
    return nn.Sequential(*layers, nn.Linear(12, 6))


ACTIVATIONS = [kind() for kind in LIPSCHITZ]
ACTIVATIONS += [nn.LeakyReLU(2.0), nn.ELU(3.0), nn.GELU("tanh"), nn.ReLU(inplace=True)]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("interpolative", [False, True])
def test_no_input_exceeds_the_bound(activation: nn.Module, interpolative: bool) -> None:
    module = randomised(mlp(activation), seed=1, scale=1.5)
    other = factorised(module, 4, interpolative=interpolative)
    x = 3 * torch.randn(200, 5, 4, generator=torch.Generator().manual_seed(2))
    found = bounded(module, other, x)
    with torch.no_grad():
        error = (module.double()(x.double()) - other.double()(x.double())).norm(dim=1).max().item()
    assert found.measured == pytest.approx(error, rel=1e-9)
    assert 0 < error <= found.bound
    assert (found.label, found.inputs, found.num_inputs) == (
        "worst case",
        "calibration",
        200,
    )


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Sigmoid(), nn.GELU(), nn.LeakyReLU(3.0)])
def test_an_adversary_who_climbs_the_error_stays_below_its_bound(activation: nn.Module) -> None:
    module = randomised(mlp(activation), seed=4).double()
    other = factorised(module.float(), 3).double()
    module = module.double()
    x = torch.randn(8, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    start = bounded(module, other, x).measured
    for _ in range(60):
        x = x.detach().requires_grad_()
        (module(x) - other(x)).square().sum().backward()
        assert x.grad is not None
        x = x + 0.3 * x.grad / x.grad.norm(dim=1, keepdim=True)
    found = bounded(module, other, x.detach())
    assert start < found.measured <= found.bound


@pytest.mark.parametrize("kind", LIPSCHITZ)
def test_the_constants_are_the_largest_slopes(kind: type[nn.Module]) -> None:
    x = torch.linspace(-12, 12, 200_001, dtype=torch.float64, requires_grad=True)
    module = kind()
    module(x).sum().backward()
    assert x.grad is not None
    largest = x.grad.abs().max().item()
    assert largest <= LIPSCHITZ[kind](module) <= 1.01 * largest


def test_one_linear_layer_is_bounded_by_its_own_error() -> None:
    module = randomised(nn.Sequential(nn.Linear(12, 10)), seed=6)
    found = bounded(module, factorised(module, 3), torch.randn(50, 12))
    assert found.bound == pytest.approx(found.measured, rel=1e-9)
    assert found.layers == (OwnError(error=found.bound, amplification=1.0),)


def test_it_is_tight_for_a_linear_network_whose_errors_line_up() -> None:
    """Diagonal layers lose, and pass on, along the same axis, so products of norms are exact."""
    module = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(3))).eval()
    other = copy.deepcopy(module)
    for part, copied in zip(list(module), list(other), strict=True):
        part.weight = nn.Parameter(torch.diag(torch.tensor([3.0, 1.0, 0.5, 0.0])))
        factors = {
            "weight": torch.tensor([[1.0, 0, 0, 0]]),
            "up.weight": torch.tensor([[2.0], [0], [0], [0]]),
        }
        replace_modules(other, {copied: low_rank_module(copied, factors, LINEAR, (4, 4))})
    found = bounded(module, other, torch.eye(4)[:1])
    assert found.measured == 27 - 8
    assert found.bound == pytest.approx(27 - 8, rel=1e-12)
    assert [layer.amplification for layer in found.layers] == [4.0, 2.0, 1.0]


def test_only_the_layers_own_errors_count_behind_a_flat_activation() -> None:
    module = randomised(nn.Sequential(nn.Linear(8, 8), nn.Sigmoid(), nn.Linear(8, 8)), seed=8)
    other = factorised(module, 2)
    found = bounded(module, other, torch.randn(30, 8, generator=torch.Generator().manual_seed(1)))
    assert isinstance(other[2], LowRankModule)
    norm = torch.linalg.matrix_norm(other[2].up.weight @ other[2].weight, 2).item()
    assert found.layers[0].amplification == pytest.approx(0.25 * norm, rel=1e-5)


class Skip(nn.Sequential):
    def forward(self, input: Tensor) -> Tensor:
        return input + super().forward(input)


def others() -> dict[str, nn.Module]:
    image = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 8))
    hooked = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    hooked[0].register_forward_hook(lambda _, x, y: 2 * y)
    return {
        "convolution": image,
        "skip": Skip(nn.Linear(8, 8), nn.ReLU()),
        "skip inside": nn.Sequential(Skip(nn.Linear(8, 8)), nn.Linear(8, 8)),
        "normalisation": nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)),
        "softmax": nn.Sequential(nn.Linear(8, 8), nn.Softmax(-1)),
        "hook": hooked,
        "mixes inputs": nn.Sequential(nn.Flatten(0), nn.Linear(8, 8)),
        "transformer": nn.TransformerEncoderLayer(8, 2, 8),
    }


@pytest.mark.parametrize("name", others())
def test_other_networks_get_no_bound(name: str) -> None:
    module = others()[name].eval()
    layer = next(part for part in module.modules() if type(part) is nn.Linear)
    other = copy.deepcopy(module)
    twin = next(part for part in other.modules() if type(part) is nn.Linear)
    replace_modules(other, {twin: low_rank(layer, 2)})
    assert worst_case(module, other, {"x": torch.randn(4, 8)}) is None


def test_an_uncompressed_network_or_other_inputs_get_no_bound() -> None:
    module = randomised(nn.Sequential(nn.Linear(8, 8)), seed=1)
    other = factorised(module, 2)
    rows = torch.randn(4, 8)
    assert worst_case(module, copy.deepcopy(module), {"x": rows}) is None
    assert worst_case(module, other, {"x": rows, "mask": rows}) is None
    assert worst_case(module, other, {"x": torch.ones(4, 8, dtype=torch.int64)}) is None
    assert worst_case(module.train(), other, {"x": rows}) is not None
    dropping = nn.Sequential(nn.Dropout(0.5), *module).train()
    assert worst_case(dropping, nn.Sequential(nn.Dropout(0.5), *other), {"x": rows}) is None


def test_a_part_that_runs_twice_counts_twice() -> None:
    shared = nn.LeakyReLU(2.0)
    module = randomised(nn.Sequential(nn.Linear(6, 6), shared, nn.Linear(6, 6), shared), seed=9)
    found = bounded(module, factorised(module, 2), torch.randn(20, 6))
    assert [layer.amplification >= 2.0 for layer in found.layers] == [True, True]
    assert found.layers[1].amplification == 2.0


def test_the_report_of_an_mlp_has_the_bound_and_says_worst_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    output, report = compress(tmp_path, write_plain(tmp_path).model("mlp"))
    found = report["worst_case"]
    assert 0 < found["measured"] <= found["bound"]
    assert len(found["layers"]) == 3
    for page in ("README.md", "report.html"):
        assert "Worst case" in (output / page).read_text()


def test_the_report_of_a_transformer_has_none(tmp_path: Path) -> None:
    changes = {
        "model.path": str(write_model(tmp_path / "model", "llama")),
        "calibration.path": str(tmp_path / "text.txt"),
        "evaluation": None,
        "compression.method": "frobenius",
    }
    (tmp_path / "text.txt").write_text(" ".join(f"w{i % 91}" for i in range(3000)))
    output, report = compress(tmp_path, changes)
    assert report["worst_case"] is None
    assert "Worst case" not in (output / "README.md").read_text()
