"""Instruments of the probe: time by step, time and size of files, private memory."""

import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from lrc_cli.job.work import Tensors, WorkDirectory

SAMPLE_SECONDS = 0.005
CGROUPS = Path("/sys/fs/cgroup")
NUM_BATCHES = 3
"""Micro-batches that a probe runs; the first one warms up."""


class Clock:
    """Times the steps of a loop: one `tick` after each."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.steps = device, list[float]()
        self.last = self.now()

    def now(self) -> float:
        """Seconds, with everything done that was asked of the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def restart(self) -> None:
        """What was done since the last step belongs to no step."""
        self.last = self.now()

    def tick(self, cost: float = 0.0) -> None:
        """A step is done."""
        now = self.now()
        self.steps.append(now - self.last)
        self.last = now


def typical(steps: Sequence[float]) -> float:
    """The mean of equal steps, less the first one, which warms up, where there are more."""
    later = steps[1:] or steps
    return sum(later) / len(later)


class TimedWork(WorkDirectory):
    """A work directory that remembers how long it took to write how much, by kind of stage."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, {})
        self.seconds: dict[str, float] = {}
        self.num_bytes: dict[str, int] = {}
        self.places: dict[str, set[str]] = {}
        """What was written of a kind of stage: the segments, of what passes between them."""

    def put(self, stage: str, unit: str, tensors: Tensors, facts: Mapping[str, Any]) -> None:
        began = time.perf_counter()
        super().put(stage, unit, tensors, facts)
        stage, _, place = stage.partition("/")
        self.places.setdefault(stage, set()).add(place)
        written = sum(tensor.nbytes for tensor in tensors.values())
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - began
        self.num_bytes[stage] = self.num_bytes.get(stage, 0) + written


def private_bytes() -> int:
    """Anonymous resident memory of this process, in bytes (Linux; 0 elsewhere)."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    line = next((x for x in status.read_text().splitlines() if x.startswith("RssAnon")), "0 0 kB")
    return int(line.split()[1]) * 1024


class PrivateMemory:
    """Within it, the peak of `private_bytes` is watched by a thread."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.peak, self._ended = device, private_bytes(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._ended.wait(SAMPLE_SECONDS):
            self.peak = max(self.peak, private_bytes())

    def __enter__(self) -> "PrivateMemory":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()
        self.peak = max(self.peak, private_bytes())

    @property
    def gpu(self) -> int:
        """Peak bytes allocated on the GPU; 0 without one."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0


def available_bytes() -> int:
    """What this process may take altogether, what it has now included: of the machine's memory and
    its control group's."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():  # no Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    lines = meminfo.read_text().splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    own = Path("/proc/self/cgroup")
    groups = own.read_text().splitlines() if own.exists() else []
    return min([private_bytes() + found["MemAvailable"], *group_limits(groups, CGROUPS)])


def group_limits(groups: Sequence[str], root: Path) -> Iterator[int]:
    """Bytes that a process's control groups allow it, and those that they lie in.

    Args:
        groups: the lines of /proc/self/cgroup: "0::/a/b", or "4:memory:/a/b" in version 1.
        root: where control groups are mounted; of version 1 those of memory in `memory`.
    """
    for line in groups:
        _, kinds, path = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        base, name = (root / "memory", "memory.limit_in_bytes") if kinds else (root, "memory.max")
        place = base / path.strip("/")
        for folder in (place, *place.parents):
            file = folder / name
            if folder.is_relative_to(base) and file.is_file():
                limit = file.read_text().strip()
                if limit != "max":
                    yield int(limit)
