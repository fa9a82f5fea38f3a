"""Encoder layers of torch are compressed, and run with their factors, with torch's fast path on."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lrc_cli
from lrc_cli.network.fast_paths import without_fast_paths

SOURCE = '''
import torch
from torch import nn

WIDTH, STEPS = 24, 4


class Own(nn.TransformerEncoderLayer):
    """A class of the user's, which scales what torch's class returns."""

    def forward(self, *given, **named):
        return 0.5 * super().forward(*given, **named)


class Net(nn.Module):
    def __init__(self, kind=nn.TransformerEncoderLayer, nested=None, encoded=True, **settings):
        super().__init__()
        settings = {"batch_first": True, "dropout": 0.0} | settings
        layer = kind(WIDTH, 4, 48, **settings)
        self.body = layer
        if encoded:
            self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=bool(nested))
        self.head = nn.Linear(WIDTH, 8)
        self.nested = nested

    def forward(self, x):
        x = x.view(-1, STEPS, WIDTH)
        if self.nested is None:
            return self.head(self.body(x).mean(1))
        padded = torch.zeros(x.shape[:2], dtype=torch.bool)
        padded[:, -1] = True
        return self.head(self.body(x, src_key_padding_mask=padded)[:, :-1].mean(1))


class Both(nn.Module):
    """torch's encoder and decoder."""

    def __init__(self):
        super().__init__()
        self.net = nn.Transformer(WIDTH, 4, 1, 1, 48, dropout=0.0, batch_first=True)

    def forward(self, x):
        x = x.view(-1, STEPS, WIDTH)
        return self.net(x, x)


def layer(): return Net(encoded=False)
def encoder(): return Net()
def padded(): return Net(nested=False)
def nested(): return Net(nested=True)
def gelu(): return Net(activation="gelu")
def norm_first(): return Net(norm_first=True)
def steps_first(): return Net(batch_first=False)
def no_bias(): return Net(bias=False)
def own(): return Net(kind=Own)
def both(): return Both()
'''
NETWORKS = [
    *("layer", "encoder", "padded", "nested", "gelu"),
    *("norm_first", "steps_first", "no_bias", "own", "both"),
]


@pytest.fixture(autouse=True)
def switch() -> Iterator[None]:
    """The fast path is on before a test, and on after it."""
    assert torch.backends.mha.get_fastpath_enabled()
    yield
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns the changes that make a config compress a network of SOURCE."""
    (tmp_path / "encoders.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    namespace: dict[str, Any] = {}
    exec(SOURCE, namespace)
    torch.manual_seed(0)
    save_file({"x": torch.randn(80, 96)}, tmp_path / "rows.safetensors")

    def changes(name: str, **more: Any) -> dict[str, Any]:
        model = namespace[name]()
        pico.randomise(model)
        save_file(model.state_dict(), tmp_path / "net.safetensors")
        return {
            "model.path": str(tmp_path / "net.safetensors"),
            "model.factory": f"encoders:{name}",
            "calibration.path": str(tmp_path / "rows.safetensors"),
            "calibration.num_sequences": 60,
            "compression.method": "frobenius",
            "compression.sequential": False,
            **more,
        }

    return changes


def dense_of(name: str, output: Path) -> nn.Module:
    """Returns the network with torch's own layers, which hold the factors multiplied out."""
    namespace: dict[str, Any] = {}
    exec(SOURCE, namespace)
    model: nn.Module = namespace[name]()
    model.load_state_dict(pico.rebuilt(pico.read_state(output)))
    return model.eval()


@pytest.mark.parametrize("storage", ["factors", "interpolative"])
@pytest.mark.parametrize("name", NETWORKS)
def test_feed_forward_layers_are_compressed_and_run(
    name: str, storage: str, tmp_path: Path, job: Any
) -> None:
    settings = {"storage": storage, "size": 0.7, "include": ["*linear?"]}
    changes = job(name, **{f"compression.{key}": value for key, value in settings.items()})
    output, report = pico.compressed(tmp_path, changes)
    able = {layer["name"].rpartition(".")[2] for layer in report["layers"] if layer.get("rank")}
    assert {"linear1", "linear2"} <= able
    got, dense = lrc_cli.load(output, factory=f"encoders:{name}"), dense_of(name, output)
    x = torch.randn(5, 96)
    with torch.no_grad():
        fast = got(x)
        with without_fast_paths():
            slow = got(x)
        torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(fast, dense(x), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(got(x).detach(), fast, rtol=1e-5, atol=1e-5)


def test_the_switch_of_the_process_changes_nothing(tmp_path: Path, job: Any) -> None:
    changes = job("encoder")
    with without_fast_paths():
        first, _ = pico.compressed(tmp_path, changes)
        assert not torch.backends.mha.get_fastpath_enabled()
    second = {**changes, "output.path": str(tmp_path / "second")}
    other, _ = pico.compressed(tmp_path, second, "--restart")
    one, two = pico.read_state(first), pico.read_state(other)
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_curvature_reaches_the_layers_and_verify_passes(tmp_path: Path, job: Any) -> None:
    changes = job("encoder", **{"compression.method": "curvature", "compression.loss": "output"})
    output, report = pico.compressed(tmp_path, changes)
    assert any("linear1" in layer["name"] for layer in report["layers"])
    against = ("--against", tmp_path / "net.safetensors", "--factory", "encoders:encoder")
    ended = pico.call("verify", output, *against)
    assert ended.code == 0, ended.out + ended.err


def test_the_switch_comes_back_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), without_fast_paths():
        assert not torch.backends.mha.get_fastpath_enabled()
        raise ZeroDivisionError
    assert torch.backends.mha.get_fastpath_enabled()
