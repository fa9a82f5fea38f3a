"""Layers stay dense, with the reason, where factors would not do what the layer does."""

import json
from collections import Counter, OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pico
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import lrc_cli
from lrc_cli.config import load_config
from lrc_cli.data.draw import Sequences
from lrc_cli.errors import InputError
from lrc_cli.execution.input_checks import probe
from lrc_cli.execution.network import make_network
from lrc_cli.execution.placement import block_names
from lrc_cli.execution.segments import find_segments
from lrc_cli.execution.weight_use import CALLED, OTHER, READ, _is_product, observe, reasons_of
from lrc_cli.job.plan import make_plan
from lrc_cli.network.keys import Keys
from lrc_cli.network.layer import Layer
from lrc_cli.network.layouts import layout_of

SOURCE = '''
import torch
import torch.nn.functional as F
from torch import nn


class Cosine(nn.Linear):
    """A linear layer by its class only: directions, not products."""

    def forward(self, x):
        return 5 * F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=-1), self.bias)


class Pair(nn.Linear):
    """Returns more than a product."""

    def forward(self, x):
        y = super().forward(x)
        return y, y.softmax(-1)


class Same(nn.Linear):
    """Another way to the same product."""

    def forward(self, x):
        return x @ self.weight.T + self.bias


class Standardised(nn.Conv1d):
    def _conv_forward(self, x, weight, bias):
        weight = weight - weight.mean(dim=(1, 2), keepdim=True)
        return super()._conv_forward(x, weight, bias)


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.cosine, self.pair, self.same = Cosine(24, 24), Pair(24, 24), Same(24, 24)
        self.standardised = Standardised(1, 16, 5)
        self.read, self.typed, self.head, self.named = (nn.Linear(24, 24) for _ in range(4))

    def forward(self, x):
        x = self.cosine(x) + self.pair(x)[0] + self.same(x)
        x = x + self.standardised(x[:, None]).mean((1, 2))[:, None]
        x = self.named(input=x)
        x = self.read(x) + F.linear(x, self.read.weight)
        return self.head(self.typed(x).to(self.typed.weight.dtype))


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(24, 24)

    def forward(self, x):
        return {"count": 3, "out": (self.head(x),)}


class Silent(Wrapped):
    def forward(self, x):
        return {"best": self.head(x).argmax(-1)}


class Shaped(Wrapped):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(24, 24)

    def forward(self, x):
        return self.head(self.first(x)[:, : self.first.weight.shape[0]])


def shaped():
    return Shaped()


def wrapped():
    return Wrapped()


def silent():
    return Silent()


def mixed():
    return Mixed()
'''


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns the changes that make a config compress a network of SOURCE."""
    (tmp_path / "odd_layers.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    namespace: dict[str, Any] = {}
    exec(SOURCE, namespace)

    def changes(name: str, width: int) -> dict[str, Any]:
        torch.manual_seed(0)
        save_file(namespace[name]().state_dict(), tmp_path / f"{name}.safetensors")
        save_file({"x": torch.randn(200, width)}, tmp_path / "rows.safetensors")
        return {
            "model.path": str(tmp_path / f"{name}.safetensors"),
            "model.factory": f"odd_layers:{name}",
            "calibration.path": str(tmp_path / "rows.safetensors"),
            "calibration.num_sequences": 200,
            "compression.method": "frobenius",
            "compression.sequential": False,
            "evaluation": None,
        }

    return changes


def test_a_layer_that_is_no_product_stays_dense(tmp_path: Path, job: Any) -> None:
    output, report = pico.compressed(tmp_path, job("mixed", 24))
    reasons = {x["name"]: x["reason"] for x in report["skipped"] if "bias" not in x["name"]}
    assert reasons == {
        "cosine.weight": OTHER,
        "pair.weight": OTHER,
        "standardised.weight": OTHER,
        "read.weight": READ,
        "named.weight": CALLED,
    }
    assert {layer["name"] for layer in report["layers"]} == {"same", "typed", "head"}
    x = torch.randn(8, 24)
    before, after = (
        lrc_cli.load(path, factory="odd_layers:mixed")
        for path in (tmp_path / "mixed.safetensors", output)
    )
    with torch.no_grad():
        assert torch.isfinite(after(x)).all()
        assert torch.equal(after.cosine(x), before.cosine(x))


def test_where_nothing_is_left_it_is_an_error(tmp_path: Path, job: Any) -> None:
    changes = job("mixed", 24) | {"compression.include": ["cosine", "pair"]}
    ended = pico.call("compress", pico.job(tmp_path, changes))
    assert ended.code == 2 and "no layer is selected" in ended.err


@pytest.mark.parametrize("name", ["wrapped", "silent"])
def test_outputs_inside_of_tuples_count_where_there_are_no_others(
    name: str, tmp_path: Path, job: Any
) -> None:
    changes = job(name, 24) | {"compression.loss": "output", "compression.method": "curvature"}
    ended = pico.call("compress", pico.job(tmp_path, changes))
    if name == "wrapped":
        assert ended.code == 0, ended.err
        report = json.loads((tmp_path / "out" / "report.json").read_text())
        assert {x["name"] for x in report["layers"]} == {"head"}
    else:
        assert ended.code == 2 and "returns no floating-point tensor" in ended.err


def test_one_pass_looks_at_all_layers(tmp_path: Path, llama_job: dict[str, Any]) -> None:
    """One run of the network tells the checks everything, and one more run finds the blocks."""
    plan = make_plan(load_config(pico.job(tmp_path, llama_job)))
    network, blocks = plan.network, block_names(plan.network.module)
    (one,) = plan.sequences["calibration"].split(1)[0].batches(1)
    calls: Counter[str] = Counter()
    handles = [
        network.module.get_submodule(name).register_forward_pre_hook(
            lambda *_, name=name: calls.update([name])
        )
        for name in blocks
    ]
    uses = probe(network, {"calibration": plan.sequences["calibration"]}, plan.layers)
    assert reasons_of(network, plan.layers, uses) == {}
    assert calls == dict.fromkeys(blocks, 1)
    calls.clear()
    assert find_segments(network, plan.layers, (), one).chain.names == blocks
    # Handing hidden states on, without computing anything, is the second call. The third call is
    # each block by itself, once for a network.
    assert calls == dict.fromkeys(blocks, 3)
    calls.clear()
    assert find_segments(network, plan.layers, (), one).chain.names == blocks
    assert calls == dict.fromkeys(blocks, 2)
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_a_small_difference_from_the_product_is_seen(kind: str) -> None:
    """Outputs are compared on random directions: a tenth off is told, rounding is not."""
    torch.manual_seed(0)
    linear = kind == "linear"
    part = torch.nn.Linear(48, 96) if linear else torch.nn.Conv1d(6, 96, 8)
    x = torch.randn(5, 48) if linear else torch.randn(2, 6, 30)
    layer = cast(Layer, SimpleNamespace(layout=layout_of(part), name="part"))
    y = part(x).detach()
    for off, held in ((0.0, True), (2**-9, True), (0.1, False)):
        found = y + off * y.norm() / y.numel() ** 0.5 * torch.randn_like(y)
        assert _is_product(layer, part, part.weight.detach(), x, found) is held
    assert not _is_product(layer, part, part.weight.detach(), x, y[..., :-1].contiguous())
    assert not _is_product(layer, part, part.weight.detach(), x, (y, y))


class Cosine(torch.nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 5 * F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=-1), self.bias)


class Padding(torch.nn.Linear):
    """A layer that takes shorter rows than a product with its weight does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(F.pad(x, (0, 4)))


