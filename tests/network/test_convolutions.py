"""Convolutions are linear layers on patches, from statistics to files and back."""

from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from hf_helpers import Form, multiply_out, random_factors
from moments_helpers import input_groups
from safetensors.torch import save_file
from torch import Tensor, nn

import lrc_cli
from lrc_cli.checkpoint.source import open_source
from lrc_cli.config import Compression
from lrc_cli.execution.hooks import hooked
from lrc_cli.execution.network import make_network
from lrc_cli.network.candidates.find import find_layers
from lrc_cli.network.keys import Keys
from lrc_cli.network.layer import Layer
from lrc_cli.network.layouts import layout_of, linear_shape
from lrc_cli.network.low_rank.slots import low_rank_module
from lrc_cli.network.low_rank.stored import stored_layers
from lrc_cli.network.opening import open_module

GEOMETRIES: dict[str, tuple[type[nn.Module], dict[str, Any], tuple[int, ...]]] = {
    "plain": (nn.Conv2d, {"kernel_size": 3}, (7, 8)),
    "1x1": (nn.Conv2d, {"kernel_size": 1}, (5, 4)),
    "strided": (nn.Conv2d, {"kernel_size": (3, 2), "stride": (2, 3), "padding": 1}, (9, 8)),
    "dilated": (nn.Conv2d, {"kernel_size": 3, "dilation": (2, 1), "padding": (2, 0)}, (7, 8)),
    "same": (nn.Conv2d, {"kernel_size": (4, 3), "padding": "same", "dilation": 2}, (9, 8)),
    "valid": (nn.Conv2d, {"kernel_size": 2, "padding": "valid"}, (6, 5)),
    "reflected": (nn.Conv2d, {"kernel_size": 3, "padding": 2, "padding_mode": "reflect"}, (6, 5)),
    "circular": (nn.Conv2d, {"kernel_size": 3, "padding": 1, "padding_mode": "circular"}, (6, 5)),
    "signal": (nn.Conv1d, {"kernel_size": 4, "stride": 2, "padding": 3, "dilation": 2}, (11,)),
    "replicated": (nn.Conv1d, {"kernel_size": 3, "padding": 2, "padding_mode": "replicate"}, (7,)),
    "volume": (nn.Conv3d, {"kernel_size": (2, 3, 1), "stride": 2, "padding": 1}, (5, 6, 4)),
}


