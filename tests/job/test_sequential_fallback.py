"""These tests find layers that are fitted plainly although `compression.sequential` is on."""

import json
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from pico import Models
from sequential_helpers import (
    factorised,
)
from torch import Tensor

from lrc_cli.engine import SolveError
from lrc_cli.job.factors import sequential as fitting
from lrc_cli.verify import verify_directory


def test_a_few_layers_with_few_tokens_are_fitted_plainly(
    tmp_path: Path, sequential_job: Any
) -> None:
    """The pooler alone, among BERT's 13 layers, reads one token of each sequence."""
    _, report = pico.compressed(tmp_path, sequential_job("bert", size=0.5, sequential=True))
    assert report["sequential"]["used"] and "12 of 13" in report["sequential"]["reason"]
    for layer in factorised(report):
        short = layer["name"].endswith("pooler.dense")
        assert layer["sequential"] is not short and not layer["fallback"]
        assert layer["errors"]["output"]["inputs"] == ("calibration" if short else "compressed")
        assert ("fewer than 15 for each" in (layer.get("sequential_reason") or "")) is short


def test_where_every_layer_falls_back_the_bytes_are_those_of_a_plain_run(
    tmp_path: Path, sequential_job: Any
) -> None:
    changes = sequential_job("llama", size=0.4, sequential=True) | {"calibration.num_sequences": 33}
    output, report = pico.compressed(tmp_path, changes)
    assert not report["sequential"]["used"]
    assert "asked for; 0 of 13" in report["sequential"]["reason"]
    state = pico.read_state(output)
    plain, _ = pico.compressed(tmp_path, changes | {"compression.sequential": False}, "--force")
    assert all(torch.equal(state[key], tensor) for key, tensor in pico.read_state(plain).items())


def test_other_methods_are_fitted_plainly(tmp_path: Path, sequential_job: Any) -> None:
    asked = {"size": 0.5, "allocation": "relative", "layers": {"*.up_proj": {"method": "svd"}}}
    _, report = pico.compressed(tmp_path, sequential_job("llama", sequential=True, **asked))
    for layer in report["layers"]:
        plain = layer["name"].endswith("up_proj")
        assert layer["sequential"] is not plain
        assert layer.get("sequential_reason") == ("not with method svd" if plain else None)


def test_a_layer_whose_sequential_solve_fails_is_fitted_plainly(
    tmp_path: Path, sequential_job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    solve = fitting.Sequential

    def broken(weight: Tensor, *rest: Any, **options: Any) -> Any:
        if weight.shape == (96, 64):
            raise SolveError("the regularised Gram matrix is not positive definite")
        return solve(weight, *rest, **options)

    monkeypatch.setattr(fitting, "Sequential", broken)
    asked = pico.job(tmp_path, sequential_job("llama", size=0.4, sequential=True))
    ended = pico.call("compress", asked, "--strict", "--json")
    assert ended.code == 4 and "layers fell back" in ended.err
    for layer in factorised(json.loads(ended.out)):
        failed = layer["shape"] == [96, 64]
        assert layer["sequential"] is not failed and not layer["fallback"]
        assert ("could not be solved" in layer.get("sequential_reason", "")) == failed


def test_where_every_sequential_solve_fails_the_report_says_so(
    tmp_path: Path, sequential_job: Any, checkpoint: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise SolveError("the regularised Gram matrix is not positive definite")

    monkeypatch.setattr(fitting, "Sequential", broken)
    output, report = pico.compressed(tmp_path, sequential_job("llama", size=0.4, sequential=True))
    assert not report["sequential"]["used"] and report["sequential"]["held_back"] == 0
    assert "each of them was fitted plainly in the end" in report["sequential"]["reason"]
    found = verify_directory(output, against=checkpoint("llama"))
    assert found.findings.with_status("fails") == []
