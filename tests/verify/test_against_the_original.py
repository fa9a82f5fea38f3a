"""`lrc verify --against`: what holds on the original, and what is found on it."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import damage
import pico
import pytest
import torch
from pico import Models
from verify_helpers import Made, failed, unchecked

from lrc_cli.config import Compression, canonical
from lrc_cli.verify import verify_directory


def test_an_untouched_output_holds_at_every_level(made: Made) -> None:
    found = verify_directory(made.output, against=made.original, manifest_sha256=made.pin)
    assert failed(found) == []
    assert unchecked(found) == {"report.run"}
    ids = {statement.id for statement in found.findings.statements}
    assert {"c1.output", "c1.metric", "c2.values", "c2.layers", "quality.measured"} <= ids


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        ("llama", {"compression.size": 1.0}),
        ("llama", {"compression.method": "svd"}),
        ("llama", {"compression.method": "frobenius", "output.dtype": "float32"}),
        ("llama", {"runtime.dtype": "bfloat16"}),
        ("bert", {}),
        ("bert-mlm", {}),
        ("bert-classifier", {}),
    ],
)
def test_other_outputs_hold(
    tmp_path: Path, checkpoint: Models, text: Path, model: str, changes: dict[str, Any]
) -> None:
    job = {"model.path": str(checkpoint(model)), "calibration.path": str(text)}
    job |= {"certification.part": [0.6, 1.0], "certification.num_sequences": 20}
    output, _ = pico.compressed(tmp_path, job | {"certification.sequence_length": 16} | changes)
    found = verify_directory(output, against=checkpoint(model))
    assert failed(found) == []


def test_an_output_of_before_a_key_was_added_holds(
    tmp_path: Path, checkpoint: Models, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = canonical.plain

    def older(value: Any) -> Any:
        found = plain(value)
        if isinstance(value, Compression):
            del found["embeddings"]
        return found

    job = {"model.path": str(checkpoint("llama")), "calibration.path": str(text)}
    with monkeypatch.context() as before:
        before.setattr(canonical, "plain", older)
        output, _ = pico.compressed(tmp_path, job)
    assert "embeddings" not in (output / "lrc.yaml").read_text()
    assert failed(verify_directory(output, against=checkpoint("llama"))) == []


def test_an_error_below_the_rounding_of_the_outputs_holds(
    tmp_path: Path, checkpoint: Models, text: Path
) -> None:
    """As in a network with massive activations: bfloat16 rounds outputs, biases included."""
    original = tmp_path / "original"
    shutil.copytree(checkpoint("qwen2"), original)
    for key in ("q_proj", "k_proj", "v_proj"):
        name = f"model.layers.0.self_attn.{key}.bias"
        damage.edit_tensors(original, name, lambda bias: bias + 32)
    job = {"model.path": str(original), "calibration.path": str(text)}
    job |= {"certification.part": [0.6, 1.0], "certification.num_sequences": 20}
    job |= {"runtime.dtype": "bfloat16", "compression.size": 0.9}
    output, _ = pico.compressed(tmp_path, job | {"certification.sequence_length": 16})
    assert failed(verify_directory(output, against=original)) == []


@pytest.mark.parametrize("name", ["mlp", "attention"])
def test_a_plain_module_holds_with_its_factory(
    tmp_path: Path, plain_folder: pico.PlainFolder, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(plain_folder.path)
    changes = plain_folder.model(name) | {"certification.num_sequences": 20}
    output, _ = pico.compressed(tmp_path, changes)
    original, factory = Path(changes["model.path"]), changes["model.factory"]
    found = verify_directory(output, against=original, factory=factory)
    assert failed(found) == []
    ended = pico.call("verify", output, "--against", original, "-q")
    assert ended.code == 2
    assert f"--factory {factory}" in ended.err


def test_another_checkpoint_is_not_the_original(made: Made, checkpoint: Models) -> None:
    found = verify_directory(made.output, against=checkpoint("qwen2"))
    assert any(line.startswith("original.hash") for line in failed(found))
    assert {"c1", "quality", "c2"} <= unchecked(found)


def moved_job(tmp_path: Path, checkpoint: Models, text: Path) -> tuple[Path, Path]:
    """An output whose data file is then moved; returns both."""
    data = tmp_path / "data.txt"
    data.write_text(text.read_text())
    job = {"model.path": str(checkpoint("llama")), "calibration.path": str(data)}
    output, _ = pico.compressed(tmp_path, job)
    return output, data.rename(tmp_path / "elsewhere.txt")


def test_data_is_known_by_its_hash(tmp_path: Path, checkpoint: Models, text: Path) -> None:
    output, data = moved_job(tmp_path, checkpoint, text)
    without = verify_directory(output, against=checkpoint("llama"))
    assert failed(without) == []
    assert {"data.hash", "c1", "quality.measured"} <= unchecked(without)
    given = verify_directory(output, against=checkpoint("llama"), data=data)
    assert failed(given) == []
    assert "data.hash" not in unchecked(given)
    data.write_text(data.read_text() + " w1")
    changed = verify_directory(output, against=checkpoint("llama"), data=data)
    assert failed(changed) == []
    details = [s.detail for s in changed.findings.with_status("not checked")]
    assert any("another hash" in detail for detail in details)


def test_changes_that_are_too_small_to_matter_are_not_failures(made: Made, tmp_path: Path) -> None:
    """Another machine rounds differently: C1 and C2 allow for it, the manifest does not."""
    output = damage.copied(made.output, tmp_path)

    def change(report: dict[str, Any]) -> None:
        for layer in report["layers"]:
            if layer["storage"] != "dense":
                for kind in ("metric", "output"):
                    for key in ("stored", "optimum", "svd"):
                        layer["errors"][kind][key] *= 1 + 1e-5

    damage.edit_report(output, change)
    damage.rewrite_pages(output)
    damage.rewrite_manifest(output)
    assert failed(verify_directory(output, against=made.original)) == []


def test_plain_svd_in_the_solvers_place_is_found(
    made: Made, tmp_path: Path, checkpoint: Models
) -> None:
    """Factors that are not what the report says of them, although every hash fits."""
    output = damage.copied(made.output, tmp_path)
    key = damage.factor_key(output)
    weight = pico.read_state(checkpoint("llama"))[f"{key}.weight"].double()
    state = pico.read_state(output)
    rank, rows = len(state[f"{key}.weight"]), len(weight)
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    simple = (u[:, :rank] * s[:rank]) @ vt[:rank]
    blocks = len(state[f"{key}.perm"])
    # Rows in the order that the permutation undoes: the chosen ones first.
    slabs = simple.view(blocks, rows // blocks, -1)
    ordered = slabs[state[f"{key}.perm"].argsort()].reshape(rows, -1)
    chosen, others = ordered[:rank], ordered[rank:]
    coefficients = torch.linalg.lstsq(chosen.T, others.T).solution.T
    replaced: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        f"{key}.weight": lambda old: chosen.to(old.dtype),
        f"{key}.up.weight": lambda old: coefficients.to(old.dtype),
    }
    for name, change in replaced.items():
        damage.edit_tensors(output, name, change)

    def restate(report: dict[str, Any]) -> None:
        row = next(row for row in report["layers"] if row["name"] == key)
        stored = coefficients.to(state[f"{key}.up.weight"].dtype)
        row["max_coefficient"] = stored.abs().max().item()

    damage.edit(restate)(output)
    damage.rewrite_manifest(output)
    assert failed(verify_directory(output)) == []
    found = failed(verify_directory(output, against=made.original))
    assert any(line.startswith("c1.output") for line in found)
