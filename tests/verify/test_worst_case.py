"""`lrc verify --against` computes the worst-case bound again."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import damage
import pico
import pytest
import torch
from safetensors.torch import save_file
from verify_helpers import failed, unchecked

from lrc_cli.verify import verify_directory


@pytest.mark.parametrize("form", [{"output.dtype": "bfloat16"}, {"compression.center": True}])
@pytest.mark.parametrize("has_bias", [True, False])
def test_the_worst_case_of_other_dtypes_and_gained_biases_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: dict[str, Any], has_bias: bool
) -> None:
    (tmp_path / "chains.py").write_text(
        "from torch import nn\n\n\ndef chain():\n"
        f"    first, second = (nn.Linear(24, 24, bias={has_bias}) for _ in range(2))\n"
        "    return nn.Sequential(first, nn.GELU(), nn.Sequential(second, nn.Tanh()))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    rows = torch.randn(64, 24, generator=torch.Generator().manual_seed(1)) + 1
    save_file({"x": rows}, tmp_path / "rows.safetensors")
    module = importlib.import_module("chains").chain()
    sys.modules.pop("chains")
    save_file(module.to(torch.bfloat16).state_dict(), tmp_path / "chain.safetensors")
    original = tmp_path / "chain.safetensors"
    job = {"model.path": str(original), "model.factory": "chains:chain", "evaluation": None}
    job |= {"calibration.path": str(tmp_path / "rows.safetensors")}
    job |= {"calibration.num_sequences": 40, "compression.size": 0.8}
    output, report = pico.compressed(tmp_path, job | form)
    assert report["worst_case"] is not None
    found = verify_directory(output, against=original, factory="chains:chain")
    assert failed(found) == []
    assert [s.status for s in found.findings.statements if s.id == "c3.worst_case"] == ["holds"]
    sys.modules.pop("chains", None)


@pytest.mark.parametrize(
    "change",
    [damage.better_worst_case, damage.better_measured_change, damage.better_amplification],
)
def test_the_worst_case_is_computed_again(
    tmp_path: Path,
    plain_folder: pico.PlainFolder,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[dict[str, Any]], None],
) -> None:
    monkeypatch.chdir(plain_folder.path)
    changes = plain_folder.model("mlp")
    output, _ = pico.compressed(tmp_path, changes)
    original, factory = Path(changes["model.path"]), changes["model.factory"]
    found = verify_directory(output, against=original, factory=factory)
    assert failed(found) == []
    assert [s.status for s in found.findings.statements if s.id == "c3.worst_case"] == ["holds"]
    assert "c3.worst_case" in unchecked(verify_directory(output))
    damage.edit_report(output, change)
    found = verify_directory(output, against=original, factory=factory)
    assert any(line.startswith("c3.worst_case") for line in failed(found))
