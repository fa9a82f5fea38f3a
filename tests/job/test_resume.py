"""These tests get the same bytes whatever happened: other processes, kills, signals, reuse."""

import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from pico import Models
from process_helpers import Running, start

from lrc_cli.checkpoint.manifest import PARTIAL_MARK
from lrc_cli.execution.chain import HEAD, TAIL, Segment
from lrc_cli.execution.walk import Walk
from lrc_cli.job.work import PASSING
from lrc_cli.runtime.progress import Progress
from lrc_cli.runtime.spill import HostMemory

pytestmark = pytest.mark.long
Changes = dict[str, Any]

SEQUENTIAL: Changes = {"compression.sequential": True, "calibration.num_sequences": 100}
"""Sequential fitting is on, with enough tokens for it."""


def contents(output: Path) -> dict[str, bytes]:
    """Returns the files whose bytes are promised: weights, index and config."""
    files = [*output.glob("*.safetensors"), *output.glob("*.index.json"), output / "config.json"]
    return {file.name: file.read_bytes() for file in files}


def times(directory: Path, stage: str) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in directory.glob(f".lrc-work/*/{stage}/**/*.*")}


@pytest.fixture
def long_job(checkpoint: Models, text: Path) -> Changes:
    """Returns a job of twelve layers, which leaves time to interrupt it."""
    return {
        "model.path": str(checkpoint("llama-long")),
        "calibration.path": str(text),
        "output.shard_size": "300KB",
        "evaluation": [],
    }


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, checkpoint: Models, text: Path
) -> dict[str, bytes]:
    """Returns what `long_job` writes when nothing happens."""
    changes: Changes = {
        "model.path": str(checkpoint("llama-long")),
        "calibration.path": str(text),
        "output.shard_size": "300KB",
        "evaluation": [],
    }
    output, _ = pico.compressed(tmp_path_factory.mktemp("undisturbed"), changes)
    return contents(output)


