"""These tests run several processes on one job, over gloo: what they compute, how they end."""

import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from families import FAMILIES
from moments_helpers import opened, padded_tokens, sequences
from pico import Models
from process_helpers import PATIENCE, Running, environments, start, start_many
from safetensors.torch import save_file
from torch import Tensor

from lrc_cli.execution.losses import Loss
from lrc_cli.execution.network import make_network
from lrc_cli.execution.segments import find_segments
from lrc_cli.job.statistics.sweep import Measurement, Sweep
from lrc_cli.job.work import WorkDirectory
from lrc_cli.runtime.join import joined
from lrc_cli.runtime.processes import Processes

pytestmark = pytest.mark.long
Changes = dict[str, Any]
SIZES = (1, 2, 4)
CERTIFIED = {"certification.num_sequences": 100, "certification.part": [0.6, 1.0]}
FORKS = multiprocessing.get_context("forkserver")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes a text that is long enough for five micro-batches."""
    file = tmp_path_factory.mktemp("text") / "words.txt"
    file.write_text(pico.words(20_000))
    return file


@pytest.fixture
def job(checkpoint: Models, text: Path) -> Changes:
    return llama(checkpoint, text)


PLACE = {"runtime.device": "auto" if torch.cuda.device_count() >= max(SIZES) else "cpu"}
"""Every process needs a GPU of its own."""


def llama(checkpoint: Models, text: Path, name: str = "llama") -> Changes:
    return PLACE | {
        "model.path": str(checkpoint(name)),
        "calibration.path": str(text),
        "calibration.num_sequences": 300,
        "output.dtype": "float32",
        "evaluation": [],
    }


def ended(processes: list[Running]) -> list[int]:
    return [process.wait() for process in processes]


def compressed(folder: Path, changes: Changes, size: int) -> Path:
    folder.mkdir(exist_ok=True)
    command = ["compress", pico.job(folder, changes)]
    running = start_many(command, folder, size)
    assert ended(running) == [0] * size, [process.err for process in running]
    said = [process.err for process in running]
    assert "kept " in said[0] and not any(said[1:]), "only the first speaks"
    return folder / "out"


def measure(environment: dict[str, str], path: str, root: str, center: bool, to: str) -> None:
    """Returns the Gram matrices at their owner, in float64, as one of several processes."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    module, layers = opened(Path(path))
    network = make_network(module, device=torch.device("cpu"), dtype=torch.float32)
    given = sequences(padded_tokens(rows=14, length=12))
    graded = {layer.name for layer in layers}
    segmentation = find_segments(network, layers, graded, next(given.batches(1)))
    found: dict[str, Tensor] = {}
    with joined() as processes, WorkDirectory(Path(root), {}, processes) as work:
        measurement = Measurement(
            network=network,
            chain=segmentation.chain,
            segments=segmentation.segments,
            batches=list(given.batches(2)),
            leaders=segmentation.leaders,
            graded=graded,
            loss=Loss(kind="sampled"),
            seed=0,
            center=center,
        )
        for _, moments in Sweep(measurement, work, finished=lambda _: False).run(lambda _: None):
            moments.sum_to({layer.name: processes.size - 1 for layer in layers}, processes)
            for kind, sums in (("gram", moments.grams), ("fisher", moments.fishers)):
                found.update({f"{kind} {name}": gram.mean() for name, gram in sums.items()})
        if processes.rank == processes.size - 1:
            torch.save(found, to)


@pytest.mark.parametrize("center", [False, True])
def test_gram_matrices_are_the_same_however_many_sum_them(
    center: bool, tmp_path: Path, checkpoint: Models
) -> None:
    path, found = str(checkpoint("llama")), []
    for size in SIZES:
        to = str(tmp_path / f"{size}.pt")
        started = [
            FORKS.Process(target=measure, args=(e, path, str(tmp_path / f"{size}"), center, to))
            for e in environments(size)
        ]
        for process in started:
            process.start()
        for process in started:
            process.join(PATIENCE)
        assert [process.exitcode for process in started] == [0] * size
        found.append(torch.load(to))
    assert len(found[0]) == 2 * (4 + 7)
    for other in found[1:]:
        assert set(other) == set(found[0])
        for name, gram in found[0].items():
            assert gram.norm() > 0
            assert (other[name] - gram).norm() <= 1e-12 * gram.norm(), name


