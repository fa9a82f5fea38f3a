"""Measurements of the probe are multiplied into what a job will take: arithmetic only."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lrc_cli.errors import InputError
from lrc_cli.text import byte_size


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A piece of work of one phase, which is measured once and done `times` times."""

    phase: str
    seconds: float
    times: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Memory:
    """The private memory of one phase at its peak, in bytes: anonymous pages, no mapped files."""

    phase: str
    measured: int
    """The peak of the probe, the process included."""
    kept: int = 0
    """The activations and gradients between two blocks that more sequences add."""
    gpu: int = 0
    """The peak that was measured on the GPU; 0 without a GPU."""

    @property
    def total(self) -> int:
        return self.measured + self.kept


@dataclass(frozen=True, kw_only=True)
class Space:
    """The disk space that a job takes in one place, in bytes."""

    key: str
    """The config's key for the place."""
    path: Path
    needed: int
    """The bytes beyond what is there already, at the peak."""
    passing: int = 0
    """The part of `needed` that is deleted again: what the calibration sequences write."""
    free: int
    device: int
    """The number of the file system. Places on one file system share its free space."""


def seconds_by_phase(pieces: Iterable[Piece]) -> dict[str, float]:
    """Returns the wall time of every phase, in the order in which phases first appear."""
    found: dict[str, float] = {}
    for piece in pieces:
        found[piece.phase] = found.get(piece.phase, 0.0) + piece.seconds * piece.times
    return found


def peak_of(phases: Iterable[Memory]) -> Memory:
    """Returns the memory of the phase that takes most."""
    return max(phases, key=lambda memory: memory.total)


def check_memory(peak: Memory, available: int) -> None:
    """Raises InputError, with what to change, if the peak is more than the available memory.

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
    """Raises InputError, with what to change, if a file system has too little room."""
    by_device: dict[int, list[Space]] = {}
    for space in spaces:
        by_device.setdefault(space.device, []).append(space)
    for places in by_device.values():
        # Outputs are written once passing files are gone.
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
