"""`lrc verify --against` on sequential, centred, nuclear and ReLU-aware layers."""

from pathlib import Path
from typing import Any

import damage
import pico
import pytest
from pico import Models
from verify_helpers import failed, unchecked

from lrc_cli.verify import verify_directory


@pytest.mark.parametrize(
    "changes",
    [
        {"compression.sequential": True, "compression.size": 0.5},
        {"compression.sequential": True, "compression.method": "frobenius"},
        {"compression.sequential": True, "compression.correction": 0.5},
        {"compression.center": True},
        {"compression.method": "nuclear"},
    ],
)
def test_other_solvers_hold(
    tmp_path: Path, checkpoint: Models, text: Path, changes: dict[str, Any]
) -> None:
    job = {"model.path": str(checkpoint("llama")), "calibration.path": str(text)}
    output, report = pico.compressed(tmp_path, job | {"calibration.num_sequences": 60} | changes)
    found = verify_directory(output, against=checkpoint("llama"))
    assert failed(found) == []
    measured = [s for s in found.findings.with_status("holds") if s.id == "c1.metric"]
    assert len(measured) == sum(layer["storage"] != "dense" for layer in report["layers"])
    if "compression.sequential" in changes:
        assert report["sequential"]["used"]
        true = (output / "report.json").read_text()
        for change in (damage.better_layer_error, damage.other_correction, damage.other_share):
            (output / "report.json").write_text(true)
            damage.edit_report(output, change)
            found = verify_directory(output, against=checkpoint("llama"))
            wanted = "c1." if change is damage.better_layer_error else "c1.correction"
            assert any(line.startswith(wanted) for line in failed(found))


@pytest.fixture
def rectified(tmp_path: Path, checkpoint: Models, text: Path) -> Path:
    """A pico OPT, its layers before a ReLU fitted to what is behind it."""
    job = {"model.path": str(checkpoint("opt")), "calibration.path": str(text)}
    job |= {"compression.method": "relu", "certification.part": [0.6, 1.0]}
    output, _ = pico.compressed(tmp_path, job | {"certification.num_sequences": 20})
    return output


def test_what_relu_says_is_measured_behind_the_relu(rectified: Path, checkpoint: Models) -> None:
    found = verify_directory(rectified, against=checkpoint("opt"))
    assert failed(found) == []
    assert unchecked(found) == {"c1.convex", "manifest.pinned", "report.run"}
    true = (rectified / "report.json").read_text()
    for change in (damage.better_metric, damage.other_simple_metric):
        (rectified / "report.json").write_text(true)
        damage.edit_report(rectified, change)
        found = verify_directory(rectified, against=checkpoint("opt"))
        assert any(line.startswith("c1.metric") for line in failed(found)), change


def test_a_bias_that_does_not_pay_behind_the_relu_is_found(
    rectified: Path, checkpoint: Models
) -> None:
    """Whatever the report says of the errors."""
    layer = next(x for x in damage.read_report(rectified)["layers"] if x["method"] == "relu")
    damage.edit_tensors(rectified, f"{layer['name']}.bias", lambda bias: bias + 1)
    found = verify_directory(rectified, against=checkpoint("opt"))
    assert any(line.startswith("c1.bias") for line in failed(found))
