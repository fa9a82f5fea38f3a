"""These tests check what `compression.sequential` lowers, and the errors in report and files."""

from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from sequential_helpers import (
    assert_errors_as_written,
    calibration_data,
)
from transformers import AutoModel

from lrc_cli.data.draw import Batch


@torch.no_grad()
def hidden_error(source: Path, output: Path, batch: Batch) -> float:
    """Returns the relative error of the last hidden states."""
    models = [AutoModel.from_pretrained(path, dtype=torch.float32) for path in (source, output)]
    expected, found = (model(**batch).last_hidden_state for model in models)
    return (torch.linalg.norm(expected - found) / torch.linalg.norm(expected)).item()


@pytest.mark.parametrize(
    ("name", "method"), [("llama", "curvature"), ("qwen2", "frobenius"), ("bert", "curvature")]
)
def test_it_lowers_the_error_of_the_whole_network(
    name: str, method: str, tmp_path: Path, sequential_job: Any
) -> None:
    errors = {}
    for sequential in (False, True):
        changes = sequential_job(name, method=method, size=0.3, sequential=sequential)
        output, report = pico.compressed(tmp_path, changes, "--force")
        assert report["sequential"]["used"] is sequential
        source = Path(changes["model.path"])
        errors[sequential] = hidden_error(source, output, calibration_data(tmp_path))
    assert errors[True] < 0.97 * errors[False]


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_the_report_has_the_errors_on_both_networks(
    name: str, tmp_path: Path, sequential_job: Any
) -> None:
    """Errors are measured again from the written files, with forward passes alone."""
    output, report = pico.compressed(tmp_path, sequential_job(name, sequential=True))
    assert report["sequential"]["used"] and "asked for" in report["sequential"]["reason"]
    assert_errors_as_written(tmp_path, report)
    page = (output / "report.html").read_text()
    assert "the compressed network&#x27;s inputs" in page and "on: asked for" in page
    assert "on: asked for" in (output / "README.md").read_text()


def test_ranks_come_from_the_original_network(tmp_path: Path, sequential_job: Any) -> None:
    """The sequential run uses the statistics and the spectra of the plain run."""
    _, plain = pico.compressed(
        tmp_path, sequential_job("llama", sequential=False, storage="factors")
    )
    changes = sequential_job("llama", sequential=True, storage="factors")
    _, first = pico.compressed(tmp_path, changes, "--force")
    assert "statistics" not in first["timing"] and "spectra" not in first["timing"]
    ranks = [[layer.get("rank") for layer in r["layers"]] for r in (plain, first)]
    assert ranks[0] == ranks[1]
    before = pico.read_state(tmp_path / "out")
    _, second = pico.compressed(tmp_path, changes | {"compression.ridge": 1.0}, "--force")
    assert "statistics" not in second["timing"] and "factors" in second["timing"]
    after = pico.read_state(tmp_path / "out")
    assert any(not torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("center", [False, True])
def test_what_is_written_is_what_the_second_network_ran_with(
    center: bool, tmp_path: Path, sequential_job: Any
) -> None:
    """The output has another dtype than the source, biases and embeddings included."""
    changes = sequential_job("qwen2", size=0.4, sequential=True, center=center)
    _, report = pico.compressed(tmp_path, changes | {"output.dtype": "float16"})
    assert_errors_as_written(tmp_path, report)