def test_two_processes_write_the_same_bytes(tmp_path: Path, llama_job: Changes) -> None:
    """The job runs through the installed command and as a module, from two directories."""
    lrc = Path(sys.executable).with_name("lrc")
    written, manifests = [], []
    for seed, command in (("1", [lrc]), ("2", [sys.executable, "-m", "lrc_cli"])):
        folder = tmp_path / seed
        folder.mkdir()
        changes = llama_job | {"output.path": "results/out", "output.shard_size": "30KB"}
        pico.job(folder, changes)
        done = subprocess.run(
            [*command, "compress", "job.yaml"],
            cwd=folder,
            env={**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stdout) == (0, "results/out\n"), done.stderr
        assert "kept " in done.stderr and "perplexity" in done.stderr
        output = folder / "results" / "out"
        written.append(contents(output))
        manifests.append(json.loads((output / "manifest.json").read_text()))
    assert len(written[0]) > 3 and written[0] == written[1]
    assert manifests[0]["tensors"] == manifests[1]["tensors"]
    assert all(manifests[0]["files"][name] == manifests[1]["files"][name] for name in written[0])


@pytest.mark.parametrize("moment", ["statistics", "spectra", "factors", "out.partial"])
def test_a_killed_run_goes_on_to_the_same_bytes(
    moment: str, tmp_path: Path, long_job: Changes, undisturbed: dict[str, bytes]
) -> None:
    command = ["compress", pico.job(tmp_path, long_job)]
    work = tmp_path / ".lrc-work"

    def reached() -> bool:
        if moment == "out.partial":
            return any((tmp_path / moment).glob("*"))
        return any(work.glob(f"*/{moment}/**/*.safetensors"))

    code = start(command, tmp_path / "log").stop_when(reached, signal.SIGKILL)
    assert code == 128 + signal.SIGKILL and not (tmp_path / "out").exists()
    finished = times(tmp_path, "*")
    running = start(command, tmp_path / "log")
    assert running.wait() == 0, running.err
    assert contents(tmp_path / "out") == undisturbed
    assert not (tmp_path / "out.partial").exists()
    whole = {
        file: time
        for file, time in finished.items()
        if file.suffix == ".safetensors" and not set(file.parts) & set(PASSING)
    }
    assert whole and all(file.stat().st_mtime_ns == time for file, time in whole.items()), (
        "finished units were computed again"
    )


ENDS = {
    (signal.SIGHUP, "spectra"): 129,
    (signal.SIGTERM, "factors"): 143,
    (signal.SIGINT, "out.partial"): 130,
    (signal.SIGQUIT, "factors"): 131,
    (signal.SIGUSR1, "out.partial"): 138,
    (signal.SIGALRM, "spectra"): 142,
    (signal.SIGABRT, "out.partial"): 134,
    (signal.SIGPIPE, "factors"): 0,
    (signal.SIGWINCH, "spectra"): 0,
    (signal.SIGCONT, "out.partial"): 0,
}
"""The exit code for a signal at a moment, as a shell gives it."""


@pytest.mark.parametrize(("number", "moment", "code"), [(*key, code) for key, code in ENDS.items()])
def test_any_signal_ends_a_run_whole_or_not_at_all(
    number: signal.Signals,
    moment: str,
    code: int,
    tmp_path: Path,
    long_job: Changes,
    undisturbed: dict[str, bytes],
) -> None:
    command, written = ["compress", pico.job(tmp_path, long_job)], moment == "out.partial"
    pattern = "out.partial/*" if written else f".lrc-work/*/{moment}/**/*.safetensors"
    running = start(command, tmp_path / "log")
    ended = running.stop_when(lambda: any(tmp_path.glob(pattern)), number)
    # Files that were written are published as they are, or the run ends in time.
    assert ended in ((code, 0) if written else (code,))
    assert "Traceback" not in running.err
    assert (tmp_path / "out").exists() == (ended == 0)
    again = start(command, tmp_path / "again")
    assert again.wait() == 0, again.err
    assert contents(tmp_path / "out") == undisturbed


@pytest.mark.parametrize("method", ["curvature", "frobenius"])
def test_kills_at_random_moments_of_the_statistics_change_nothing(
    method: str, tmp_path: Path, long_job: Changes
) -> None:
    seed = time.time_ns()
    print(f"seed {seed}")  # shown where the test fails
    chance = random.Random(seed)
    changes = long_job | {"compression.method": method, "compression.sequential": False}
    calm = tmp_path / "calm"
    calm.mkdir()
    output, report = pico.compressed(calm, changes)
    command = ["compress", pico.job(tmp_path, changes)]
    kept: dict[Path, int] = {}
    for number in range(3):
        log = tmp_path / f"log-{number}"
        log.touch()
        running = start(command, log)
        # Late kills leave no statistics to collect, and fall on the stages after them.
        running.wait_until(lambda r=running: re.search("statistics |spectra ", r.err) is not None)
        moment = time.monotonic() + chance.uniform(0, report["timing"]["statistics"] / 3)
        running.stop_when(lambda moment=moment: time.monotonic() > moment, signal.SIGKILL)
        now = times(tmp_path, "statistics")
        assert kept.items() <= now.items(), "finished units were computed again"
        kept = {file: when for file, when in now.items() if file.suffix == ".safetensors"}
    running = start(command, tmp_path / "log")
    assert running.wait() == 0, running.err
    assert kept.items() <= times(tmp_path, "statistics").items()
    assert contents(tmp_path / "out") == contents(output)
    (work,) = tmp_path.glob(".lrc-work/*")
    assert not {path.name for path in work.iterdir()} & set(PASSING), "what was on the way is left"


def test_kills_at_random_moments_of_a_whole_run_change_nothing(
    tmp_path: Path, long_job: Changes
) -> None:
    """Kills may fall into sequential fits, evaluation, certification or the writing."""
    seed = time.time_ns()
    print(f"seed {seed}")  # shown where the test fails
    chance = random.Random(seed)
    changes = long_job | SEQUENTIAL | {"certification.part": [0.6, 1.0], "evaluation": None}
    calm = tmp_path / "calm"
    calm.mkdir()
    output, report = pico.compressed(calm, changes)
    assert report["sequential"]["used"]
    command = ["compress", pico.job(tmp_path, changes)]
    for number in range(4):
        log = tmp_path / f"log-{number}"
        log.touch()
        running = start(command, log)
        running.wait_until(lambda r=running: "checks: " in r.err)
        moment = time.monotonic() + chance.uniform(0, sum(report["timing"].values()) / 2)

        def is_time(running: Running = running, moment: float = moment) -> bool:
            return time.monotonic() > moment or not running.process.is_alive()

        while not is_time():
            time.sleep(0.001)
        running.process.kill()
        if running.wait() == 0:  # the run was faster than the kill
            break
        if (tmp_path / "out").exists():  # between the rename and the end
            break
    running = start(command, tmp_path / "log")
    assert running.wait() == 0, running.err
    assert contents(tmp_path / "out") == contents(output)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("limit", ["0B", "20KB"])
@pytest.mark.parametrize("method", ["curvature", "frobenius"])
def test_what_does_not_fit_the_memory_limit_goes_to_disk_and_comes_back_the_same(
    method: str, limit: str, tmp_path: Path, llama_job: Changes, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep, in_file = HostMemory.keep, HostMemory._in_file
    spilled: set[str] = set()
    phases = noted_phases(monkeypatch)

    def watched(memory: HostMemory, tensor: torch.Tensor) -> torch.Tensor:
        kept = keep(memory, tensor)
        assert memory.limit is None or memory.held <= memory.limit
        return kept

    def noted(memory: HostMemory, tensor: torch.Tensor) -> torch.Tensor:
        spilled.add(phases[-1])
        return in_file(memory, tensor)

    monkeypatch.setattr(HostMemory, "keep", watched)
    monkeypatch.setattr(HostMemory, "_in_file", noted)
    written = []
    for name, memory in (("all", None), ("limited", limit)):
        (tmp_path / name).mkdir()
        changes = {"compression.method": method, "runtime.memory_limit": memory, **SEQUENTIAL}
        spilled.clear()
        output, report = pico.compressed(tmp_path / name, llama_job | changes)
        assert report["sequential"]["used"]
        written.append(contents(output))
    assert written[0] == written[1]
    assert spilled >= {"statistics", "factors", "evaluation"}


def test_both_networks_are_compared_block_by_block(
    tmp_path: Path, long_job: Changes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All micro-batches pass a segment before any micro-batch comes to the next segment."""
    phases, run = noted_phases(monkeypatch), Walk.run
    calls: dict[str, list[tuple[str, int]]] = {}

    def noted(walk: Walk, segment: Segment, index: int, *rest: Any, **options: Any) -> Any:
        calls.setdefault(phases[-1], []).append((segment.name, index))
        return run(walk, segment, index, *rest, **options)

    monkeypatch.setattr(Walk, "run", noted)
    changes = long_job | {"evaluation": None, "certification.part": [0.6, 1.0]}
    pico.compressed(tmp_path, changes)
    blocks = [f"model.layers.{number}" for number in range(12)]
    for phase in ("evaluation", "certification"):
        order = [name for name, _ in itertools.groupby(name for name, _ in calls[phase])]
        assert order == [HEAD, *blocks, TAIL], phase
        assert len({index for _, index in calls[phase]}) > 1, "one micro-batch shows nothing"


def noted_phases(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Returns the names of the phases that were begun, in order."""
    begun, phase = [""], Progress.phase

    def noted(progress: Progress, name: str, cost: float) -> Any:
        begun.append(name)
        return phase(progress, name, cost)

    monkeypatch.setattr(Progress, "phase", noted)
    return begun


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_how_to_go_on(
    number: int, tmp_path: Path, long_job: Changes, undisturbed: dict[str, bytes]
) -> None:
    command = ["compress", pico.job(tmp_path, long_job)]
    running = start(command, tmp_path / "log")
    code = running.stop_when(
        lambda: any(tmp_path.glob(".lrc-work/*/spectra/*.safetensors")), number
    )
    assert code == {signal.SIGINT: 130, signal.SIGTERM: 143}[signal.Signals(number)]
    assert "the same command goes on where it stopped" in running.err
    assert "Traceback" not in running.err
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
    running = start(command, tmp_path / "log")
    assert running.wait() == 0, running.err
    assert contents(tmp_path / "out") == undisturbed


def test_two_runs_do_not_share_a_work_directory(tmp_path: Path, long_job: Changes) -> None:
    command = ["compress", pico.job(tmp_path, long_job)]
    first = start(command, tmp_path / "log")
    first.wait_until(lambda: any(tmp_path.glob(".lrc-work/*/statistics/*.safetensors")))
    # The first run is held where it is, however long the second one takes to come to the lock.
    assert first.process.pid is not None
    os.kill(first.process.pid, signal.SIGSTOP)
    try:
        ended = pico.call(*command, "--force", "-q")
    finally:
        os.kill(first.process.pid, signal.SIGCONT)
    assert ended.code == 1 and "another lrc run is using it" in ended.err
    assert first.wait() == 0 and (tmp_path / "out").exists()


def test_the_same_config_again_is_said_and_nothing_is_done(
    tmp_path: Path, llama_job: Changes
) -> None:
    config = pico.job(tmp_path, llama_job)
    assert pico.call("compress", config).code == 0
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()}
    ended = pico.call("compress", config)
    assert ended.code == 0 and ended.out == f"{tmp_path / 'out'}\n"
    assert "already what the config asks for" in ended.err
    assert before == {file: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()}
    as_json = pico.call("compress", config, "--json", "-q")
    assert json.loads(as_json.out) == json.loads((tmp_path / "out" / "report.json").read_text())


@pytest.mark.parametrize(
    "change",
    [
        {"compression.size": 0.5},
        {"compression.method": "svd"},
        {"calibration.seed": 1},
        {"output.dtype": "float32"},
        {"evaluation": []},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_config_needs_force(change: Changes, tmp_path: Path, llama_job: Changes) -> None:
    pico.compressed(tmp_path, llama_job)
    before = contents(tmp_path / "out")
    config = pico.job(tmp_path, llama_job | change)
    ended = pico.call("compress", config, "-q")
    assert ended.code == 2 and "--force" in ended.err and ended.err.count("\n") == 1
    assert contents(tmp_path / "out") == before
    assert pico.call("compress", config, "--force", "-q").code == 0
    if change != {"evaluation": []}:
        assert contents(tmp_path / "out") != before
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {".lrc-work", "job.yaml", "out"}


def test_other_data_or_weights_are_not_taken_for_the_same(
    tmp_path: Path, checkpoint: Models, text: Path
) -> None:
    words = tmp_path / "words.txt"
    words.write_bytes(text.read_bytes())
    changes = {"model.path": str(checkpoint("llama")), "calibration.path": str(words)}
    pico.compressed(tmp_path, changes)
    before = contents(tmp_path / "out")
    words.write_text(pico.words(6000, seed=9))
    assert pico.call("compress", tmp_path / "job.yaml", "-q").code == 2
    assert pico.call("compress", tmp_path / "job.yaml", "-q", "--force").code == 0
    assert contents(tmp_path / "out") != before


def test_force_never_replaces_what_lrc_did_not_write(tmp_path: Path, llama_job: Changes) -> None:
    mine = tmp_path / "out" / "thesis.txt"
    mine.parent.mkdir()
    mine.write_text("years of work")
    for options in ((), ("--force",)):
        ended = pico.call("compress", pico.job(tmp_path, llama_job), "-q", *options)
        assert ended.code == 2 and ended.err.count("\n") == 1
    assert "was not written by lrc" in ended.err
    assert mine.read_text() == "years of work"


def test_another_size_reuses_the_first_phase(tmp_path: Path, llama_job: Changes) -> None:
    pico.compressed(tmp_path, llama_job)
    kept = times(tmp_path, "statistics") | times(tmp_path, "spectra")
    assert len(kept) >= 4
    smaller = llama_job | {
        "compression.size": 0.4,
        "compression.storage": "factors",
        "compression.allocation": "relative",
    }
    output, report = pico.compressed(tmp_path, smaller, "--force")
    assert times(tmp_path, "statistics") | times(tmp_path, "spectra") == kept
    assert report["size"]["kept_compressible"] <= 0.4
    assert "statistics" not in report["timing"] and "spectra" not in report["timing"]
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    alone, _ = pico.compressed(fresh, smaller)
    assert contents(output) == contents(alone), "what was reused was not the same"
    pico.compressed(tmp_path, smaller, "--force", "--restart")
    again = times(tmp_path, "statistics") | times(tmp_path, "spectra")
    assert set(again) == set(kept) and not set(again.values()) & set(kept.values())


def test_an_explicit_work_directory_belongs_to_one_set_of_statistics(
    tmp_path: Path, llama_job: Changes
) -> None:
    changes = llama_job | {"runtime.work_dir": str(tmp_path / "work")}
    pico.compressed(tmp_path, changes)
    assert list((tmp_path / "work" / "spectra").iterdir())
    assert not (tmp_path / ".lrc-work").exists()
    config = pico.job(tmp_path, changes | {"runtime.seed": 1})
    ended = pico.call("compress", config, "--force", "-q")
    assert ended.code == 2 and "made with another seed" in ended.err
    assert (tmp_path / "out").exists()


def test_leavings_of_a_crash_are_tidied(tmp_path: Path, llama_job: Changes) -> None:
    output, _ = pico.compressed(tmp_path, llama_job)
    before = contents(output)
    output.rename(tmp_path / "out.lrc-old")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "junk").write_text("x")
    (tmp_path / "out.partial" / PARTIAL_MARK).touch()
    ended = pico.call("compress", tmp_path / "job.yaml")
    assert ended.code == 0 and "already" in ended.err
    assert contents(output) == before and not (tmp_path / "out.lrc-old").exists()
    pico.compressed(tmp_path, llama_job | {"compression.size": 0.5}, "--force")
    assert {path.name for path in tmp_path.iterdir()} == {".lrc-work", "job.yaml", "out"}


@pytest.mark.parametrize(("name", "largest"), [("llama", 20_000), ("qwen2", 200_000)])
def test_a_full_disk_is_one_sentence_and_leaves_no_output(
    name: str, largest: int, tmp_path: Path, checkpoint: Models, text: Path
) -> None:
    """The first limit is met in the work directory, the second while the weights are written."""
    changes = {"model.path": str(checkpoint(name)), "calibration.path": str(text)}
    command = ["compress", pico.job(tmp_path, changes), "-q"]
    running = start(command, tmp_path / "log", largest_file=largest)
    assert running.wait() == 1
    assert running.err.startswith("error: ") and running.err.count("\n") == 1
    assert "File too large" in running.err and "goes on" in running.err
    assert bool(list(tmp_path.glob(".lrc-work/*/factors/*/*.safetensors"))) == (name == "qwen2")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
    assert pico.call(*command).code == 0
