"""The system counts the memory of this process and of its machine, and this module reads it."""

import ctypes
import os
import resource
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import torch


def peak_memory(device: torch.device) -> dict[str, int]:
    """The peak bytes, resident on the host (pages of mapped files included) and on the GPU."""
    peak = {"host_resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if device.type == "cuda":
        peak["gpu_allocated"] = torch.cuda.max_memory_allocated(device)
    return peak


SAMPLE_SECONDS = 0.005


CGROUPS = Path("/sys/fs/cgroup")


def private_bytes() -> int:
    """The anonymous resident memory of this process, in bytes (Linux; 0 elsewhere)."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    line = next((x for x in status.read_text().splitlines() if x.startswith("RssAnon")), "0 0 kB")
    return int(line.split()[1]) * 1024


def give_back_freed_memory() -> None:
    """Gives freed memory back to the system, which takes some 20 ms.

    glibc keeps freed memory, scattered among used memory; other allocators have no such call.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


class PrivateMemory:
    """A context in which a thread watches the peak of `private_bytes`."""

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
        """The peak bytes allocated on the GPU; 0 without a GPU."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0


def available_bytes() -> int:
    """The bytes that this process may take altogether, including its present memory.

    Both the machine's memory and the process's control groups limit this number.
    """
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():  # no Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    lines = meminfo.read_text().splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    own = Path("/proc/self/cgroup")
    groups = own.read_text().splitlines() if own.exists() else []
    return min([private_bytes() + found["MemAvailable"], *group_limits(groups, CGROUPS)])


def total_memory(device: torch.device) -> int:
    """The bytes of a device's memory, whatever else runs there: a GPU's, or the machine's.

    The limits of the process's control groups count as the machine's.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    own = Path("/proc/self/cgroup")
    groups = own.read_text().splitlines() if own.exists() else []
    return min([whole, *group_limits(groups, CGROUPS)])


def group_limits(groups: Sequence[str], root: Path) -> Iterator[int]:
    """The limits in bytes of a process's control groups and of the groups above them.

    Args:
        groups: the lines of /proc/self/cgroup: "0::/a/b", or "4:memory:/a/b" in version 1.
        root: the directory where control groups are mounted; in version 1 the groups of memory
            are mounted in `memory` below it.
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
