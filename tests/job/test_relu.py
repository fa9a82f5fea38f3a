"""These tests compress with `method: relu`: which layers it takes, what is written and said."""

import json
from pathlib import Path
from typing import Any

import mnist
import pico
import pytest
import torch
from pico import Models
from torch import Tensor, nn

import lrc_cli
from lrc_cli.config import load_config
from lrc_cli.data.purposes import CALIBRATION
from lrc_cli.errors import InputError
from lrc_cli.execution.followed_by import followed_by
from lrc_cli.execution.network import Network, make_network
from lrc_cli.job.factors.layer_inputs import read_inputs
from lrc_cli.job.plan import Plan, make_plan
from lrc_cli.network.keys import Keys
from lrc_cli.network.layer import Layer
from lrc_cli.network.low_rank.stored import dense_weight

FC1 = [f"model.decoder.layers.{i}.fc1" for i in range(2)]


class Run:
    """Returns a finished job of the pico OPT, and the dense inputs of its fc1 layers."""

    def __init__(self, directory: Path, changes: dict[str, Any]) -> None:
        changes = {"compression.allocation": "uniform", "compression.sequential": False, **changes}
        self.output, self.report = pico.compressed(directory, changes)
        self.layers = {layer["name"]: layer for layer in self.report["layers"]}
        self.plan = make_plan(load_config(directory / "job.yaml"), force=True)


@pytest.fixture(scope="module")
def opt(checkpoint: Models, text: Path) -> dict[str, Any]:
    return {"model.path": str(checkpoint("opt")), "calibration.path": str(text)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, opt: dict[str, Any]) -> dict[str, Run]:
    return {
        method: Run(tmp_path_factory.mktemp(method), {**opt, "compression.method": method})
        for method in ("frobenius", "relu")
    }


def behind_relu(run: Run, name: str) -> tuple[float, float]:
    """Returns mean squared errors after the ReLU, per token: of a written layer, and of zeros."""
    layer = next(layer for layer in run.plan.layers if layer.name == name)
    x = read_inputs(run.plan.network, run.plan.sequences[CALIBRATION], layer, run.output).double()
    written = lrc_cli.load(run.output).get_submodule(name)
    bias = layer.bias(run.plan.source)
    assert bias is not None and isinstance(written.bias, Tensor)
    wanted = (x @ layer.weight(run.plan.source).double().T + bias.double()).relu()
    given = (x @ dense_weight(written).double().T + written.bias.detach().double()).relu()
    return tuple(t.square().sum().item() / len(x) for t in (wanted - given, wanted))  # type: ignore[return-value]


def test_layers_followed_by_relu_take_it_and_the_others_say_what_they_have(
    runs: dict[str, Run],
) -> None:
    for name, layer in runs["relu"].layers.items():
        assert layer["method"] == ("relu" if name in FC1 else "frobenius")
        assert layer["method_reason"] == (
            None if name in FC1 else "not followed by ReLU: fitted with frobenius"
        )
        assert not layer["fallback"]
    assert all(layer["method_reason"] is None for layer in runs["frobenius"].layers.values())
    assert runs["relu"].report["method"] == "relu"


@pytest.mark.parametrize("name", FC1)
def test_the_written_layer_has_the_reported_error_and_it_is_below_frobenius(
    runs: dict[str, Run], name: str
) -> None:
    error, _ = behind_relu(runs["relu"], name)
    metric = runs["relu"].layers[name]["errors"]["metric"]
    assert metric["stored"] == pytest.approx(error, rel=1e-4)
    assert metric["optimum"] is None and "behind the ReLU" in metric["unit"]
    assert error < metric["svd"] and error < 0.99 * behind_relu(runs["frobenius"], name)[0]
    assert runs["relu"].layers[name]["rank"] == runs["frobenius"].layers[name]["rank"]


@pytest.mark.parametrize("name", FC1)
def test_the_convex_programme_is_reported_with_its_certified_gap(
    runs: dict[str, Run], name: str
) -> None:
    facts = runs["relu"].layers[name]["relu"]
    ranks = [fact["rank"] for fact in facts]
    assert ranks == sorted(ranks) and runs["relu"].layers[name]["rank"] in ranks
    for fact in facts:
        assert 0 <= fact["gap"] <= 5e-3 * fact["objective"] and fact["penalty"] > 0


def test_only_the_biases_of_rectified_layers_change(runs: dict[str, Run]) -> None:
    run = runs["relu"]
    before = pico.read_state(run.plan.source.path)
    after = pico.read_state(run.output)
    changed = {
        key for key in before if key.endswith(".bias") and not torch.equal(before[key], after[key])
    }
    assert changed == {f"{name}.bias" for name in FC1}
    assert all(after[key].dtype == before[key].dtype for key in changed)


