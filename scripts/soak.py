"""Soak `lrc` in random jobs, in kills and in many runs of one process, and print one table.

    .venv/bin/python scripts/soak.py                            all: 100 jobs, 50 kills, 20 runs
    .venv/bin/python scripts/soak.py --compressions 20 --kills 10 --seconds 300
    .venv/bin/python scripts/soak.py --only 17                  the job of a seed once more
    .venv/bin/python scripts/soak.py --only 3 --part kills

Everything random follows from seeds, which are printed. There are three parts:

* Each compression is a random job on a random pico model of the tests. Its output is loaded and
  verified against its source. The matrices are rebuilt from the factors in float64 by plain code;
  in the original network they must give what the loaded output gives, up to rounding.
* Jobs are killed at random moments (SIGKILL, SIGTERM, SIGINT; one or two processes), and the same
  command goes on. At last weights, index and config.json must have the bytes of an undisturbed run.
  After every kill the output is absent, or `lrc verify` finds no fault in it.
* Twenty jobs run in one process, whose private memory may not grow after the fifth job.

In all parts source, data and config are hashed before and after. What is done goes to a log, line
by line; the same command goes on from there, as long as the code is the same. The script exits with
1 if anything failed.
"""

import argparse
import hashlib
import json
import logging
import multiprocessing
import platform
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SUPPORT = ROOT / "tests" / "support"
KILLS_A_JOB = 5
PATIENCE = 600
"""The seconds after which a seed has failed, and its process is killed."""
HOSTILE = (
    "tests/hostile",
    "tests/checkpoint/test_conflicts.py",
    "tests/checkpoint/test_foreign.py",
    "tests/checkpoint/test_side_files.py",
    "tests/commands/test_exit_codes.py",
    "tests/commands/test_exits.py",
    "tests/commands/test_no_code_of_a_checkpoint_runs.py",
    "tests/commands/test_output_places.py",
    "tests/commands/test_places.py",
    "tests/commands/test_wrong_checkpoints.py",
    "tests/commands/test_wrong_jobs.py",
    "tests/config/test_bounds.py",
    "tests/job/test_changed_inputs.py",
    "tests/job/test_damaged_units.py",
    "tests/runtime/test_reading.py",
    "tests/verify/test_what_catches_a_change.py",
)
"""The tests whose cases are hostile inputs, places or moments."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """Names a piece of a part."""

    part: str
    seed: int
    number: int = 0
    """The number of kills."""

    def __str__(self) -> str:
        return f"{self.part} {self.seed}"


# ---------------------------------------------------------------- in a worker


def perform(task: Task, root: Path) -> dict[str, Any]:
    """Performs a task in a worker, which dies after PATIENCE; returns what `outcome` returns."""
    import torch

    logging.disable(logging.WARNING)  # transformers' words on pico models
    torch.set_num_threads(1)  # threads cost more than they give at these sizes
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(PATIENCE)
    try:
        return outcome(task, root)
    finally:
        signal.alarm(0)


def outcome(task: Task, root: Path) -> dict[str, Any]:
    """Performs a task; returns the fields of its Result. An error is a result with a problem."""
    import soak_parts

    try:
        if task.part == "compressions":
            return asdict(soak_parts.compression(task.seed, root))
        if task.part == "kills":
            return asdict(soak_parts.kills(task.seed, root, task.number))
        return asdict(soak_parts.memory(task.seed, root))
    except Exception as error:  # a fault of lrc's or of this script is one result of many
        return {"what": soak_parts.words(task.part, task.seed), "problem": _trace(error)}


def _trace(error: Exception) -> str:
    return "".join(traceback.format_exception(error))[-4000:]


# ---------------------------------------------------------------- tasks and workers


class Log:
    """A file with a line for every task that was done; lines of other code do not count."""

    def __init__(self, file: Path) -> None:
        self.file, self.code = file, _code()
        self.done: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()
        for line in file.read_text().splitlines() if file.exists() else []:
            entry = json.loads(line)
            if entry["code"] == self.code:
                self.done[entry["task"]] = entry

    def add(self, task: Task, fields: Mapping[str, Any], seconds: float) -> None:
        """Writes the result of a task, and says it."""
        entry = {"task": str(task), "code": self.code, "seconds": round(seconds, 1), **fields}
        with self._lock:
            self.done[str(task)] = entry
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a") as handle:
                handle.write(json.dumps(entry) + "\n")
            verdict = "FAILED" if entry.get("problem") else "ok"
            print(f"{task}: {verdict}, {seconds:.0f} s: {entry['what']}", flush=True)
            if entry.get("problem"):
                print(f"    {entry['problem']}\n    again: {again(task)}", flush=True)


def _code() -> str:
    """Returns a hash of all code that a result depends on."""
    files = [
        *(ROOT / "lrc_cli").rglob("*.py"),
        *SUPPORT.glob("*.py"),
        *ROOT.glob("scripts/soak*.py"),
    ]
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def again(task: Task) -> str:
    """Returns the command that does one task again."""
    return f"scripts/soak.py --only {task.seed} --part {task.part}"


def run_all(tasks: Sequence[Task], log: Log, root: Path, workers: int, deadline: float) -> None:
    """Performs the tasks that the log lacks, side by side, until they are done or time is up."""
    waiting: queue.SimpleQueue[Task] = queue.SimpleQueue()
    for task in tasks:
        if str(task) not in log.done:
            waiting.put(task)
    threads = [
        threading.Thread(target=_work, args=(waiting, log, root, deadline)) for _ in range(workers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _work(waiting: "queue.SimpleQueue[Task]", log: Log, root: Path, deadline: float) -> None:
    """Performs tasks in a process of its own, which is replaced where a task ends it."""
    context = multiprocessing.get_context("forkserver")
    pool = ProcessPoolExecutor(1, mp_context=context)
    while time.monotonic() < deadline:
        try:
            task = waiting.get_nowait()
        except queue.Empty:
            break
        began = time.monotonic()
        try:
            fields = pool.submit(perform, task, root).result()
        except BrokenProcessPool:
            pool = ProcessPoolExecutor(1, mp_context=context)
            fields = {"what": str(task), "problem": "the process died, or took too long"}
        log.add(task, fields, time.monotonic() - began)
    pool.shutdown()


# ---------------------------------------------------------------- the table


def count_hostile() -> int | None:
    """Returns how many cases pytest collects from HOSTILE; None, with its words, if it fails."""
    paths = [path for path in HOSTILE if (ROOT / path).exists()]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, *paths], cwd=ROOT, capture_output=True, text=True, check=False)
    found = re.search(r"^(\d+) tests collected", done.stdout, re.MULTILINE)
    if found is None:
        print(f"pytest cannot collect the hostile cases:\n{done.stdout[-2000:]}{done.stderr}")
        return None
    return int(found[1])


def table(tasks: Sequence[Task], log: Log, hostile: int | None) -> str:
    """Returns cases, faults survived, runs soaked and data lost as Markdown."""
    entries = [log.done[str(task)] for task in tasks if str(task) in log.done]
    compressions, kills, memory = (
        [x for x in entries if x["task"].startswith(part)] for part in PARTS
    )
    asked = {part: [task for task in tasks if task.part == part] for part in PARTS}
    asked_kills = sum(task.number for task in asked["kills"])
    passed = sum(not x.get("problem") for x in compressions)
    grown = [x["notes"] for x in memory if x.get("notes")]
    files, lost = _total(entries, "files"), _total(entries, "lost")
    rows = [
        ("hostile cases in the tests", "not counted" if hostile is None else f"{hostile:,}"),
        (
            "random jobs compressed, loaded, verified and equal to the float64 reconstruction",
            f"{passed} of {len(asked['compressions'])}",
        ),
        (
            "kills survived, with the bytes of an undisturbed run",
            f"{_survived(kills)} of {asked_kills}",
        ),
        ("runs soaked in all", f"{_total(entries, 'compressions') + _total(entries, 'faults'):,}"),
        ("growth of private memory from run 5 to run 20", _growth(grown)),
        ("files of the user's lost or changed", f"{lost} of {files:,}"),
    ]
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)])


def _total(entries: Iterable[Mapping[str, Any]], key: str) -> int:
    return sum(entry.get(key, 0) for entry in entries)


def _survived(kills: Iterable[Mapping[str, Any]]) -> int:
    return _total([x for x in kills if not x.get("problem")], "faults")


def _growth(notes: Sequence[Mapping[str, Any]]) -> str:
    if not notes:
        return "not measured"
    after, last = notes[-1]["megabytes"][4], notes[-1]["megabytes"][-1]
    return f"{notes[-1]['growth']:+.1%} ({after:.0f} to {last:.0f} MB)"


# ---------------------------------------------------------------- the command

PARTS = ("compressions", "kills", "memory")


def make_tasks(arguments: argparse.Namespace) -> list[Task]:
    """Returns the tasks that the arguments ask for, in order."""
    if arguments.only is not None:
        return [Task(part=arguments.part, seed=arguments.only, number=KILLS_A_JOB)]
    first = arguments.seed
    left = arguments.kills
    kills = []
    while left > 0:
        kills.append(Task(part="kills", seed=first + len(kills), number=min(KILLS_A_JOB, left)))
        left -= KILLS_A_JOB
    return [
        *(Task(part="memory", seed=first) for _ in range(arguments.memory)),
        *kills,
        *(Task(part="compressions", seed=first + i) for i in range(arguments.compressions)),
    ]


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--compressions", type=int, default=100)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--memory", type=int, choices=(0, 1), default=1, help="0: leave it out")
    parser.add_argument("--seed", type=int, default=0, help="the first seed of every part")
    parser.add_argument("--only", type=int, help="one seed of --part, and nothing else")
    parser.add_argument("--part", choices=PARTS, default="compressions")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing later")
    parser.add_argument("--workers", type=int, default=2, help="processes side by side")
    parser.add_argument("--log", type=Path, default=ROOT / "out" / "soak.jsonl")
    parser.add_argument("--directory", type=Path, help="where to write; default: a temporary one")
    return parser


def main() -> None:
    """Perform what is asked for, print the table and the verdict."""
    arguments = parser().parse_args()
    sys.path.insert(0, str(SUPPORT))
    tasks, began = make_tasks(arguments), time.monotonic()
    log = Log(arguments.log)
    if arguments.only is not None:
        log.done.clear()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        run_all(tasks, log, Path(name), arguments.workers, began + arguments.seconds)
    hostile = count_hostile() if arguments.only is None else None
    print(f"\n{table(tasks, log, hostile)}\n")
    uncounted = arguments.only is None and hostile is None
    sys.exit(verdict(tasks, log, began) or int(uncounted))


def verdict(tasks: Sequence[Task], log: Log, began: float) -> int:
    """Says how it went; returns the exit code."""
    failed = [task for task in tasks if log.done.get(str(task), {}).get("problem")]
    missing = [task for task in tasks if str(task) not in log.done]
    seeds = f"seeds from {min(task.seed for task in tasks)} to {max(task.seed for task in tasks)}"
    print(
        f"{seeds}; {time.monotonic() - began:.0f} s; Python {platform.python_version()}; code"
        f" {log.code}"
    )
    if missing:
        print(f"time is up: {len(missing)} of {len(tasks)} tasks are not done")
    for task in failed:
        print(f"FAILED: {again(task)}")
    return 1 if failed else 0


if __name__ == "__main__":
    main()
