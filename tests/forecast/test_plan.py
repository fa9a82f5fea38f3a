"""These tests run `lrc plan` and `compress --dry-run`: estimates, curve, refusals, no traces."""

import json
import shutil
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from pico import Models

from lrc_cli.engine.training import JUDGEMENTS, USUAL_TRIALS, trial_steps
from lrc_cli.errors import InputError
from lrc_cli.forecast import command
from lrc_cli.forecast.clocks import Clock
from lrc_cli.forecast.estimate import Memory, check_memory
from lrc_cli.job.statistics import sweep
from lrc_cli.job.work import WorkDirectory
from lrc_cli.runtime.memory import group_limits

Changes = dict[str, Any]
SHARED = {"checks", "statistics", "spectra", "factors", "writing", "verification", "evaluation"}


def files_below(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*")}


def planned(*arguments: object) -> Any:
    ended = pico.call("plan", *arguments, "--json", "-q")
    assert ended.code == 0, ended.err
    return json.loads(ended.out)


def test_a_plan_with_and_without_spectra(tmp_path: Path, llama_job: Changes) -> None:
    job = pico.job(tmp_path, llama_job)
    first = planned(job, "--sizes", "0.8,0.6")
    assert first["spectra"] == "collected"
    assert set(first["seconds"]) == SHARED and all(s > 0 for s in first["seconds"].values())
    assert first["total_seconds"] == pytest.approx(sum(first["seconds"].values()))
    assert 0 < first["memory"]["peak"] < first["memory"]["available"]
    assert {disk["key"] for disk in first["disk"]} == {"runtime.work_dir", "output.path"}
    assert [one["target"]["value"] for one in first["jobs"]] == [0.8, 0.6]
    errors = [point["loss_increase"] for point in first["curve"]]
    assert errors == sorted(errors) and len(errors) > 5
    assert not any(name.startswith("out") for name in files_below(tmp_path))

    again = planned(job, "--sizes", "0.6")
    assert again["spectra"] == "reused" and again["curve"] == first["curve"]
    assert "statistics" not in again["seconds"] and again["seconds"]["spectra"] == 0

    ended = pico.call("compress", job, "--json")
    assert ended.code == 0 and "statistics ..." not in ended.err
    report = json.loads(ended.out)
    (own,) = again["jobs"]
    assert own["ranks"] == {x["name"]: x.get("rank", 0) for x in report["layers"]}
    assert own["kept"] == pytest.approx(report["size"]["kept_compressible"], abs=1e-3)
    assert own["checkpoint_bytes"] == pytest.approx(
        report["size"]["checkpoint_bytes"]["after"], rel=1e-3
    )
    assert planned(job)["seconds"]["factors"] == 0
    assert "output exists" in pico.call("plan", job).err


def test_a_dry_run_writes_nothing(tmp_path: Path, llama_job: Changes) -> None:
    job = pico.job(tmp_path, llama_job)
    before = files_below(tmp_path)
    ended = pico.call("compress", job, "--dry-run")
    assert ended.code == 0, ended.err
    assert files_below(tmp_path) == before
    assert "total" in ended.out and "predicted error" not in ended.out
    found = json.loads(pico.call("compress", job, "--dry-run", "--json", "-q").out)
    assert found["spectra"] is None and "curve" not in found and "ranks" not in found["jobs"][0]


def test_a_plan_for_people(tmp_path: Path, plain_folder: pico.PlainFolder) -> None:
    changes = plain_folder.model("mlp") | {"compression.method": "frobenius"}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(plain_folder.path)
        ended = pico.call("plan", pico.job(tmp_path, changes))
    assert ended.code == 0, ended.err
    for piece in ("statistics", "total", "private memory", "disk, output.path", "just collected"):
        assert piece in ended.out
    assert "loss increase" not in ended.out


@pytest.mark.parametrize(
    ("method", "model"), [("svd", "llama"), ("nuclear", "llama"), ("relu", "opt")]
)
def test_other_methods_can_be_planned(
    method: str, model: str, tmp_path: Path, llama_job: Changes, checkpoint: Models
) -> None:
    changes = {"compression.method": method, "model.path": str(checkpoint(model))}
    found = planned(pico.job(tmp_path, llama_job | changes))
    assert ("statistics" in found["seconds"]) == (method != "svd")
    assert found["curve"] and all("loss_increase" not in point for point in found["curve"])


def test_the_plan_knows_whether_fitting_is_sequential(tmp_path: Path, llama_job: Changes) -> None:
    job = pico.job(tmp_path, llama_job | {"calibration.num_sequences": 60})
    plain = planned(job, "--set", "compression.sequential=false")
    walked = planned(job, "--set", "compression.sequential=true")
    assert walked["jobs"][0]["sequential"]["used"] and not plain["jobs"][0]["sequential"]["used"]


@pytest.mark.parametrize("asked", [{"recover.tokens": 4000}, {"recover.minutes": 0.2}], ids=str)
def test_training_is_planned_for_until_it_is_done(
    asked: Changes, tmp_path: Path, llama_job: Changes
) -> None:
    job = pico.job(tmp_path, llama_job | {"recover.scope": "model", **asked})
    found = planned(job)
    seconds, record = found["seconds"]["recover"], found["jobs"][0]["recover"]
    if "recover.minutes" in asked:
        # A machine under load may be too slow for a second step in this time.
        assert seconds == pytest.approx(12.0, rel=0.25) or record["steps"] == 1 < seconds
    else:
        assert seconds > 0 and record["tokens"] == pytest.approx(4000, rel=0.3)
    report = json.loads(pico.call("compress", job, "--json", "-q").out)
    recovery = report["recovery"]
    same = ("num_sequences", "num_held_out")
    assert [record[name] for name in same] == [recovery[name] for name in same]
    if "recover.tokens" in asked:
        planned_for = recovery["planned_steps"], recovery["planned_tokens"]
        assert (record["steps"], record["tokens"]) == planned_for
    again = planned(job)
    assert again["jobs"][0]["recover"] is None and "recover" not in again["seconds"]


def test_every_step_and_look_of_a_training_counts_as_long_as_it_takes(
    tmp_path: Path, llama_job: Changes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every piece of work takes seven seconds here."""
    monkeypatch.setattr(Clock, "tick", lambda clock, cost=0.0: clock.steps.append(7.0))
    changes = {"recover.scope": "model", "recover.tokens": 60_000}
    found = planned(pico.job(tmp_path, llama_job | changes))
    record, seconds = found["jobs"][0]["recover"], found["seconds"]["recover"]
    steps = 7.0 * (record["steps"] + USUAL_TRIALS * trial_steps(record["steps"]))
    looks = 7.0 * JUDGEMENTS
    assert steps + looks < seconds <= steps + looks * record["num_held_out"] + 7.0 * found["blocks"]


def test_certification_is_planned_for(tmp_path: Path, llama_job: Changes) -> None:
    changes = llama_job | {
        "certification.part": [0.6, 1.0],
        "certification.num_sequences": 20,
        "compression.max_layer_error": 0.3,
    }
    found = planned(pico.job(tmp_path, changes))
    assert {"selection", "certification"} < set(found["seconds"])
    assert found["jobs"][0]["target"] == {"name": "max_layer_error", "value": 0.3}


def test_what_does_not_fit_on_the_disk(
    tmp_path: Path, llama_job: Changes, monkeypatch: pytest.MonkeyPatch
) -> None:
    little = shutil._ntuple_diskusage(total=10**6, used=0, free=1000)
    monkeypatch.setattr(command.shutil, "disk_usage", lambda _: little)
    ended = pico.call("plan", pico.job(tmp_path, llama_job), "-q")
    assert ended.code == 2 and "1.00 kB are free" in ended.err
    assert "on another disk" in ended.err and "fewer or shorter sequences" not in ended.err
    assert not (tmp_path / ".lrc-work").exists()


def test_what_does_not_fit_in_memory(
    tmp_path: Path, llama_job: Changes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "available_bytes", lambda: 10**6)
    ended = pico.call("compress", pico.job(tmp_path, llama_job), "--dry-run", "-q")
    assert ended.code == 2 and "1.00 MB can be had" in ended.err
    assert ended.err.startswith("error: statistics would take") and "; " in ended.err


def test_a_block_that_does_not_fit_on_the_gpu(
    tmp_path: Path, llama_job: Changes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(command, "run_statistics", full)
    ended = pico.call("plan", pico.job(tmp_path, llama_job), "-q")
    assert ended.code == 2 and "does not hold one block at work; give shorter" in ended.err
    assert not (tmp_path / ".lrc-work").exists()


@pytest.mark.parametrize(
    ("phase", "measured", "kept", "lever"),
    [
        ("statistics", 900, 500, "set runtime.memory_limit to 100 B or less"),
        ("statistics", 1200, 0, "give shorter sequences"),
        ("factors", 1200, 0, "exclude the widest layers"),
        ("factors", 1000, 0, None),
    ],
)
def test_the_lever_is_one_that_helps(
    phase: str, measured: int, kept: int, lever: str | None
) -> None:
    peak = Memory(phase=phase, measured=measured, kept=kept)
    if lever is None:
        check_memory(peak, 1000)
        return
    with pytest.raises(InputError) as caught:
        check_memory(peak, 1000)
    assert caught.value.message.startswith(f"{phase} would take")
    assert caught.value.remedy is not None and caught.value.remedy.startswith(lever)


def test_a_busy_work_directory_is_said(tmp_path: Path, llama_job: Changes) -> None:
    job = pico.job(tmp_path, llama_job | {"runtime.work_dir": str(tmp_path / "work")})
    planned(job)
    fingerprint = json.loads((tmp_path / "work" / "fingerprint.json").read_text())
    with WorkDirectory(tmp_path / "work", fingerprint):
        ended = pico.call("plan", job, "-q")
    assert ended.code == 1 and "another lrc run" in ended.err


def test_checks_come_first(tmp_path: Path, llama_job: Changes) -> None:
    job = pico.job(tmp_path, llama_job)
    ended = pico.call("plan", job, "--sizes", "0.8,0.000001", "-q")
    assert ended.code == 2 and "cannot be reached" in ended.err


@pytest.mark.parametrize("method", ["frobenius", "curvature"])
@pytest.mark.parametrize("store_every", [0.0, sweep.STORE_EVERY])
def test_the_disk_is_what_a_run_then_fills(
    tmp_path: Path,
    llama_job: Changes,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    store_every: float,
) -> None:
    """Passing files are deleted as statistics come, so the peak is less than the sum."""
    monkeypatch.setattr(sweep, "STORE_EVERY", store_every)
    work = tmp_path / "work"
    changes = {"compression.method": method, "runtime.work_dir": str(work), "evaluation": []}
    job = pico.job(tmp_path, llama_job | changes | {"calibration.num_sequences": 60})
    ended = pico.call("compress", job, "--dry-run", "--json", "-q")
    assert ended.code == 0, ended.err
    estimate = json.loads(ended.out)["disk"]
    needed = {place["key"]: place["needed"] for place in estimate}
    put, peak = WorkDirectory.put, [0]

    def watched(self: WorkDirectory, *arguments: Any) -> None:
        put(self, *arguments)
        sizes = [file.stat().st_size for file in work.rglob("*") if file.is_file()]
        peak[0] = max(peak[0], sum(sizes))

    monkeypatch.setattr(WorkDirectory, "put", watched)
    assert pico.call("compress", job, "-q").code == 0
    assert 0.8 < needed["runtime.work_dir"] / peak[0] < 1.25


@pytest.mark.parametrize(
    ("lines", "files", "limits"),
    [
        (["0::/"], {"memory.max": "700"}, [700]),
        (["0::/job/step"], {"memory.max": "max", "job/memory.max": "500"}, [500]),
        (
            ["0::/job/step"],
            {"job/step/memory.max": "300", "job/memory.max": "500", "memory.max": "900"},
            [300, 500, 900],
        ),
        (
            ["7:cpu:/a", "4:memory:/slurm/job"],
            {"memory/slurm/memory.limit_in_bytes": "400", "memory/slurm/job/memory.max": "1"},
            [400],
        ),
        (["0::/elsewhere"], {}, []),
    ],
)
def test_memory_limits_of_control_groups_are_found(
    lines: list[str], files: dict[str, str], limits: list[int], tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert list(group_limits(lines, tmp_path)) == limits


@pytest.mark.parametrize("method", ["curvature", "svd"])
def test_a_network_that_runs_whole_is_said_to(
    method: str,
    plain_folder: pico.PlainFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(plain_folder.path))
    config = pico.job(tmp_path, plain_folder.model("attention") | {"compression.method": method})
    ended = pico.call("compress", config, "--dry-run")
    assert ended.code == 0 and "runs whole, not block by block: " in ended.out
    ended = pico.call("compress", config, "--dry-run", "--json")
    assert json.loads(ended.out)["runs_whole"]


def test_a_plan_says_what_more_calibration_data_would_bring(
    tmp_path: Path, llama_job: Changes
) -> None:
    few, more = (
        planned(pico.job(tmp_path, {**llama_job, "calibration.num_sequences": number}))
        for number in (8, 64)
    )
    for found, number in ((few, 8), (more, 64)):
        said = found["calibration"]
        assert (said["num_sequences"], said["rows"]) == (number, number * pico.LENGTH)
        assert said["left"] > 0 and said["others"] == 8
        assert 0 < said["twice"] < said["unseen"]
    assert more["calibration"]["unseen"] < few["calibration"]["unseen"] / 3
    # The same question has the same answer where the spectra are there already.
    again = planned(pico.job(tmp_path, {**llama_job, "calibration.num_sequences": 64}))
    assert again["spectra"] == "reused" and again["calibration"] == more["calibration"]


def test_a_plan_says_that_the_data_ends(tmp_path: Path, llama_job: Changes) -> None:
    whole = {**llama_job, "calibration.num_sequences": 112}  # of 3600 words
    ended = pico.call("plan", pico.job(tmp_path, whole))
    assert "the data has no more sequences" in ended.out
    assert "calibration: 112 sequences; model.layers." in ended.out


@pytest.mark.parametrize("method", ["frobenius", "curvature"])
def test_a_plan_judges_layers_around_their_mean(
    method: str, tmp_path: Path, checkpoint: Models, text: Path
) -> None:
    changes = {
        "model.path": str(checkpoint("bert")),
        "calibration.path": str(text),
        "calibration.num_sequences": 64,
        "compression.center": True,
        "compression.method": method,
    }
    found = planned(pico.job(tmp_path, changes))
    assert 0 < found["calibration"]["unseen"] < 1