def test_it_is_deterministic(tmp_path: Path, opt: dict[str, Any], runs: dict[str, Run]) -> None:
    again = Run(tmp_path, {**opt, "compression.method": "relu"})
    states = [pico.read_state(run.output) for run in (runs["relu"], again)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_no_layer_followed_by_relu_is_refused_before_the_work(
    tmp_path: Path, llama_job: dict[str, Any]
) -> None:
    ended = pico.call("compress", pico.job(tmp_path, {**llama_job, "compression.method": "relu"}))
    assert ended.code == 2 and not (tmp_path / "out").exists()
    assert "compression.method: relu: no selected layer is followed by a ReLU" in ended.err
    assert "use frobenius or curvature" in ended.err


def test_a_bound_on_the_output_is_refused(tmp_path: Path, opt: dict[str, Any]) -> None:
    changes = {**opt, "compression.method": "relu", "compression.max_layer_error": 0.5}
    with pytest.raises(InputError, match="max_layer_error"):
        make_plan(load_config(pico.job(tmp_path, changes)))


def test_a_layer_may_have_the_method_alone(tmp_path: Path, opt: dict[str, Any]) -> None:
    changes = {
        **opt,
        "compression.method": "frobenius",
        "compression.layers": {"*.0.fc1": {"method": "relu"}},
    }
    run = Run(tmp_path, changes)
    methods = {name: layer["method"] for name, layer in run.layers.items()}
    assert methods.pop(FC1[0]) == "relu" and set(methods.values()) == {"frobenius"}


def test_a_layer_whose_problem_cannot_be_posed_is_left_dense_and_strict_says_so(
    tmp_path: Path, opt: dict[str, Any]
) -> None:
    """A singular Gram matrix with a tiny ridge has no Cholesky factor."""
    changes = {**opt, "compression.method": "relu", "compression.ridge": 1e-300, "evaluation": []}
    ended = pico.call("compress", pico.job(tmp_path, changes), "--strict")
    assert ended.code == 4, ended.err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    fallen = {x["name"]: x["reason"] for x in report["layers"] if x["fallback"]}
    assert set(fallen) == set(FC1)
    assert all("not positive definite" in reason for reason in fallen.values())


def test_a_network_of_a_factory(tmp_path: Path, plain_folder: pico.PlainFolder) -> None:
    changes = {
        **plain_folder.model("mlp"),
        "compression.method": "relu",
        "compression.sequential": False,
    }
    monkey = pytest.MonkeyPatch()
    monkey.syspath_prepend(str(plain_folder.path))
    try:
        _, report = pico.compressed(tmp_path, changes)
    finally:
        monkey.undo()
    methods = {layer["name"]: layer["method"] for layer in report["layers"]}
    assert methods == {"0": "relu", "2": "relu", "4": "frobenius"}


class Mixed(nn.Module):
    """A network with one layer for each use that an output may have."""

    def __init__(self) -> None:
        super().__init__()
        names = ("inplace", "viewed", "dropped", "module", "gelu", "residual", "returned", "twice")
        for name in (*names, "copied", "unused"):
            self.add_module(name, nn.Linear(6, 6))
        self.relu, self.dropout = nn.ReLU(), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x + torch.relu_(self.inplace(x))
        x = x + torch.relu(self.viewed(x).view(-1, 2, 3).transpose(1, 2)).flatten(1)
        x = x + nn.functional.relu(self.dropout(self.dropped(x)))
        x = x + self.relu(self.module(x))
        x = x + nn.functional.gelu(self.gelu(x))
        y = self.residual(x)
        x = y + torch.relu(y)
        x = x + torch.relu(self.twice(x))
        x = x + self.twice(x)
        x = x + torch.relu(self.copied(x) * 2)
        before = self.returned(x)
        return torch.relu(before), before


def test_what_follows_is_seen_in_a_forward_pass() -> None:
    torch.manual_seed(0)
    module = Mixed()
    layers = [a_layer(name) for name, part in module.named_children() if hasattr(part, "weight")]
    network = make_network(module, device=torch.device("cpu"), dtype=torch.float32)
    found = followed_by("ReLU", network, layers, {"x": torch.randn(5, 6)})
    assert found == {"inplace", "viewed", "dropped", "module"}


def a_layer(name: str) -> Layer:
    return Layer(
        name=name,
        keys=Keys(f"{name}.weight"),
        kind="Linear",
        shape=(6, 6),
        dtype=torch.float32,
        unit="",
    )


def test_the_inputs_are_the_rows_of_the_gram_matrix_without_padding(
    tmp_path: Path, plain_folder: pico.PlainFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(plain_folder.path))
    changes = {**plain_folder.model("attention"), "compression.method": "frobenius"}
    plan: Plan = make_plan(load_config(pico.job(tmp_path, changes)))
    sequences = plan.sequences[CALIBRATION]
    layer = next(layer for layer in plan.layers if layer.name == "query")
    network: Network = plan.network
    rows = read_inputs(network, sequences, layer, tmp_path)
    assert not list(tmp_path.glob("inputs-*")), "the file has no name any more"
    mask = sequences.inputs["attention_mask"].bool()
    assert torch.equal(rows, sequences.inputs["x"][mask]) and rows.dtype == torch.float32


def test_the_mnist_script_judges_every_layer_and_the_held_out_total(
    capsys: pytest.CaptureFixture[str],
) -> None:
    good = {"0": (1.0, 0.2, 0.1), "2": (1.0, 0.3, 0.3)}
    assert mnist.verdict(good, good) and not capsys.readouterr().out
    assert not mnist.verdict({**good, "2": (1.0, 0.3, 0.31)}, good)
    assert "layer 2" in capsys.readouterr().out
    assert not mnist.verdict(good, {**good, "2": (1.0, 0.3, 0.5)})
    assert "held out" in capsys.readouterr().out
