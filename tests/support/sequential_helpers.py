"""Errors of sequentially fitted layers are measured again from what was written."""

from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from torch import Tensor

import lrc_cli
from lrc_cli.config import load_config
from lrc_cli.data.draw import Batch
from lrc_cli.execution.hooks import hooked
from lrc_cli.execution.network import make_network
from lrc_cli.job.plan import Plan, make_plan

Changes = dict[str, Any]
MANY = {"calibration.num_sequences": 60, "evaluation": None}
"""1920 tokens, of which 1696 are fitted to: 15 for each input of every pico layer."""


def factorised(report: Any) -> list[Any]:
    """Returns the report's layers that have factors."""
    return [layer for layer in report["layers"] if layer["storage"] != "dense"]


def fitted_data(plan: Plan) -> Batch:
    """Returns the sequences that sequential layers are fitted to: all but an eighth."""
    inputs = plan.sequences["calibration"].inputs
    number = len(next(iter(inputs.values())))
    return {name: tensor[: number - number // 8] for name, tensor in inputs.items()}


def calibration_data(directory: Path) -> Batch:
    """Returns the sequences that the job in `directory` was fitted to."""
    return fitted_data(make_plan(load_config(directory / "job.yaml"), force=True))


@torch.no_grad()
def measured(plan: Plan, output: Path) -> dict[str, float]:
    """Returns each layer's ||W x + b - Z x~ - b~|| / ||W x|| over the data, as written."""
    written = lrc_cli.load(output, factory=plan.config.model.factory)
    other = make_network(written, device=torch.device("cpu"), dtype=torch.float32)
    batch = fitted_data(plan)
    mask = batch.get("attention_mask")
    outputs: list[dict[str, Tensor]] = []
    for network in (plan.network, other):
        seen: dict[str, Tensor] = {}

        def look(layer: Any, _: Tensor, y: Tensor, seen: dict[str, Tensor] = seen) -> None:
            seen[layer.name] = y if mask is None else y[mask.bool()]

        with hooked(network, plan.layers, look):
            network(batch)
        outputs.append(seen)
    found = {}
    for name, y in outputs[0].items():
        bias = plan.network.module.get_submodule(name).bias
        energy = torch.linalg.norm(y if bias is None else y - bias)
        found[name] = (torch.linalg.norm(y - outputs[1][name]) / energy).item()
    return found


def assert_errors_as_written(directory: Path, report: Any) -> None:
    """Every sequential layer of the report must have the errors of its written factors."""
    plan = make_plan(load_config(directory / "job.yaml"), force=True)
    found = measured(plan, directory / "out")
    layers = [layer for layer in report["layers"] if layer.get("sequential")]
    assert layers
    for layer in layers:
        errors = layer["errors"]
        expected = pytest.approx(found[layer["name"]], rel=1e-3, abs=1e-4)
        assert errors["output"]["stored"] == expected
        assert errors["output"]["inputs"] == "compressed"
        assert errors["output"]["optimum"] <= errors["output"]["stored"]
        metric = errors["metric"]
        assert 0 <= metric["inherited"] <= metric["optimum"] <= metric["stored"] <= metric["total"]
        assert metric["stored"] < metric["svd"]
        assert 0 <= layer["correction"] <= 1


def assert_verified(directory: Path, changes: Changes) -> None:
    """The output in `directory` must hold against its original."""
    factory = changes.get("model.factory")
    options = ["--factory", factory] if factory else []
    ended = pico.call("verify", directory / "out", "--against", changes["model.path"], *options)
    assert ended.code == 0, ended.out + ended.err
