"""The soak finds what is wrong, says it, and counts it; and what it has found once stays mended."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pico
import pytest
import soak
import soak_cases
import soak_checks
import soak_parts
from safetensors.torch import load_file, save_file
from soak import Log, Task, make_tasks, table, verdict
from soak_cases import Case

CHANGES: dict[str, Any] = {
    "calibration.part": None,
    "calibration.num_sequences": 12,
    "evaluation": [],
    "compression.method": "frobenius",
    "compression.size": 0.6,
    "compression.rank_multiple": 1,
    "compression.sequential": False,
    "runtime.dtype": "float32",
    "runtime.work_dir": None,
}


def case(model: str, changes: dict[str, Any], **other: Any) -> Case:
    """Returns a case with these changes."""
    data = soak_cases.MODELS[model].data[0]
    values = {"dtype": "float32", "form": "safetensors", "data": data, "processes": 1, **other}
    drawn = soak_cases.draw(0, [model])
    return replace(drawn, by_transformers=False, changes=CHANGES | changes, **values)


def test_a_seed_is_always_the_same_case_and_all_models_come_up() -> None:
    cases = [soak_cases.draw(seed) for seed in range(500)]
    assert cases == [soak_cases.draw(seed) for seed in range(500)]
    assert {x.model for x in cases} == set(soak_cases.MODELS)
    assert {x.data for x in cases} == set(soak_cases.DATA_KINDS)
    assert {x.form for x in cases} == {*soak_cases.FORMS, *soak_cases.PLAIN_FORMS}
    methods = {x.changes["compression.method"] for x in cases}
    assert methods == {"svd", "frobenius", "curvature", "nuclear", "relu"}


FOUND: dict[str, Case] = {
    "biases of fused experts under wrapped names": case(
        "family gpt-oss",
        {"compression.method": "curvature", "compression.size": 0.79},
        form="wrapped",
    ),
    "new biases of layers that transformers renames": case(
        "family dinov2",
        {"compression.center": True, "compression.exclude": []},
    ),
    "a divergence as small as its rounding": case(
        "family convnext",
        {"compression.size": 0.95, "compression.method": "curvature", "evaluation": None},
    ),
}
"""Cases on which a right output failed `lrc verify --against` when the soak tried them first."""


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_once_holds(name: str, tmp_path: Path) -> None:
    result = soak_parts.attempt(FOUND[name], tmp_path)
    assert result.problem is None
    assert result.files > 3 and result.lost == 0


def output_of(folder: Path) -> tuple[Case, Path]:
    """Returns a case that was compressed in a folder, and the output."""
    made = case("family llama", {})
    job = soak_cases.write(made, folder)
    assert pico.call("compress", job).code == 0
    return made, folder / "out"


def test_the_reconstruction_finds_a_changed_number_and_its_own_reader_reads(
    tmp_path: Path,
) -> None:
    made, output = output_of(tmp_path)
    soak_checks.compare(made, tmp_path, output)
    shutil.rmtree(tmp_path / "float64")
    rebuilt = soak_checks.rebuilt(output, tmp_path / "original")
    for key, tensor in pico.rebuilt(pico.read_state(output)).items():
        np.testing.assert_allclose(rebuilt[key], tensor.double().numpy(), rtol=1e-5, atol=1e-6)
    # A number that the loaded network has and the original files lack.
    original = tmp_path / "original" / "config.json"
    config = json.loads(original.read_text())
    original.write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    with pytest.raises(soak_checks.Different, match="off the float64 reconstruction"):
        soak_checks.compare(made, tmp_path, output)


def test_lost_files_damaged_outputs_and_wrong_codes_are_found(tmp_path: Path) -> None:
    made, output = output_of(tmp_path)
    before = soak_checks.hashes(tmp_path, soak_parts.OURS)
    (tmp_path / "source" / "config.json").write_text("{}")
    (tmp_path / "original" / "config.json").unlink()
    assert sorted(soak_parts.lost(tmp_path, before)) == [
        "original/config.json",
        "source/config.json",
    ]
    for ended, words in (([(1, "error: no")], "error: no"), ([(3, "")], "gates")):
        with pytest.raises(soak_checks.Different, match=words):
            soak_parts.check_finished(made, tmp_path, ended)
    state = load_file(output / "model.safetensors")
    key = next(key for key in state if key.endswith(".up.weight"))
    save_file(state | {key: state[key] + 1}, output / "model.safetensors", {"format": "pt"})
    with pytest.raises(soak_checks.Different, match="lrc verify ended with 3"):
        soak_parts.verify(made, tmp_path, output)


def test_kills_end_in_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak_parts, "LONG", ("family llama",))
    result = soak_parts.kills(0, tmp_path, 2)
    assert result.problem is None and result.faults == 2
    assert not list(tmp_path.glob("kills-*"))


def arguments(*given: str) -> Any:
    """Returns the arguments of a command line."""
    return soak.parser().parse_args(given)


def test_the_log_is_taken_up_and_a_failure_is_the_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = make_tasks(arguments("--compressions", "2", "--kills", "7", "--seed", "3"))
    assert [str(task) for task in tasks] == [
        "memory 3", "kills 3", "kills 4", "compressions 3", "compressions 4",
    ]  # fmt: skip
    assert [task.number for task in tasks if task.part == "kills"] == [5, 2]
    log = Log(tmp_path / "log.jsonl")
    done = {"what": "a case", "compressions": 1, "faults": 0, "files": 9, "lost": 0}
    log.add(tasks[3], done, 1.0)
    log.add(tasks[1], done | {"faults": 5}, 1.0)
    log = Log(tmp_path / "log.jsonl")
    assert set(log.done) == {"compressions 3", "kills 3"}
    shown = table(tasks, log, 1234)
    assert "| 1 of 2 |" in shown and "| 5 of 7 |" in shown and "| 0 of 18 |" in shown
    assert "1,234" in shown
    assert verdict(tasks, log, 0.0) == 0
    log.add(tasks[4], {"what": "a case", "problem": "lost"}, 1.0)
    assert verdict(tasks, log, 0.0) == 1
    assert "again: scripts/soak.py --only 4 --part compressions" in capsys.readouterr().out
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write(json.dumps({"task": "memory 3", "code": "other"}) + "\n")
    assert "memory 3" not in Log(tmp_path / "log.jsonl").done


def test_an_error_of_the_soak_itself_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(seed: int, root: Path) -> None:
        raise ValueError("no such thing")

    monkeypatch.setattr(soak_parts, "compression", broken)
    found = soak.outcome(Task(part="compressions", seed=1), tmp_path)
    assert "no such thing" in found["problem"] and "calibration" in found["what"]