def whole_units(folder: Path, stage: str) -> dict[str, dict[str, Tensor]]:
    files = folder.glob(f".lrc-work/*/{stage}/*.safetensors")
    return {file.stem: pico.read_state(file) for file in files}


def figures(value: Any) -> list[float]:
    """Returns all fractions in a part of a report, in order."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return list(itertools.chain.from_iterable(map(figures, value)))
    return [value] if isinstance(value, float) else []


def assert_same(first: Path, second: Path) -> None:
    """Checks what two runs must share that have added in another order."""
    for stage in ("statistics", "spectra"):
        one, other = (whole_units(output.parent, stage) for output in (first, second))
        assert one and set(one) == set(other)
        for unit, tensors in one.items():
            for name, tensor in tensors.items():
                if name.startswith("vectors."):  # clustered values leave their vectors open
                    continue
                scale = tensor.abs().max()
                assert (other[unit][name] - tensor).abs().max() <= 1e-6 * scale, (unit, name)
    before, after = (json.loads((x / "report.json").read_text()) for x in (first, second))
    ranks, other_ranks = ([x.get("rank") for x in r["layers"]] for r in (before, after))
    assert ranks == other_ranks and any(ranks)
    for part in ("layers", "quality", "certificate"):
        assert figures(after[part]) == pytest.approx(figures(before[part]), rel=1e-5), part
    z, other_z = (pico.rebuilt(pico.read_state(output)) for output in (first, second))
    for name, tensor in z.items():
        difference = (other_z[name] - tensor).double()  # a batch norm counts in integers
        assert difference.norm() <= 1e-4 * tensor.double().norm(), name


@pytest.mark.parametrize(
    ("name", "changes", "sizes"),
    [
        ("llama", {"compression.sequential": False, "evaluation": None, **CERTIFIED}, SIZES),
        ("llama", {"compression.sequential": True, "compression.center": True}, (1, 2)),
        ("bert-mlm", {"compression.size": 0.7}, (1, 4)),
    ],
)
def test_the_outcome_does_not_depend_on_the_number_of_processes(
    name: str,
    changes: Changes,
    sizes: tuple[int, ...],
    tmp_path: Path,
    checkpoint: Models,
    text: Path,
) -> None:
    changes = llama(checkpoint, text, name) | changes
    outputs = [compressed(tmp_path / str(size), changes, size) for size in sizes]
    for output in outputs[1:]:
        assert_same(outputs[0], output)
    decision = json.loads((outputs[0] / "report.json").read_text())["sequential"]
    if changes.get("compression.sequential"):
        assert decision["used"] and decision["held_back"] > 0


def test_each_process_solves_and_writes_its_own_units(
    tmp_path: Path, checkpoint: Models, text: Path
) -> None:
    changes = llama(checkpoint, text, "llama-long") | {"compression.sequential": False}
    compressed(tmp_path, changes, 2)
    puts = [(tmp_path / f"puts-{rank}").read_text().splitlines() for rank in range(2)]
    for stage in ("statistics/", "spectra/", "factors/"):
        one, other = ({line for line in lines if line.startswith(stage)} for lines in puts)
        assert not one & other, "nothing is done twice"
        assert len(one) == len(other) == 6, "twelve blocks of one shape"


def test_owners_have_about_as_much_to_do() -> None:
    """The largest load is at most 4/3 of the least possible (Graham 1969)."""

    class Three(Processes):
        size = 3

    costs = {str(number): float(number**3) for number in range(1, 12)}
    load = [0.0] * 3
    for name, owner in Three().owners(costs).items():
        load[owner] += costs[name]
    assert max(load) <= 4 / 3 * max(sum(costs.values()) / 3, *costs.values())


@pytest.mark.parametrize(
    ("name", "number"), [("attention", 40), ("with_idle", 40), ("pictures", 64)]
)
def test_a_network_that_runs_whole_is_shared_out_too(
    name: str,
    number: int,
    tmp_path: Path,
    plain_folder: pico.PlainFolder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With 40 sequences one process has no data. Probes are random; a layer is out of reach."""
    changes = plain_folder.model(name) | {"output.dtype": "float32", "compression.size": 0.9}
    changes |= {"calibration.num_sequences": number, **PLACE}
    monkeypatch.syspath_prepend(str(plain_folder.path))
    assert_same(*(compressed(tmp_path / str(size), changes, size) for size in (1, 2)))