def convolution(name: str) -> tuple[Any, Tensor]:
    """Returns a random convolution of GEOMETRIES from 5 to 8 channels, and an input of 2 items."""
    kind, settings, sizes = GEOMETRIES[name]
    torch.manual_seed(3)
    return kind(5, 8, **settings), torch.randn(2, 5, *sizes)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_is_a_product_of_its_matrix_with_patches(name: str) -> None:
    conv, x = convolution(name)
    layout = layout_of(conv)
    assert layout is not None
    matrix = layout.matrix(conv.weight)
    assert linear_shape(conv) == tuple(matrix.shape) == (8, conv.weight[0].numel())
    rows = layout.inputs(x) @ matrix.T + conv.bias
    torch.testing.assert_close(layout.outputs(conv(x)), rows, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layout.returned(rows), conv(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layout.inputs(x)[1], layout.inputs(x[1]))  # no items at all


@pytest.mark.parametrize("form", [Form(block=0), Form(block=1), Form(block=4)])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_factors_compute_what_their_product_does(name: str, form: Form) -> None:
    conv, x = convolution(name)
    layout, shape = layout_of(conv), linear_shape(conv)
    assert layout is not None and shape is not None
    factors = random_factors(*shape, form, torch.Generator().manual_seed(1))
    ones = (1,) * len(conv.kernel_size)
    stored = factors | {
        "weight": factors["weight"].reshape(-1, *conv.weight.shape[1:]),
        "up.weight": factors["up.weight"].reshape(*factors["up.weight"].shape, *ones),
        "bias": conv.bias.detach(),
    }
    module = low_rank_module(conv, stored, layout, shape)
    assert type(module.down) is type(module.up) is type(conv)
    assert module.stride == conv.stride and module.out_channels == 8  # some models ask
    conv.weight = nn.Parameter(multiply_out(factors).reshape(conv.weight.shape))
    torch.testing.assert_close(module(x), conv(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(module(x[0]), conv(x[0]), rtol=1e-4, atol=1e-4)
    assert {k: t.shape for k, t in module.state_dict().items()} == {
        k: t.shape for k, t in stored.items()
    }


def test_a_convolution_that_is_something_else_is_none() -> None:
    class Causal(nn.Conv1d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(nn.functional.pad(x, (2, 0)))

    assert layout_of(Causal(4, 4, 3)) is None
    assert layout_of(nn.Conv2d(4, 4, 3, groups=2)) is None
    assert layout_of(nn.ConvTranspose2d(4, 4, 3)) is None


@pytest.fixture(autouse=True)
def in_folder(plain_folder: pico.PlainFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Factories are found from the working directory."""
    monkeypatch.chdir(plain_folder.path)


def test_rows_and_gradients_are_those_of_the_layer(plain_folder: pico.PlainFolder) -> None:
    """The next operation may change the layer's output in place."""
    factory = "pico_factories:pictures"
    source = open_source(plain_folder.path / "pictures.safetensors")
    module, source = open_module(source, factory=factory)
    layers, _ = find_layers(module, source, Compression(size=0.5))
    network = make_network(module, device=torch.device("cpu"), dtype=None)
    pixels = pico.read_state(plain_folder.path / "pixels.safetensors")["pixels"][:4]
    got: dict[str, Tensor] = {}

    def hook(layer: Any, x: Tensor, y: Tensor) -> Tensor:
        bias = layer.bias(source)
        matrix = layer.weight(source)
        expected = x @ matrix.T + (0 if bias is None else bias)
        torch.testing.assert_close(y.detach(), expected.detach(), rtol=1e-4, atol=1e-5)
        if not y.requires_grad:
            y = y.requires_grad_().clone()
        y.register_hook(lambda gradient: got.__setitem__(layer.name, gradient.clone()))
        return y

    with hooked(network, layers, hook):
        network({"pixels": pixels}).square().sum().backward()
    plain, _ = open_module(source, factory=factory)
    for parameter in plain.parameters():
        parameter.requires_grad_()
    plain(pixels).square().sum().backward()
    assert set(got) == {"first", "second", "along", "head"}
    for layer in layers:
        if layer.bias(source) is not None:  # its gradient is the sum over all positions
            total = got[layer.name].flatten(0, -2).sum(0)
            wanted = plain.get_submodule(layer.name).get_parameter("bias").grad
            torch.testing.assert_close(total, wanted, rtol=1e-4, atol=1e-4)


LESS = {"compression.size": 0.3}  # bfloat16 alone halves what is stored in float32


class Branches(nn.Module):
    """Convolutions that read one tensor, two of them through the same kernel's shape."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.same = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 6, 3)
        self.dilated = nn.Conv2d(3, 4, 3, dilation=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(x).sum() + self.same(x).sum() + self.dilated(x).sum()


def test_convolutions_share_inputs_only_where_they_see_the_same_patches() -> None:
    module = Branches()
    network = make_network(module, device=torch.device("cpu"), dtype=None)
    shared: dict[str, Any] = {"kind": "Conv2d", "dtype": torch.float32, "unit": ""}
    layers = [
        Layer(name=x, keys=Keys(f"{x}.weight"), shape=shape, layout=layout, **shared)
        for x, part in module.named_children()
        if (shape := linear_shape(part)) and (layout := layout_of(part))
    ]
    groups = input_groups(network, layers, {"x": torch.randn(1, 3, 8, 8)})
    assert groups == {"narrow": "narrow", "same": "narrow", "dilated": "dilated"}


VARIANTS: dict[str, dict[str, Any]] = {
    "curvature, certified": {"certification.num_sequences": 16},
    "curvature, sequential": {
        "compression.sequential": True,
        "compression.layers": {"along": {"method": "svd"}},  # this layer has too few tokens
    },
    "frobenius, centred": {"compression.method": "frobenius", "compression.center": True},
    "relu": {"compression.method": "relu"},
    "bfloat16, two factors": {"output.dtype": "bfloat16", "compression.storage": "factors"} | LESS,
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_plain_network_is_compressed_loaded_and_verified(
    plain_folder: pico.PlainFolder, tmp_path: Path, variant: str
) -> None:
    factory, settings = "pico_factories:pictures", {"compression.allocation": "relative"}
    changes = plain_folder.model("pictures") | settings | VARIANTS[variant]
    output, report = pico.compressed(tmp_path, changes | {"compression.rank_multiple": 1})
    kinds = {x["name"]: x["kind"] for x in report["layers"] if x["storage"] != "dense"}
    assert report["sequential"]["used"] is (variant == "curvature, sequential")
    if variant == "curvature, certified":
        assert report["certificate"]["statements"] and not report["certificate"]["not_covered"]
    assert {"first": "Conv2d", "second": "Conv2d", "along": "Conv1d"}.items() <= kinds.items()
    reasons = {x["name"]: x["reason"] for x in report["skipped"]}
    assert reasons["depthwise.weight"] == "a grouped convolution: its kernels are small already"
    loaded = lrc_cli.load(output, factory=factory)
    dense = lrc_cli.load(plain_folder.path / "pictures.safetensors", factory=factory)
    pixels = pico.read_state(plain_folder.path / "pixels.safetensors")["pixels"]
    dense.load_state_dict(with_biases(dense, pico.rebuilt(pico.read_state(output))))
    with torch.no_grad():
        got, wanted = loaded.float()(pixels), dense(pixels)
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item())
    assert len(list(stored_layers(loaded))) == len(kinds)
    checkpoint = plain_folder.path / "pictures.safetensors"
    ended = pico.call("verify", output, "--against", checkpoint, "--factory", factory)
    assert ended.code == 0, ended.out + ended.err


def with_biases(model: nn.Module, state: pico.State) -> pico.State:
    """Makes room for biases that `state` has and the model lacks; returns `state`."""
    for key, tensor in state.items():
        part, _, leaf = key.rpartition(".")
        if leaf == "bias" and model.get_submodule(part).bias is None:
            model.get_submodule(part).bias = nn.Parameter(torch.zeros_like(tensor))
    return state


def test_the_stated_error_is_that_of_the_convolution(
    plain_folder: pico.PlainFolder, tmp_path: Path
) -> None:
    changes = plain_folder.model("pictures") | {
        "compression.method": "frobenius",
        "compression.sequential": False,
        "calibration.num_sequences": 64,
    }
    output, report = pico.compressed(tmp_path, changes)
    errors = {x["name"]: x["errors"]["output"] for x in report["layers"] if "errors" in x}
    state = pico.rebuilt(pico.read_state(output))
    checkpoint = plain_folder.path / "pictures.safetensors"
    dense = lrc_cli.load(checkpoint, factory="pico_factories:pictures").requires_grad_(False)
    pixels = pico.read_state(plain_folder.path / "pixels.safetensors")["pixels"]
    first = dense.get_submodule("first")
    before = first(pixels)
    first.weight = nn.Parameter(state["first.weight"])
    error = ((first(pixels) - before).norm() / before.norm()).item()
    assert errors["first"]["stored"] == pytest.approx(error, rel=1e-3)
    assert errors["first"]["optimum"] <= errors["first"]["stored"] < errors["first"]["svd"]


@pytest.mark.parametrize("name", ["first", "second", "head"])
def test_the_estimate_of_every_layer_is_of_the_loss_per_image(
    plain_folder: pico.PlainFolder, tmp_path: Path, name: str
) -> None:
    """A convolution has a row for every place, and its errors count as often.

    The images are noise. The estimate leaves out products of different places, and with noise such
    products nearly cancel.
    """
    pixels = torch.randn(64, 3, 12, 10, generator=torch.Generator().manual_seed(3))
    save_file({"pixels": pixels}, tmp_path / "noise.safetensors")
    changes = plain_folder.model("pictures") | {
        "calibration.path": str(tmp_path / "noise.safetensors"),
        "calibration.num_sequences": 64,
        "compression.include": [name],
        "compression.loss": "output",
        "compression.size": 0.9,
        "compression.rank_multiple": 1,
        "compression.sequential": False,
    }
    output, report = pico.compressed(tmp_path, changes)
    (layer,) = (x for x in report["layers"] if x["storage"] != "dense")
    factory = "pico_factories:pictures"
    with torch.no_grad():
        before, after = (
            lrc_cli.load(path, factory=factory)(pixels)
            for path in (plain_folder.path / "pictures.safetensors", output)
        )
    measured = 0.5 * (after - before).square().sum().item() / len(pixels)
    estimated = layer["errors"]["metric"]["stored"]
    assert measured / 2 < estimated < measured * 2
