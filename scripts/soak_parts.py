"""The parts of scripts/soak.py: random compressions, kills, and many runs in one process."""

import ctypes
import gc
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pico
import process_helpers
import soak_checks
from process_helpers import Running
from soak_cases import FACTORIES, Case, draw, source_of, write
from soak_checks import Different

from lrc_cli.runtime.memory import private_bytes

OURS = (
    "out",
    "out.partial",
    "out.lrc-old",
    "out.lrc-lock",
    ".lrc-work",
    "work",
    "float64",
    "ranks",
    "older",
)
"""Names in a case's folder that do not belong to its user."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """Says what became of one seed of a part."""

    what: str
    """The case in words."""
    compressions: int = 0
    faults: int = 0
    """Kills that were survived."""
    files: int = 0
    """Files of the user's that were compared by their hashes."""
    lost: int = 0
    """Files of the user's that changed or went away."""
    notes: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None


# ---------------------------------------------------------------- one compression


def compression(seed: int, root: Path) -> Result:
    """Does `attempt` with the case of a seed."""
    return attempt(draw(seed), root)


def attempt(case: Case, root: Path) -> Result:
    """Compresses, loads, verifies and rebuilds a case, in a folder that goes away."""
    folder = root / f"compression-{case.seed}"
    with _folder(folder), _working_in(root):
        job = write(case, folder)
        before = soak_checks.hashes(folder)
        ended = _compress(case, folder, job)
        changed = lost(folder, before)
        result = Result(what=str(case), compressions=1, files=len(before), lost=len(changed))
        try:
            _assert_kept(changed)
            check_finished(case, folder, ended)
        except Different as error:
            return replace(result, problem=str(error))
    return result


def _compress(case: Case, folder: Path, job: Path) -> list[tuple[int, str]]:
    """Runs `lrc compress`, in this process where one is enough; returns codes and words."""
    if case.processes == 1:
        ended = pico.call("compress", job)
        return [(ended.code, ended.err)]
    return _run(case, folder, job)[0]


def check_finished(case: Case, folder: Path, ended: list[tuple[int, str]]) -> None:
    """Checks the codes, what is left in the folder, `lrc verify`, and the float64 network."""
    output = folder / "out"
    codes = {code for code, _ in ended}
    if not codes <= {0, 3} or len(codes) > 1:
        raise Different(f"lrc compress ended with {codes}: {_last_line(ended[0][1])}")
    report = json.loads((output / "report.json").read_text())
    missed = [gate["name"] for gate in report["gates"] if not gate["met"]]
    if bool(missed) is not (codes == {3}):
        raise Different(f"exit code {codes}, and the gates {missed} are missed")
    left = {path.name for path in folder.iterdir()} & {*OURS[1:4], ".lrc-work.partial"}
    if left:
        raise Different(f"{sorted(left)} is left behind")
    verify(case, folder, output)
    soak_checks.compare(case, folder, output)


def verify(case: Case, folder: Path, output: Path) -> None:
    factory = ["--factory", case.network.factory] if case.network.factory else []
    ended = pico.call("verify", output, "--against", source_of(case, folder), *factory)
    if ended.code:
        lines = [line for line in ended.out.splitlines() if "fail" in line]
        raise Different(
            f"lrc verify ended with {ended.code}: {' | '.join(lines)}{ended.err}"[:2000]
        )


def lost(folder: Path, before: dict[str, str]) -> list[str]:
    after = soak_checks.hashes(folder, OURS)
    return [name for name, digest in before.items() if after.get(name) != digest]


def _assert_kept(changed: list[str]) -> None:
    if changed:
        raise Different(f"files of the user's changed or went away: {', '.join(changed)}")


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["nothing was said"])[-1][:1000]


