"""A run asks this of the host: bounded caches of oneDNN, and freed memory given back."""

import ctypes
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pico
import pytest
import torch

from lrc_cli.engine import SVD
from lrc_cli.job.spectra.solve import solve_units
from lrc_cli.runtime import threads
from lrc_cli.runtime.threads import in_parallel

CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")

COMPRESS = """
import os, sys

class Watch:
    def find_spec(self, name, *rest):
        if name == "torch":
            print([os.environ.get(x) for x in sys.argv[2:]])
            sys.exit(9)

sys.meta_path.insert(0, Watch())
from lrc_cli.cli import lrc
lrc(["compress", sys.argv[1]])
"""
"""Says what the environment is when torch is about to be imported, and ends."""


@pytest.mark.parametrize("own", [{}, {CACHES[1]: "512"}, dict.fromkeys(CACHES, "7")])
def test_caches_are_bounded_before_torch_is_there_unless_the_user_did(
    own: dict[str, str], tmp_path: Path, llama_job: dict[str, Any]
) -> None:
    clean = {name: value for name, value in os.environ.items() if name not in CACHES}
    command = [sys.executable, "-c", COMPRESS, pico.job(tmp_path, llama_job), *CACHES]
    done = subprocess.run(command, env=clean | own, capture_output=True, text=True, check=False)
    assert done.returncode == 9, done.stderr
    assert done.stdout.strip() == str([own.get(name, "32") for name in CACHES])


def square(x: int) -> int:
    return x * x


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("missing", ["nothing", "library", "function"])
def test_solves_go_on_where_memory_cannot_be_trimmed(
    missing: str, num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other systems have no libc.so.6, and other libraries no malloc_trim."""
    asked = []

    def library(name: str) -> Any:
        asked.append(name)
        if missing == "library":
            raise OSError(f"{name}: cannot open shared object file")
        return object() if missing == "function" else real(name)

    real = ctypes.CDLL
    monkeypatch.setattr(ctypes, "CDLL", library)
    monkeypatch.setattr(threads, "TRIM_EVERY", 0.0)
    number = torch.get_num_threads()
    assert list(in_parallel(square, [range(3), [], [3, 4]], num_workers)) == [
        [0, 1, 4],
        [],
        [9, 16],
    ]
    assert asked == ["libc.so.6"] * 4, "before the first group, and after every one"
    assert torch.get_num_threads() == number


def test_memory_is_trimmed_at_intervals_however_short_the_calls(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sequential fitting solves one group of layers a call."""
    now, trimmed = [0.0], []
    library = SimpleNamespace(malloc_trim=lambda _: trimmed.append(now[0]))
    monkeypatch.setattr(ctypes, "CDLL", lambda _: library)
    monkeypatch.setattr(threads, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(threads, "_trimmed", -float("inf"))

    def solve(_: int) -> None:
        now[0] += 0.5

    for _ in range(12):
        list(in_parallel(solve, [[0]], 1))
    assert trimmed == [0.0, 2.0, 4.0, 6.0]


def test_what_takes_most_begins_first_and_results_keep_their_order() -> None:
    begun: list[int] = []

    def solve(number: int) -> int:
        begun.append(number)
        time.sleep(0.02 * number)
        return number

    items = [1, 3, 2, 5, 4]
    assert list(in_parallel(solve, [items], 2, cost=float)) == [items]
    assert set(begun[:2]) == {5, 4}, "the two that begin together may come in either order"


def test_a_failed_solve_ends_the_others_that_wait() -> None:
    begun: list[int] = []

    def solve(number: int) -> int:
        begun.append(number)
        time.sleep(0.05)
        raise ValueError(f"solve {number}")

    with pytest.raises(ValueError, match="solve 9"):
        list(in_parallel(solve, [[9, *range(8)]], 2, cost=float))
    assert len(begun) < 9


def test_the_next_group_is_solved_while_the_caller_stores_one() -> None:
    begun = threading.Event()

    def solve(number: int) -> int:
        if number == 2:
            begun.set()
        return number

    for group in in_parallel(solve, [[0, 1], [2, 3]], 2):
        assert begun.wait(timeout=30), "the second group waits for the caller"
        assert len(group) == 2


def test_few_groups_are_solved_ahead_of_the_caller() -> None:
    begun: list[int] = []

    def solve(number: int) -> int:
        begun.append(number)
        return number

    each = in_parallel(solve, ([number] for number in range(20)), 2)
    assert next(each) == [0]
    time.sleep(0.2)
    assert len(begun) <= 4
    each.close()
    assert len(begun) <= 4


def test_a_caller_that_stops_leaves_no_solve_behind() -> None:
    """Ctrl-C may come while a unit is stored: a begun solve ends, a waiting solve never begins."""
    threads, done = torch.get_num_threads(), list[int]()

    def solve(number: int) -> int:
        time.sleep(0.05)
        done.append(number)
        return number

    each = in_parallel(solve, [[0], [1, 2, 3, 4, 5, 6, 7]], 2)
    next(each)
    each.close()
    ended = len(done)
    assert ended < 8
    time.sleep(0.2)
    assert len(done) == ended
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("units", [["a", "b"], ["b"]])
def test_how_a_unit_is_solved_does_not_depend_on_what_is_left(units: list[str]) -> None:
    """One thread and two give an eigenproblem other bits; a resumed run must give the same bits."""
    layer: Any = SimpleNamespace(name="only", shape=(8, 8), solve_cost=1.0)
    planned = SimpleNamespace(solver=SVD)
    plan: Any = SimpleNamespace(
        units={"a": [layer], "b": [layer]}, device=torch.device("cpu"), of=lambda _: planned
    )
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = dict(solve_units(plan, units, lambda _: torch.get_num_threads()))
    finally:
        torch.set_num_threads(before)
    assert found["b"] == {"only": 1}