class Network(torch.nn.Module):
    """A network that does what `compute` does."""

    def __init__(self, compute: Any, **kinds: type[torch.nn.Linear]) -> None:
        super().__init__()
        self.compute = compute
        self.fused: Any = None
        self.by_length: dict[int, torch.Tensor] = OrderedDict()
        for name in ("first", "second", "head"):
            setattr(self, name, kinds.get(name, torch.nn.Linear)(24, 24))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.compute(self, x)
        return y


def layers_of(*names: str) -> list[Layer]:
    return [
        Layer(
            name=name,
            keys=Keys(f"{name}.weight"),
            kind="Linear",
            shape=(24, 24),
            dtype=torch.float32,
            unit="",
        )
        for name in names
    ]


def judged(module: torch.nn.Module, scale: float = 1.0) -> tuple[dict[str, str], torch.Tensor]:
    """Returns the reason for each layer, and what the network returned while it was judged."""
    network = make_network(module, device=torch.device("cpu"), dtype=torch.float32)
    layers = layers_of("first", "second", "head")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(scale)
        outputs, use = observe(network, layers, {"x": torch.randn(3, 24)})
    assert isinstance(outputs, torch.Tensor)
    return reasons_of(network, layers, [use]), outputs


def in_turn(net: Any, x: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = net.head(net.second(net.first(x)))
    return y


@pytest.mark.parametrize(
    "error", [AssertionError, ValueError, ZeroDivisionError, type("Own", (Exception,), {})]
)
def test_a_network_that_stumbles_over_a_hidden_weight_reads_it(error: type[Exception]) -> None:
    def compute(net: Any, x: torch.Tensor) -> torch.Tensor:
        if not net.first.weight.isfinite().all():
            raise error("a damaged weight")
        return in_turn(net, x)

    reasons, outputs = judged(Network(compute))
    assert reasons == {"first": READ} and outputs.isfinite().all()


def test_what_comes_behind_a_weight_that_is_read_is_judged_too() -> None:
    def compute(net: Any, x: torch.Tensor) -> torch.Tensor:
        return net.head(net.second(net.first(x) + F.linear(x, net.first.weight)))

    reasons, _ = judged(Network(compute, second=Cosine))
    assert reasons == {"first": READ, "second": OTHER}


@pytest.mark.parametrize("how", ["after", "before", "instance"])
def test_what_hooks_do_to_a_layer_counts(how: str) -> None:
    """Factors would run without the hooks of their layer."""
    module = Network(in_turn)
    if how == "after":
        module.second.register_forward_hook(lambda _, __, y: 2 * y.relu())
    elif how == "before":
        module.second.register_forward_pre_hook(lambda _, args: (-3 * args[0].relu(),))
    else:
        weight = module.second.weight
        module.second.forward = lambda x: F.linear(x, weight.sign())
    assert judged(module)[0] == {"second": OTHER}
    module = Network(in_turn)
    module.second.register_forward_hook(lambda *_: None)
    assert judged(module)[0] == {}


def test_what_a_network_keeps_of_hidden_weights_is_forgotten() -> None:
    def fuse(net: Any, x: torch.Tensor) -> torch.Tensor:
        if net.fused is None:
            net.fused = net.by_length[len(x)] = net.first.weight + net.second.weight
            net.register_buffer("table", net.fused.sum(0), persistent=False)
        return net.head(F.linear(x, net.by_length[len(x)])) + net.table

    module = Network(fuse)
    reasons, outputs = judged(module)
    assert reasons == {"first": READ, "second": READ} and outputs.isfinite().all()
    with torch.no_grad():
        assert module(torch.randn(3, 24)).isfinite().all()


def test_a_hidden_weight_may_show_as_infinity() -> None:
    def masked(net: Any, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = in_turn(net, x)
        return y.masked_fill(~(net.first.weight.norm() > 0), -torch.inf)

    reasons, outputs = judged(Network(masked))
    assert reasons == {"first": READ} and outputs.isfinite().all()


@pytest.mark.parametrize("why", ["mask", "kept elsewhere"])
def test_a_network_whose_outputs_are_not_finite_is_refused(why: str) -> None:
    """A sum of hidden weights that a network keeps elsewhere stays NaN from then on."""
    elsewhere = SimpleNamespace(fused=None)

    def masked(net: Any, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = in_turn(net, x)
        return y.masked_fill(torch.arange(24) < 3, -torch.inf)

    def keeping(net: Any, x: torch.Tensor) -> torch.Tensor:
        if elsewhere.fused is None:
            elsewhere.fused = net.first.weight + net.second.weight
        y: torch.Tensor = net.head(F.linear(x, elsewhere.fused))
        return y

    module = Network(masked if why == "mask" else keeping)
    network = make_network(module, device=torch.device("cpu"), dtype=torch.float32)
    data = Sequences(name="calibration", inputs={"x": torch.randn(3, 24)}, sha256="", population=3)
    with pytest.raises(InputError, match="outputs are NaN or infinite on x"):
        probe(network, {"calibration": data}, layers_of("first", "second", "head"))


@pytest.mark.parametrize("error", [MemoryError(), OSError(5, "Input/output error")])
def test_what_is_not_the_networks_fault_is_not_taken_for_it(error: Exception) -> None:
    def compute(net: Any, x: torch.Tensor) -> torch.Tensor:
        if not net.first.weight.isfinite().all():
            raise error
        return in_turn(net, x)

    with pytest.raises(type(error)):
        judged(Network(compute))


@pytest.mark.parametrize("options", [["--dry-run"], ["--set", "compression.sequential=true"], []])
def test_code_that_fails_on_factors_is_said_in_a_sentence(
    options: list[str], tmp_path: Path, job: Any
) -> None:
    """The network's code reads its width off a weight's shape, and no values past the layer."""
    changes = job("shaped", 24) | {"calibration.num_sequences": 500}
    save_file({"x": torch.randn(800, 24)}, tmp_path / "rows.safetensors")
    ended = pico.call("compress", pico.job(tmp_path, changes), *options)
    assert ended.code == 1 and "error: the compressed network fails: RuntimeError" in ended.err
    assert "; exclude the layers whose weight its code reads" in ended.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e20])
def test_products_are_told_at_any_size(scale: float) -> None:
    class Positive(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x, self.weight.abs(), self.bias)

    def each(net: Any, x: torch.Tensor) -> torch.Tensor:
        return net.first(x) + net.second(x) + net.head(x)

    assert judged(Network(each, second=Positive), scale)[0] == {"second": OTHER}


def test_a_layer_that_takes_what_no_product_takes_is_none() -> None:
    def compute(net: Any, x: torch.Tensor) -> torch.Tensor:
        return net.head(net.second(net.first(x)[..., :20]))

    reasons, _ = judged(Network(compute, second=Padding, head=Cosine))
    assert reasons == {"second": OTHER, "head": OTHER}


AUTOCAST = """
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(24, 32), nn.Linear(32, 24)
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            x = self.first(x)
        return self.last(x.float())
"""


@pytest.mark.parametrize("include", [["first"], ["first", "last"]])
def test_a_layer_under_autocast_stays_dense_with_its_reason(
    include: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "autocast_net.py").write_text(AUTOCAST)
    monkeypatch.syspath_prepend(tmp_path)
    layers = {"first": torch.nn.Linear(24, 32), "last": torch.nn.Linear(32, 24)}
    state = {f"{name}.{key}": x for name, layer in layers.items()
             for key, x in layer.state_dict().items()}  # fmt: skip
    save_file(state, tmp_path / "net.safetensors")
    save_file({"x": torch.randn(300, 24)}, tmp_path / "x.safetensors")
    changes = {"model.path": str(tmp_path / "net.safetensors"), "evaluation": [],
               "model.factory": "autocast_net:Net", "compression.include": include,
               "calibration.path": str(tmp_path / "x.safetensors")}  # fmt: skip
    ended = pico.call("compress", pico.job(tmp_path, changes))
    if include == ["first"]:
        assert ended.code == 2 and "no layer is selected" in ended.err
        assert "first computes in bfloat16, coarser than its weight in float32" in ended.err
        return
    assert ended.code == 0, ended.err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [x["name"] for x in report["layers"]] == ["last"]
    assert any("autocast" in x["reason"] for x in report["skipped"])
    ended = pico.call("verify", tmp_path / "out", "--against", tmp_path / "net.safetensors",
                      "--factory", "autocast_net:Net")  # fmt: skip
    assert ended.code == 0, ended.out
