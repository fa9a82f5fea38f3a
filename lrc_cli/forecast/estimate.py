"""What a job will take, from what was measured of it: arithmetic only, see probe.py."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lrc_cli.errors import InputError
from lrc_cli.text import byte_size


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Work of one phase: measured once, done `times` times."""

    phase: str
    seconds: float
    times: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Private memory (anonymous pages, mapped files left out) of one phase at its peak, in bytes.

    On a GPU, its memory is estimated too.
    """

    phase: str
    measured: int
    """The peak of the probe, the process included."""
    kept: int = 0
    """What more sequences add: activations and gradients between two blocks."""
    gpu: int = 0
    """Measured on the GPU; 0 where none is used."""

    @property
    def total(self) -> int:
        return self.measured + self.kept


@dataclass(frozen=True, kw_only=True)
class Space:
    """What is written to one place, in bytes."""

    key: str
    """The config's key for the place."""
    path: Path
    needed: int
    """Beyond what is there already; at the peak."""
    passing: int = 0
    """The part of it that is deleted again: what the calibration sequences write."""
    free: int
    device: int
    """The number of the file system: places on one file system share its free space."""


def seconds_by_phase(pieces: Iterable[Piece]) -> dict[str, float]:
    """Wall time of every phase, in the order in which they first appear."""
    found: dict[str, float] = {}
    for piece in pieces:
        found[piece.phase] = found.get(piece.phase, 0.0) + piece.seconds * piece.times
    return found


def peak_of(phases: Iterable[Memory]) -> Memory:
    """The phase that takes most."""
    return max(phases, key=lambda memory: memory.total)


def check_memory(peak: Memory, available: int) -> None:
    """Raise InputError, naming the lever, if the peak is more than can be had.

    Args:
        available: bytes that the process may take altogether, what it has now included.
    """
    if peak.total <= available:
        return
    if peak.measured <= available:
        left = byte_size(available - peak.measured)
        remedy = f"set runtime.memory_limit to {left} or less, or give fewer or shorter sequences"
    elif peak.phase == "statistics":
        remedy = "give shorter sequences, exclude the widest layers, or use more memory"
    else:
        remedy = "exclude the widest layers, or use a machine with more memory"
    raise InputError(
        f"{peak.phase} would take {byte_size(peak.total)} of memory, and {byte_size(available)}"
        " can be had",
        remedy,
    )


def check_disk(spaces: Iterable[Space]) -> None:
    """Raise InputError, naming the lever, if a file system has too little room."""
    by_device: dict[int, list[Space]] = {}
    for space in spaces:
        by_device.setdefault(space.device, []).append(space)
    for places in by_device.values():
        # Outputs are written when what passes is gone.
        lasting = sum(place.needed - place.passing for place in places)
        needed, free = max(lasting, *(place.needed for place in places)), places[0].free
        if needed <= free:
            continue
        largest = max(places, key=lambda place: place.needed)
        remedy = f"make room, or set {largest.key} to a path on another disk"
        if lasting <= free:
            remedy += ", or give fewer or shorter sequences"
        raise InputError(
            f"{largest.path}: {byte_size(needed)} would be written to its disk, and"
            f" {byte_size(free)} are free",
            remedy,
        )