DATA = {
    "mixtral": {"input_ids": torch.randint(4, 64, (600, 12), generator=torch.Generator())},
    "resnet": {"pixel_values": torch.randn(64, 3, 32, 32, generator=torch.Generator())},
}


@pytest.mark.parametrize("name", DATA)
def test_experts_and_convolutions_are_shared_out_too(name: str, tmp_path: Path) -> None:
    """There are several micro-batches, and an expert's tokens come from both processes."""
    model, data = FAMILIES[name].build(), tmp_path / "data.safetensors"
    pico.randomise(model)
    model.save_pretrained(tmp_path / "dense")
    save_file(DATA[name], data)
    changes = {
        "model.path": str(tmp_path / "dense"),
        "calibration.path": str(data),
        "calibration.num_sequences": len(next(iter(DATA[name].values()))),
        "compression.sequential": True,
        "output.dtype": "float32",
        "evaluation": None,
        **PLACE,
    }
    assert_same(*(compressed(tmp_path / str(size), changes, size) for size in (1, 2)))


def test_factors_are_trained_by_several_processes(tmp_path: Path, job: Changes) -> None:
    changes = job | {"recover.scope": "model", "recover.tokens": 40_000, "compression.size": 0.5}
    changes["calibration.num_sequences"] = 100
    alone, both = (compressed(tmp_path / str(size), changes, size) for size in (1, 2))
    first, second = (json.loads((x / "report.json").read_text())["recovery"] for x in (alone, both))
    assert first["after"] < 0.95 * first["before"]
    assert second["before"] == pytest.approx(first["before"], rel=1e-4)
    assert second["after"] == pytest.approx(first["after"], rel=1e-2)
    assert second["steps"] == first["steps"]


def test_windows_are_trained_by_several_processes(tmp_path: Path, job: Changes) -> None:
    """Every process runs some micro-batches of every window, and all come to the same numbers."""
    changes = job | {"recover.scope": "block", "recover.tokens": 20_000, "compression.size": 0.5}
    changes["calibration.num_sequences"] = 100
    alone, both = (compressed(tmp_path / str(size), changes, size) for size in (1, 2))
    first, second = (json.loads((x / "report.json").read_text())["recovery"] for x in (alone, both))
    assert first["after"] < first["before"] and second["after"] < second["before"]
    assert second["after"] == pytest.approx(first["after"], rel=1e-2)
    for one, other in zip(first["windows"], second["windows"], strict=True):
        assert other["after"] <= other["before"]
        assert other["after"] == pytest.approx(one["after"], rel=1e-2)


def test_several_sizes_are_written_by_several_processes(tmp_path: Path, job: Changes) -> None:
    command = ["compress", pico.job(tmp_path, job), "--sizes", "0.8,0.6"]
    assert ended(start_many(command, tmp_path, 2)) == [0, 0]
    outputs = sorted(file.parent for file in tmp_path.glob("out*/report.json"))
    assert len(outputs) == 2
    again = start_many(command, tmp_path, 2)
    assert ended(again) == [0, 0] and not again[1].err
    for output in outputs:
        assert f"{output}: already what the config asks for\n" in again[0].err