@contextmanager
def _folder(folder: Path) -> Iterator[None]:
    """A context with an empty folder, which goes away unless an error leaves the context."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    yield
    shutil.rmtree(folder)


@contextmanager
def _working_in(root: Path) -> Iterator[None]:
    """A context in which plain networks find their factories in the working directory."""
    before = Path.cwd()
    file = root / f"{FACTORIES}.py"
    if not file.exists():
        partial = root / f"{FACTORIES}-{os.getpid()}"
        partial.write_text(pico.FACTORY_SOURCE)
        partial.rename(file)
    os.chdir(root)
    try:
        yield
    finally:
        os.chdir(before)
        # Another part has a folder of its own, with a file of its own for these factories.
        sys.modules.pop(FACTORIES, None)


# ---------------------------------------------------------------- kills

SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
"""Half of the kills leave a process no moment to tidy up."""
ROUNDS = 20
"""So often a job is begun anew, because it was done before all of its kills came."""
LONG = ("text llama-long", "text opt", "family bart-headed", "family gpt-oss", "plain recurrent")
"""Models whose jobs take a while, so that a random moment finds them at work."""


def kills(seed: int, root: Path, number: int) -> Result:
    """Kills the job of a seed `number` times at random moments and lets it go on each time.

    The job is begun anew, without its work directory, when it is done before it is killed.
    """
    case, folder = draw(seed, list(LONG)), root / f"kills-{seed}"
    with _folder(folder), _working_in(root):
        job = write(case, folder)
        before = soak_checks.hashes(folder)
        if case.replaces:
            other = str(case.changes["runtime.seed"] + 1)
            older = ("--set", f"runtime.seed={other}", "--output", folder / "older")
            pico.call("compress", job, *older)
        _clear(folder)
        ended, seconds = _run(case, folder, job)
        result = Result(what=str(case), compressions=1, files=len(before))
        survived = 0
        try:
            check_finished(case, folder, ended)
            undisturbed = soak_checks.bits(folder / "out")
            for _ in _kill_often(case, folder, job, number, seconds):
                _assert_kept(lost(folder, before))
                _check_nothing_half(case, folder)
                survived += 1
            ended, _ = _run(case, folder, job)
            check_finished(case, folder, ended)
            _check_same(undisturbed, soak_checks.bits(folder / "out"))
        except Different as error:
            result = replace(result, lost=len(lost(folder, before)), problem=str(error))
    return replace(result, faults=survived, notes={"seconds": round(seconds, 2)})


def _kill_often(case: Case, folder: Path, job: Path, number: int, seconds: float) -> Iterator[None]:
    """Yields after each kill of the job; it is begun anew whenever it is done before a kill.

    Raises:
        Different: the job is always done before it is killed.
    """
    chance = random.Random(f"kills {case.seed}")
    for _ in range(ROUNDS):
        _clear(folder)
        while number and _kill(case, folder, job, chance, seconds):
            yield
            number -= 1
        if not number:
            return
    raise Different(f"{number} kills never came in time")


def _run(case: Case, folder: Path, job: Path) -> tuple[list[tuple[int, str]], float]:
    """Runs the job to its end; returns how its processes ended, and the seconds they worked."""
    running = _start(case, folder, job)
    began = time.monotonic()
    ended = [(process.wait(), process.err) for process in running]
    return ended, time.monotonic() - began


def _start(case: Case, folder: Path, job: Path) -> list[Running]:
    """Returns the processes of the job once `lrc` has begun in all of them."""
    shutil.rmtree(folder / "ranks", ignore_errors=True)
    (folder / "ranks").mkdir()
    command = ["compress", job, *(["--force"] if case.replaces else [])]
    if case.processes == 1:
        running = [process_helpers.start(command, folder / "ranks" / "log")]
    else:
        running = process_helpers.start_many(command, folder / "ranks", case.processes)
    while not all(process.log.exists() for process in running):
        time.sleep(0.001)
    return running


def _kill(case: Case, folder: Path, job: Path, chance: random.Random, seconds: float) -> bool:
    """Starts the job and sends a signal at a random moment; returns whether it came in time."""
    running = _start(case, folder, job)
    victim, number = chance.choice(running), chance.choice(SIGNALS)
    victim.process.join(chance.uniform(0, seconds))
    if victim.process.is_alive():
        assert victim.process.pid is not None
        os.kill(victim.process.pid, number)
    codes = [process.wait() for process in running]
    if set(codes) <= {0, 3}:
        return False
    expected = {128 + number} if case.processes == 1 else {128 + number, 1, 130, 143}
    if not set(codes) <= expected | {0, 3}:
        raise Different(f"{number.name} gave {codes}: {_last_line(victim.err)}")
    return True


def _check_nothing_half(case: Case, folder: Path) -> None:
    """What is called like a finished output is one, and an older output is whole until then."""
    there = [folder / name for name in ("out", "out.lrc-old") if (folder / name).exists()]
    if case.replaces and not there:
        raise Different("neither the older output nor the new output is there")
    if there:
        verify(case, folder, there[0])


def _check_same(undisturbed: dict[str, str], found: dict[str, str]) -> None:
    other = [key for key in undisturbed | found if found.get(key) != undisturbed.get(key)]
    if other:
        raise Different(f"after the kills other bytes are in {', '.join(sorted(other))}")


def _clear(folder: Path) -> None:
    """Brings the folder back to the moment before the job began."""
    for name in OURS[:-1]:
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "out.lrc-lock").unlink(missing_ok=True)
    if (folder / "older").exists():
        shutil.copytree(folder / "older", folder / "out")


# ---------------------------------------------------------------- memory

WARM, RUNS = 5, 20
CYCLE = ("text llama", "family t5-headed", "family gpt-oss", "plain recurrent", "media vit")
"""The models of the first five runs; the runs after them repeat these jobs."""
LARGEST_GROWTH = 0.03
"""The most that private memory may grow from the fifth run to the last, relative to the fifth.

