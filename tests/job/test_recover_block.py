"""Tests of `recover.scope: block`: windows are trained in turn, and never end worse."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from families import FAMILIES
from pico import Models, PlainFolder
from recover_helpers import plain_and_trained
from safetensors.torch import save_file
from torch import nn

from lrc_cli.config import load_config
from lrc_cli.engine.training import Training
from lrc_cli.execution.network import make_network
from lrc_cli.job.recover import scope as scope_module
from lrc_cli.job.recover.windows import find_windows
from lrc_cli.job.run import compress
from lrc_cli.verify.files.training import training_problem

TRAINED = {"recover.scope": "block", "recover.tokens": 8000}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "factors": ("llama", {"compression.storage": "factors"}),
    "interpolative": ("llama", {"compression.storage": "interpolative"}),
    "sequential": ("llama", {"compression.sequential": True, "compression.size": 0.5}),
    "embeddings": ("llama", {"compression.embeddings": True, "compression.exclude": []}),
    "fp16": ("llama-fp16", {}),
    "spilled": ("llama", {"runtime.memory_limit": 1}),
    "biases and norms": ("qwen2", {"recover.norms": True}),
    "masked tokens": ("bert-mlm", {}),
}


@pytest.fixture(scope="module", params=list(CASES))
def pair(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    checkpoint: Models,
    text: Path,
) -> tuple[Path, Any, Path, Any]:
    """The outputs and reports of a job without and with training."""
    name, changes = CASES[request.param]
    return plain_and_trained(
        tmp_path_factory, checkpoint(name), text, changes=changes, trained=TRAINED
    )


def test_no_window_ends_worse_and_the_whole_is_better(pair: tuple[Path, Any, Path, Any]) -> None:
    _, _, _, report = pair
    recovery = report["recovery"]
    assert recovery["scope"] == "block" and recovery["after"] < recovery["before"]
    assert all(window["after"] <= window["before"] for window in recovery["windows"])
    assert any(window["after"] < window["before"] for window in recovery["windows"])
    assert [len(window["blocks"]) for window in recovery["windows"]] == [1, 1]


def test_only_what_the_report_names_moves(pair: tuple[Path, Any, Path, Any]) -> None:
    plain, before, trained, after = pair
    first, second = pico.read_state(plain), pico.read_state(trained)
    assert {k: (x.shape, x.dtype) for k, x in first.items()} == {
        k: (x.shape, x.dtype) for k, x in second.items()
    }
    moved = {key for key in first if not torch.equal(first[key], second[key])}
    gained = [x for x in after["recovery"]["windows"] if x["after"] < x["before"]]
    layers = {layer for window in gained for layer in window["layers"]}
    assert {row["name"] for row in after["layers"] if row.get("trained")} == layers
    parts = ("weight", "up.weight", "bias")
    allowed = {f"{layer}.{part}" for layer in layers for part in parts}
    assert moved and moved <= allowed | {*after["recovery"].get("norms", ())}
    assert before["size"] == after["size"]


def test_the_output_is_verified(pair: tuple[Path, Any, Path, Any]) -> None:
    import yaml

    _, _, trained, after = pair
    source = yaml.safe_load(after["provenance"]["config"])["model"]["path"]
    ended = pico.call("verify", trained, "--against", source)
    assert ended.code == 0, ended.out
    assert "recovery.windows" in ended.out


def _family_job(tmp_path: Path, name: str) -> dict[str, Any]:
    family = FAMILIES[name]
    model = family.build()
    pico.randomise(model)
    model.save_pretrained(tmp_path / "dense")
    save_file(dict(family.inputs), tmp_path / "data.safetensors")
    return {
        "model.path": str(tmp_path / "dense"),
        "calibration.path": str(tmp_path / "data.safetensors"),
        "calibration.num_sequences": 20,
        "evaluation": None,
        **TRAINED,
    }


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("bert", ["encoder.layer.0", "encoder.layer.1"]),
        ("bart", [f"{x}.layers.{i}" for x in ("encoder", "decoder") for i in (0, 1)]),
        ("whisper", [f"{x}.layers.{i}" for x in ("encoder", "decoder") for i in (0, 1)]),
        ("vit", ["layers.0", "layers.1"]),
        ("resnet", ["resnet.encoder.stages.0", "resnet.encoder.stages.1"]),
        ("mixtral", ["model.layers.0", "model.layers.1"]),
    ],
)
def test_every_family_whose_blocks_are_chains_is_trained(
    name: str, blocks: list[str], tmp_path: Path
) -> None:
    output, report = pico.compressed(tmp_path, _family_job(tmp_path, name))
    recovery = report["recovery"]
    assert [block for x in recovery["windows"] for block in x["blocks"]] == blocks
    assert recovery["after"] <= recovery["before"]
    assert all(window["after"] <= window["before"] for window in recovery["windows"])
    assert any(window["after"] < window["before"] for window in recovery["windows"])
    ended = pico.call("verify", output, "--against", tmp_path / "dense")
    assert ended.code == 0, ended.out


@pytest.mark.parametrize("name", ["t5", "mlp"])
def test_a_network_without_a_chain_is_refused_before_any_work(
    name: str, tmp_path: Path, plain_folder: PlainFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(plain_folder.path)
    changes = plain_folder.model(name) | TRAINED if name == "mlp" else _family_job(tmp_path, name)
    job = pico.job(tmp_path, changes)
    for command in ("plan", "compress"):
        ended = pico.call(command, job)
        assert ended.code == 2 and "set recover.scope: model" in ended.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("window", "in_window"), [(0, 1), (0, 5), (1, 1), (1, 6)])
def test_a_killed_training_goes_on_with_the_same_bits(
    window: int,
    in_window: int,
    tmp_path: Path,
    checkpoint: Models,
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changes = {"model.path": str(checkpoint("llama")), "calibration.path": str(text), **TRAINED}
    whole, report = pico.compressed(tmp_path, changes | {"output.path": str(tmp_path / "whole")})
    monkeypatch.setattr(scope_module, "STORE_SECONDS", 0.0)
    done = [len(x["trials"]) + x["steps"] for x in report["recovery"]["windows"][:window]]
    killed_after = sum(done) + in_window
    steps = []
    run = Training.run

    def killed(training: Training) -> Any:
        for number in run(training):
            yield number
            steps.append(number)
            if len(steps) == killed_after:
                raise KeyboardInterrupt

    monkeypatch.setattr(Training, "run", killed)
    job = pico.job(
        tmp_path,
        changes | {"output.path": str(tmp_path / "again"), "runtime.work_dir": str(tmp_path / "w")},
    )
    with pytest.raises(KeyboardInterrupt):
        compress(load_config(job))
    outcomes = list((tmp_path / "w").rglob("unfinished/*/outcome.safetensors"))
    assert len(outcomes) == window
    compress(load_config(job))
    assert len(steps) > killed_after
    before, after = pico.read_state(whole), pico.read_state(tmp_path / "again")
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
    assert not list((tmp_path / "w").rglob("unfinished"))
    again = json.loads((tmp_path / "again" / "report.json").read_text())
    assert again["recovery"] == report["recovery"]


@pytest.mark.parametrize(
    ("limit", "scope"), [("1GB", "model"), ("200KB", "block"), (None, "model")]
)
def test_auto_takes_what_fits_and_says_why(
    limit: str | None, scope: str, tmp_path: Path, checkpoint: Models, text: Path
) -> None:
    changes = {
        "model.path": str(checkpoint("llama")),
        "calibration.path": str(text),
        "runtime.memory_limit": limit,
        **TRAINED,
        "recover.scope": "auto",
    }
    (tmp_path / "plan").mkdir()
    planned = pico.call("plan", pico.job(tmp_path / "plan", changes), "--json")
    assert planned.code == 0, planned.err
    found = json.loads(planned.out)["jobs"][0]["recover"]
    assert found["scope"] == scope
    output, report = pico.compressed(tmp_path, changes)
    assert report["recovery"]["scope"] == scope
    where = "the memory of cpu" if limit is None else "runtime.memory_limit"
    for reason in (found["reason"], report["recovery"]["reason"]):
        assert where in reason and "training all layers together takes about" in reason
    ended = pico.call("verify", output)
    assert ended.code == 0, ended.out
    other = "block" if scope == "model" else "model"
    for change in ({"scope": other}, {"reason": None}, {"reason": "as it should"}):
        config = load_config(output / "lrc.yaml")
        assert training_problem(report | {"recovery": report["recovery"] | change}, config)


def test_auto_without_a_chain_is_model(
    tmp_path: Path, plain_folder: PlainFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(plain_folder.path)
    changes = plain_folder.model("mlp") | TRAINED | {"recover.scope": "auto"}
    changes |= {"runtime.memory_limit": 1, "compression.method": "svd"}
    _, report = pico.compressed(tmp_path, changes)
    assert report["recovery"]["scope"] == "model"
    assert "its blocks are no chain" in report["recovery"]["reason"]


def test_plan_measures_what_training_in_turn_takes(
    tmp_path: Path, checkpoint: Models, text: Path
) -> None:
    changes = {"model.path": str(checkpoint("llama")), "calibration.path": str(text), **TRAINED}
    ended = pico.call("plan", pico.job(tmp_path, changes))
    assert ended.code == 0, ended.err
    assert "steps a block" in ended.out
    ended = pico.call("plan", pico.job(tmp_path, changes), "--json")
    found = json.loads(ended.out)
    assert found["seconds"]["recover"] > 0 and found["memory"]["phases"]["recover"] > 0
    assert found["jobs"][0]["recover"]["steps"] > 1


class Blocks(nn.Module):
    """A network whose blocks are given."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Residual(nn.Module):
    """A small branch beside its input, as in a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See the class."""
        return x + 1e-2 * self.linear(self.norm(x))