@pytest.mark.parametrize("command", ["plan", "compress --dry-run", "verify"])
def test_what_works_in_one_process_says_so_once(command: str, tmp_path: Path, job: Changes) -> None:
    name, *options = command.split()
    running = start_many([name, pico.job(tmp_path, job), *options], tmp_path, 2)
    assert ended(running) == [2, 2]
    assert "".join(process.err for process in running) == (
        f"error: lrc {command}: works in one process, and torchrun has started 2;"
        " start it without torchrun\n"
    )


def reached(folder: Path, stage: str) -> Callable[[], bool]:
    return lambda: any(folder.glob(f".lrc-work/*/{stage}/**/*.safetensors"))


def statistics_of(folder: Path) -> dict[Path, int]:
    files = folder.glob(".lrc-work/*/statistics/*.safetensors")
    return {file: file.stat().st_mtime_ns for file in files}


def test_a_killed_process_ends_all_and_another_number_of_them_goes_on(
    tmp_path: Path, checkpoint: Models, text: Path
) -> None:
    """The run goes on from stored units and from gradients between two blocks."""
    changes = llama(checkpoint, text, "llama-long") | {"calibration.num_sequences": 150}
    units, gradients = (reached(tmp_path, stage) for stage in ("statistics", "gradients"))

    def on_the_way_back() -> bool:
        return units() and gradients()

    command = ["compress", pico.job(tmp_path, changes)]
    first, other = start_many(command, tmp_path, 2, store_every=0.0)
    assert other.stop_when(on_the_way_back, signal.SIGKILL) == 128 + signal.SIGKILL
    since = time.monotonic()
    assert first.wait() == 1 and time.monotonic() - since < 60
    assert first.err.endswith(
        "error: process 0 of 2 lost another one, which was killed or cut off;"
        " the same command goes on where it stopped\n"
    )
    assert not list(tmp_path.glob("out*"))
    kept = statistics_of(tmp_path)
    assert gradients()
    running = start_many(command, tmp_path, 3)
    assert ended(running) == [0, 0, 0], [process.err for process in running]
    assert kept.items() <= statistics_of(tmp_path).items(), "finished units were computed again"
    assert_same(compressed(tmp_path / "calm", changes, 1), tmp_path / "out")


def test_the_same_number_of_processes_writes_the_same_bytes_killed_or_not(
    tmp_path: Path, job: Changes
) -> None:
    changes = job | {"compression.sequential": True}
    calm = compressed(tmp_path / "calm", changes, 2)
    command = ["compress", pico.job(tmp_path, changes)]
    first, other = start_many(command, tmp_path, 2)
    first.stop_when(reached(tmp_path, "factors"), signal.SIGKILL)
    since = time.monotonic()  # all processes meet at the first one
    assert other.wait() == 1 and time.monotonic() - since < 60
    assert ended(start_many(command, tmp_path, 2)) == [0, 0]
    names = ("model.safetensors", "config.json")
    assert [(calm / x).read_bytes() for x in names] == [
        (tmp_path / "out" / x).read_bytes() for x in names
    ]


def test_an_error_of_one_process_is_said_once_and_ends_all(tmp_path: Path, job: Changes) -> None:
    command = ["compress", pico.job(tmp_path, job), "-q"]
    first, other = start_many(command, tmp_path, 2, full_disk=(1, 20_000))
    assert other.wait() == 1
    since = time.monotonic()
    assert first.wait() == 1 and time.monotonic() - since < 60
    assert first.err == "" and other.err.startswith("error: ") and other.err.count("\n") == 1
    assert "File too large" in other.err and not list(tmp_path.glob("out*"))


