"""Layers whose factors would not do what the layer does are left dense, and said so."""

import json
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from safetensors.torch import save_file

import lrc_cli
from lrc_cli.applied import CALLED, OTHER, READ

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


class Fast(nn.Module):
    """Its encoder layer reads the weights of its linear layers where no gradient is asked for."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(24, 4, 48, batch_first=True)
        self.head = nn.Linear(24, 24)

    def forward(self, x):
        return self.head(self.layer(x.view(-1, 4, 24)).mean(1))


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(24, 24)

    def forward(self, x):
        return {"count": 3, "out": (self.head(x),)}


class Silent(Wrapped):
    def forward(self, x):
        return {"best": self.head(x).argmax(-1)}


def wrapped():
    return Wrapped()


def silent():
    return Silent()


def mixed():
    return Mixed()


def fast():
    return Fast()
'''


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Changes that make a config compress one of the networks above."""
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


def test_a_network_with_a_fast_path_around_its_layers_works(tmp_path: Path, job: Any) -> None:
    output, report = pico.compressed(tmp_path, job("fast", 96))
    reasons = {x["name"]: x["reason"] for x in report["skipped"]}
    assert reasons["layer.linear1.weight"] == reasons["layer.linear2.weight"] == READ
    assert [layer["name"] for layer in report["layers"]] == ["head"]
    with torch.no_grad():
        assert torch.isfinite(
            lrc_cli.load(output, factory="odd_layers:fast")(torch.randn(3, 96))
        ).all()


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
