"""These tests fit networks sequentially that are no stack of equal blocks."""

from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from families import FAMILIES
from safetensors.torch import save_file
from sequential_helpers import Changes, assert_errors_as_written, assert_verified, factorised

FACTORIES = '''
import torch
from torch import nn


class Experts(nn.Module):
    """Each token goes through the expert that the router picks."""

    def __init__(self):
        super().__init__()
        self.first, self.router = nn.Linear(24, 24), nn.Linear(24, 2)
        self.left, self.right = nn.Linear(24, 24), nn.Linear(24, 24)
        self.last = nn.Linear(24, 16)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        picked = self.router(x).argmax(-1)
        y = torch.empty_like(x)
        y[picked == 0], y[picked == 1] = self.left(x[picked == 0]), self.right(x[picked == 1])
        return self.last(y)


class Twice(nn.Module):
    """One layer runs twice."""

    def __init__(self):
        super().__init__()
        self.first, self.again, self.last = (nn.Linear(24, 24) for _ in range(3))

    def forward(self, x):
        return self.last(self.again(torch.tanh(self.again(torch.tanh(self.first(x))))))


class Branching(nn.Module):
    """Two branches from one input, of which one goes down, up and past itself: a U."""

    def __init__(self):
        super().__init__()
        self.before, self.aside = nn.Linear(24, 32), nn.Linear(24, 16)
        self.down, self.bottom = nn.Linear(32, 20), nn.Linear(20, 20)
        self.up, self.across = nn.Linear(20, 32), nn.Linear(32, 16)
        self.last = nn.Linear(32, 16)

    def forward(self, x):
        top = torch.tanh(self.before(x))
        low = torch.tanh(self.down(top))
        low = torch.tanh(self.bottom(low)) + low
        top = torch.tanh(self.up(low)) + top
        return self.last(torch.cat([torch.tanh(self.across(top)), self.aside(x)], dim=-1))


def experts():
    return Experts()


def branching():
    return Branching()


def twice():
    return Twice()
'''