FAILING = """
import os, sys, pico_factories
from torch import nn


class Model(nn.Module):
    calls = 0

    def __init__(self):
        super().__init__()
        for name, part in pico_factories.mlp().named_children():
            self.add_module(name, part)

    def forward(self, x):
        Model.calls += 1
        if Model.calls == 6 and os.environ["RANK"] == "RANK_THAT_FAILS":
            RAISE
        for part in self.children():
            x = part(x)
        return x
"""


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("error", ["raise ValueError('worn out')", "sys.exit(0)", "1 / 0"])
def test_the_trace_of_any_process_is_found_and_said(
    error: str,
    rank: int,
    tmp_path: Path,
    plain_folder: pico.PlainFolder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = FAILING.replace("RANK_THAT_FAILS", str(rank)).replace("RAISE", error)
    name = f"failing_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(plain_folder.path))
    monkeypatch.syspath_prepend(str(tmp_path))
    changes = plain_folder.model("mlp") | {"model.factory": f"{name}:Model", **PLACE}
    running = start_many(["compress", pico.job(tmp_path, changes)], tmp_path, 2)
    since = time.monotonic()
    assert ended(running) == [1, 1] and time.monotonic() - since < 60
    log = next(tmp_path.rglob(f"run.{rank}.log" if rank else "run.log"))
    said = running[rank].err.splitlines()[-1]
    assert "network fails: " in said and said.endswith(f"trace is in {log}")
    assert "Traceback" in log.read_text() and f"{name}.py" in log.read_text()
    assert sum(process.err.count("error: ") for process in running) == 1
    if rank:
        found = f"process 1 of 2 failed first; the trace is in {log}"
        assert found in running[0].err and found in (log.parent / "run.log").read_text()
    else:
        assert not list(tmp_path.rglob("run.1.log")) and "Traceback" not in running[1].err


def test_a_mistake_that_all_see_is_said_once(tmp_path: Path, job: Changes) -> None:
    command = ["compress", pico.job(tmp_path, job | {"calibration.num_sequences": 9999})]
    running = start_many([*command, "-q"], tmp_path, 3)
    assert ended(running) == [2, 2, 2]
    (said,) = filter(None, (process.err for process in running))
    assert said.startswith("error: calibration: ") and said.count("\n") == 1


def test_a_signal_to_all_stops_all_and_the_same_command_goes_on(
    tmp_path: Path, job: Changes
) -> None:
    command = ["compress", pico.job(tmp_path, job)]
    running = start_many(command, tmp_path, 2)
    running[0].wait_until(reached(tmp_path, "inputs"))
    for process in running:
        assert process.process.pid is not None
        os.kill(process.process.pid, signal.SIGTERM)
    assert ended(running) == [143, 143]
    said = "".join(process.err for process in running)
    assert said.count("\ninterrupted; the same command goes on where it stopped\n") == 1
    assert "Traceback" not in said and not list(tmp_path.glob("out*"))
    assert start(command, tmp_path / "log").wait() == 0


def torchrun(*arguments: object) -> list[str]:
    strings = [str(argument) for argument in arguments]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    return [*torchrun, "-m", "lrc_cli", *strings]


def test_torchrun_runs_it(tmp_path: Path, job: Changes) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = torchrun("compress", pico.job(tmp_path, job), "-q")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'out'}\n"), done.stderr
    assert "error" not in done.stderr
    output = compressed(tmp_path / "forked", job, 2)
    assert (output / "model.safetensors").read_bytes() == (
        tmp_path / "out" / "model.safetensors"
    ).read_bytes()


def test_under_torchrun_a_killed_process_ends_all_within_a_minute(
    tmp_path: Path, job: Changes
) -> None:
    command = torchrun("compress", pico.job(tmp_path, job))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not reached(tmp_path, "inputs")():
            time.sleep(0.01)
        ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(ranks[-1]), signal.SIGKILL)
        since = time.monotonic()
        _, said = process.communicate()
    assert process.returncode == 1 and time.monotonic() - since < 60
    assert "Signal 9 (SIGKILL)" in said and not list(tmp_path.glob("out*"))