safetensors 0.8.0 loses 64 bytes with every tensor that it reads, here some 50 kB in a run.
"""


def memory(seed: int, root: Path) -> Result:
    """Runs the same five jobs four times in this process and reads its private memory."""
    root = root / f"memory-{seed}"
    results, measured = [], []
    with _folder(root), _working_in(root):
        for run in range(RUNS):
            case = draw(seed + run % WARM, [CYCLE[run % WARM]])
            results.append(_plain_run(case, root / "job"))
            measured.append(_settled_bytes())
    warm, last = measured[WARM - 1], measured[-1]
    growth = last / warm - 1
    result = Result(
        what=f"{RUNS} runs in one process: {', '.join(CYCLE)}, again and again",
        compressions=RUNS,
        files=sum(x.files for x in results),
        lost=sum(x.lost for x in results),
        notes={"megabytes": [round(x / 1e6, 1) for x in measured], "growth": growth},
        problem=next((x.problem for x in results if x.problem), None),
    )
    if growth > LARGEST_GROWTH:
        grown = f"private memory grew from {warm / 1e6:.1f} to {last / 1e6:.1f} MB"
        return replace(result, problem=grown)
    return result


def _plain_run(case: Case, folder: Path) -> Result:
    """Compresses a case in this process, whatever its number of processes."""
    with _folder(folder):
        job = write(case, folder)
        before = soak_checks.hashes(folder)
        ended = pico.call("compress", job)
        changed = lost(folder, before)
    result = Result(what=str(case), compressions=1, files=len(before), lost=len(changed))
    if ended.code not in (0, 3):
        return replace(result, problem=f"ended with {ended.code}: {_last_line(ended.err)}")
    return result


def _settled_bytes() -> int:
    """Returns the private memory of this process once freed memory went back to the system."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return private_bytes()


def words(part: str, seed: int) -> str:
    """Returns the case of a seed in words."""
    return part if part == "memory" else str(draw(seed, list(LONG) if part == "kills" else None))