@pytest.fixture
def plain_job(
    plain_folder: pico.PlainFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Any:
    """Returns changes for networks outside transformers, with 1200 calibration rows."""
    for name, source in (("more_factories", FACTORIES), ("pico_factories", pico.FACTORY_SOURCE)):
        (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    generator = torch.Generator().manual_seed(8)
    colour = torch.randn(24, 24, generator=generator)
    save_file(
        {"x": torch.randn(1200, 24, generator=generator) @ colour}, tmp_path / "x.safetensors"
    )

    def changes(name: str, factory: str = "more_factories", **compression: Any) -> Changes:
        namespace: dict[str, Any] = {}
        exec(FACTORIES + pico.FACTORY_SOURCE, namespace)
        torch.manual_seed(3)
        model = namespace[name]()
        pico.randomise(model)
        save_file(model.state_dict(), tmp_path / f"{name}.safetensors")
        return {
            "model.path": str(tmp_path / f"{name}.safetensors"),
            "model.factory": f"{factory}:{name}",
            "calibration.path": str(tmp_path / "x.safetensors"),
            "calibration.num_sequences": 1200,
            "evaluation": [],
            "compression.sequential": True,
            "compression.rank_multiple": 1,
            **{f"compression.{key}": value for key, value in compression.items()},
        }

    return changes


@pytest.mark.parametrize("method", ["frobenius", "curvature"])
def test_a_plain_network_runs_whole(method: str, tmp_path: Path, plain_job: Any) -> None:
    changes = plain_job("mlp", "pico_factories", method=method)
    _, report = pico.compressed(tmp_path, changes)
    assert [layer["sequential"] for layer in report["layers"][:2]] == [True, True]
    assert all(layer["sequential"] for layer in factorised(report))
    assert_errors_as_written(tmp_path, report)


@pytest.mark.parametrize("method", ["frobenius", "curvature"])
def test_branches_that_meet_again(method: str, tmp_path: Path, plain_job: Any) -> None:
    """A layer's input comes from several branches, all compressed before the layer."""
    changes = plain_job("branching", method=method, size=0.5, allocation="uniform")
    _, report = pico.compressed(tmp_path, changes)
    assert {x["name"] for x in report["layers"] if x["sequential"]} >= {"up", "across", "last"}
    assert all(x["storage"] != "dense" for x in report["layers"])
    assert_errors_as_written(tmp_path, report)
    assert_verified(tmp_path, changes)


@pytest.mark.parametrize("name", ["t5-headed", "bart-headed"])
@pytest.mark.parametrize("embeddings", [False, True])
def test_an_encoder_and_a_decoder(embeddings: bool, name: str, tmp_path: Path) -> None:
    """The decoder's layers read what the compressed encoder returns."""
    model = FAMILIES[name].build()
    pico.randomise(model)
    model.save_pretrained(tmp_path / "dense")
    generator = torch.Generator().manual_seed(6)
    ids = {
        "input_ids": torch.randint(4, 64, (96, 12), generator=generator),
        "decoder_input_ids": torch.randint(4, 64, (96, 10), generator=generator),
    }
    save_file(ids, tmp_path / "ids.safetensors")
    changes = {
        "model.path": str(tmp_path / "dense"),
        "calibration.path": str(tmp_path / "ids.safetensors"),
        "calibration.num_sequences": 96,
        "evaluation": None,
        "compression.sequential": True,
        "compression.embeddings": embeddings,
        "compression.size": 0.5,
        "compression.allocation": "uniform",
        "compression.rank_multiple": 1,
    }
    _, report = pico.compressed(tmp_path, changes)
    done = [layer["name"] for layer in report["layers"] if layer["sequential"]]
    cross = ("EncDecAttention.k", "encoder_attn.k_proj")
    assert any(name.endswith(cross) for name in done) and any("encoder." in x for x in done)
    assert_verified(tmp_path, changes)


def test_padding_does_not_count(tmp_path: Path, plain_job: Any) -> None:
    generator = torch.Generator().manual_seed(9)
    lengths = torch.randint(3, 11, (128,), generator=generator)
    mask = (torch.arange(10)[None] < lengths[:, None]).long()
    colour = torch.randn(24, 24, generator=generator)
    x = torch.randn(128, 10, 24, generator=generator) @ colour
    save_file({"x": x, "attention_mask": mask}, tmp_path / "masked.safetensors")
    changes = plain_job("attention", "pico_factories", method="frobenius", size=0.8)
    masked = {"calibration.path": str(tmp_path / "masked.safetensors")}
    changes |= masked | {"calibration.num_sequences": 128}
    _, report = pico.compressed(tmp_path, changes)
    assert report["sequential"]["used"]
    assert_errors_as_written(tmp_path, report)


def test_layers_that_are_not_reached_stay_dense(tmp_path: Path, plain_job: Any) -> None:
    changes = plain_job("with_idle", "pico_factories", method="frobenius", size=0.9)
    _, report = pico.compressed(tmp_path, changes)
    idle = next(layer for layer in report["layers"] if layer["name"] == "idle")
    assert idle["storage"] == "dense" and idle["fallback"] and not idle["sequential"]
    assert idle["sequential_reason"] == "the first calibration sequences do not reach it"
    assert any(layer["sequential"] for layer in report["layers"])


@pytest.mark.parametrize(
    ("name", "layers", "reason"),
    [
        ("experts", ["left", "right"], "the tokens that reach it depend on the layers before it"),
        ("twice", ["again"], "it runs several times in a pass, on several inputs"),
    ],
)
def test_layers_without_one_input_for_every_token_are_fitted_plainly(
    name: str, layers: list[str], reason: str, tmp_path: Path, plain_job: Any
) -> None:
    asked = {"method": "frobenius", "allocation": "uniform", "size": 0.5}
    # A lone row leaves an expert without a token, which every storage must accept.
    asked |= {"exclude": ["router"], "storage": "interpolative"}
    _, report = pico.compressed(tmp_path, plain_job(name, **asked))
    assert report["sequential"]["used"]
    for layer in report["layers"]:
        assert layer["storage"] != "dense" and layer["sequential"] is (layer["name"] not in layers)
        assert layer.get("sequential_reason") == (None if layer["sequential"] else reason)