def _linear() -> nn.Module:
    return nn.Linear(8, 8)


WINDOWS: Mapping[str, tuple[list[nn.Module], list[int]]] = {
    "matrices and rectifiers": ([_linear(), nn.ReLU(), _linear(), nn.ReLU()], [2, 2]),
    "a matrix at the end": ([_linear(), nn.ReLU(), _linear()], [3]),
    "two matrices first": ([_linear(), _linear(), nn.GELU(), _linear(), nn.Tanh()], [3, 2]),
    "blocks": ([nn.Sequential(_linear(), nn.ReLU(), _linear()), Residual()], [1, 1]),
    "matrices alone": ([_linear(), _linear()], []),
    "a residual path": ([Residual(), Residual(), Residual()], [1, 1, 1]),
    "large biases": ([nn.Sequential(_linear(), nn.Softplus()), Residual()], [1, 1]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", WINDOWS)
def test_every_window_has_a_nonlinearity(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    blocks, wanted = WINDOWS[kind]
    network = make_network(Blocks(*blocks).to(dtype), device=torch.device("cpu"), dtype=dtype)
    layers = [
        _layer(f"blocks.{name}", part)
        for name, part in network.module.blocks.named_modules()
        if isinstance(part, nn.Linear)
    ]
    found = find_windows(network, layers, {"x": torch.randn(1, 8)})
    assert [len(window.blocks) for window in found] == wanted


def _layer(name: str, part: nn.Linear) -> Any:
    from lrc_cli.network.keys import Keys
    from lrc_cli.network.layer import Layer

    unit = ".".join(name.split(".")[:2])
    return Layer(
        name=name,
        keys=Keys(f"{name}.weight"),
        kind="Linear",
        shape=tuple(part.weight.shape),
        dtype=part.weight.dtype,
        unit=unit,
    )
