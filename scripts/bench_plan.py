"""Print what `lrc plan` estimates for a config beside what `lrc compress` then takes.

The script also prints how long another size takes after the first, to compress and to plan.

.venv/bin/python scripts/bench_plan.py configs/demo.yaml
.venv/bin/python scripts/bench_plan.py configs/demo.yaml --set calibration.num_sequences=16
.venv/bin/python scripts/bench_plan.py configs/demo.yaml --cpu-time
.venv/bin/python scripts/bench_plan.py configs/encoder.yaml --set recover.scope=model
    --set recover.tokens=16000

On a machine that others use too, wall time says little: with --cpu-time all times are processor
time, in the estimate and in the run. The script exits with 1 if a total is more than 25 % off, or
another size takes 20 % of the first size's time or more.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

LRC = [sys.executable, "-m", "lrc_cli"]
CPU_TIME = (
    "import time; time.perf_counter = time.process_time; from lrc_cli.cli import main; main()"
)
NOT_COUNTED = ("recover", "evaluation", "selection", "certification")
"""Phases that every size takes in full, so that reuse says nothing about them."""
OFF, LARGEST_SHARE = 0.25, 0.2


def run(*arguments: str) -> tuple[Any, int]:
    """The JSON that `lrc` prints, and the peak of its private memory in bytes."""
    with subprocess.Popen([*LRC, *arguments], stdout=subprocess.PIPE, text=True) as process:
        peak, ended = [0], threading.Event()
        watcher = threading.Thread(target=_watch, args=(process.pid, peak, ended))
        watcher.start()
        text, _ = process.communicate()
        ended.set()
        watcher.join()
    if process.returncode:
        sys.exit(process.returncode)
    return json.loads(text), peak[0]


def _watch(pid: int, peak: list[int], ended: threading.Event) -> None:
    status = Path(f"/proc/{pid}/status")
    while not ended.wait(0.02):
        try:
            lines = status.read_text().splitlines()
        except OSError:  # it is gone
            return
        found = [int(x.split()[1]) * 1024 for x in lines if x.startswith("RssAnon")]
        peak[0] = max([peak[0], *found])


def size_of(directory: Path) -> int:
    """Bytes of all files below a directory."""
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


def largest_work_dir(directory: Path, peak: list[int], ended: threading.Event) -> None:
    """Watch how much the work directory holds."""
    while not ended.wait(1.0):
        try:
            peak[0] = max(peak[0], size_of(directory))
        except OSError:  # a file went while it was looked at
            continue


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--second", type=float, default=0.7, help="the size that is run after it")
    parser.add_argument("--cpu-time", action="store_true", help="processor time, not wall time")
    parser.add_argument("--directory", help="where outputs and work directory go; default: /tmp")
    options = parser.parse_args()
    if options.cpu_time:
        LRC[1:] = ["-c", CPU_TIME]
    overrides = [x for pair in options.set for x in ("--set", pair)]
    print(f"load average before: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores", flush=True)
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        work = Path(folder) / "work"
        common = [options.config, *overrides, "--set", f"runtime.work_dir={work}", "--json"]
        first = [*common, "--output", f"{folder}/first"]
        estimate, _ = run("compress", *first, "--dry-run")
        disk, ended = [0], threading.Event()
        watcher = threading.Thread(target=largest_work_dir, args=(work, disk, ended))
        watcher.start()
        report, memory = run("compress", *first)
        ended.set()
        watcher.join()
        within = show(estimate, report["timing"], memory, disk[0], size_of(Path(folder) / "first"))
        other = [*common, "--set", f"compression.size={options.second}"]
        again, _ = run("compress", *other, "--output", f"{folder}/second")
        start = spent(options.cpu_time)
        run("plan", *other, "--output", f"{folder}/third")
        planning = spent(options.cpu_time) - start
    print(f"load average after: {os.getloadavg()[0]:.1f}")
    seconds = [counted(one["timing"]) for one in (report, again)]
    share = seconds[1] / seconds[0]
    print(
        f"size {options.second:g} after it: {seconds[1]:.1f} s of {seconds[0]:.1f} s ({share:.1%})"
    )
    print("  " + ", ".join(f"{name} {value:.1f}" for name, value in again["timing"].items()))
    print(f"`lrc plan` of it: {planning:.1f} s ({planning / seconds[0]:.1%}), its start included")
    if not (within and max(share, planning / seconds[0]) < LARGEST_SHARE):
        sys.exit(1)


def spent(cpu_time: bool) -> float:
    """Seconds so far: of the wall, or of the processor in commands that have ended."""
    times = os.times()
    return times.children_user + times.children_system if cpu_time else time.perf_counter()


def counted(timing: dict[str, float]) -> float:
    """Seconds of the phases before the evaluation."""
    return sum(value for name, value in timing.items() if name not in NOT_COUNTED)


def show(
    estimate: dict[str, Any], timing: dict[str, float], memory: int, disk: int, output: int
) -> bool:
    """Estimate beside measured, and their ratio; whether all totals are within OFF."""
    print(f"\n{'':<22}{'estimated':>12}{'measured':>12}{'ratio':>8}")
    seconds = estimate["seconds"]
    for name in dict.fromkeys([*seconds, *timing]):
        row(f"{name}, s", seconds.get(name, 0.0), timing.get(name, 0.0))
    totals = [
        ("total, s", sum(seconds.values()), sum(timing.values())),
        ("private memory, MB", estimate["memory"]["peak"] / 1e6, memory / 1e6),
    ]
    for place, measured in zip(estimate["disk"], (disk, output), strict=True):
        totals.append((f"{place['key']}, MB", place["needed"] / 1e6, measured / 1e6))
    for name, estimated, found in totals:
        row(name, estimated, found)
    sys.stdout.flush()
    return all(abs(estimated / found - 1) <= OFF for _, estimated, found in totals)


def row(name: str, estimated: float, measured: float) -> None:
    ratio = f"{estimated / measured:.2f}" if measured else "-"
    print(f"{name:<22}{estimated:>12.1f}{measured:>12.1f}{ratio:>8}")


if __name__ == "__main__":
    main()
