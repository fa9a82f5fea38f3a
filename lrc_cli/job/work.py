"""The work directory keeps one atomic file for each finished unit: nothing is computed twice.

    <root>/fingerprint.json            what the statistics depend on
    <root>/inputs, gradients, parts    while statistics are collected, see sweep.py and collect.py
    <root>/run.log                     the messages of all runs, with the time
    <root>/run.<rank>.log              the failures of one of several processes, with the trace
    <root>/statistics/<unit>           Gram matrices, float32 triangles after Jacobi scaling; means
    <root>/spectra/<unit>              what does not depend on a layer's rank: eigenvalues,
                                       eigenvectors in float32, the errors that reports compare
    <root>/measured/<storage>-<dtype>/<unit>  the errors of a form that no spectrum tells
    <root>/factors/<fingerprint>/<unit>  packed factors and their measured errors
    <root>/recovered/<fingerprint>/<unit>  the same after training; and an unfinished training

A killed run leaves whole files or none, and the same command goes on with the files. A unit's facts
and each tensor have a checksum, which is compared whenever they are read. Two fingerprints decide
what may be used again: *statistics* names the directory, *factors* a folder inside it.
"""

import json
import os
import zlib
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lrc_cli.errors import InputError, RunError
from lrc_cli.reading import read_json
from lrc_cli.runtime.files import canonical_json, sync_directory, tensor_bytes, write_json
from lrc_cli.runtime.lock import lock_file
from lrc_cli.runtime.places import replacing
from lrc_cli.runtime.processes import ALONE, LostProcess, Processes
from lrc_cli.runtime.progress import Progress, failure_logged

Tensors = dict[str, torch.Tensor]
WHOLE, UNIT, SUFFIX, PARTIAL = "network", "unit", ".safetensors", ".partial"
STATISTICS, SPECTRA, MEASURED = "statistics", "spectra", "measured"
PASSING = INPUTS, GRADIENTS, PARTS = "inputs", "gradients", "parts"
"""Stages on the way to the statistics (sweep.py, collect.py), deleted as soon as they are used."""
SHARED = STATISTICS, SPECTRA, MEASURED
"""The stages that every size uses again."""
MOST_WAITING = 2
"""The most units that may wait to be stored in the background, because they take memory."""
PACKED_ROWS = 256
"""Rows of a Gram matrix that are scaled at once when the matrix is packed."""
RECOVERED = "recovered"
"""The stage that holds trained factors."""
LOG, FAILURES = "run.log", "run.{rank}.log"
"""The file with the messages of all runs in the directory, and the files with the failures of
processes other than the first one."""
FINGERPRINT, LOCK, FACTORS = "fingerprint.json", "lock", "factors"
"""The other names in the directory."""


class DamagedUnit(RunError):
    """A unit's file does not hold what was stored.

    Args:
        file: the unit's file.
        why: what is wrong with the file.
    """

    def __init__(self, file: Path, why: object) -> None:
        self.what = f"{file}: damaged ({why})"
        super().__init__(
            self.what,
            "the next `lrc compress` computes it again, and with --restart computes everything"
            " again",
        )


class WorkDirectory:
    """The finished units of one run, by stage ("statistics", "spectra", "factors/<fingerprint>").

    A work directory is a context manager, which holds a lock: two runs never share a directory.
    Entering raises RunError where another run holds the lock or fingerprint.json is damaged, and
    InputError, with the field, where the directory belongs to a run with another fingerprint.

    Args:
        root: the path, which is created when missing.
        fingerprint: named fields that the statistics depend on.
        processes: the processes that share the directory. The first one holds the lock for all.
        check_inputs: called at the start of every stage and before a unit is stored. An exception
            keeps the unit out.
    """

    def __init__(
        self,
        root: Path,
        fingerprint: Mapping[str, Any],
        processes: Processes = ALONE,
        *,
        check_inputs: Callable[[], None] = lambda: None,
    ) -> None:
        self.root, self.processes, self.check_inputs = root, processes, check_inputs
        self._trusted: set[Path] = set()
        """The files of units that this run has stored, or has found whole."""
        self.fingerprint: dict[str, Any] = json.loads(canonical_json(fingerprint))
        self._lock: BinaryIO | None = None

    def __enter__(self) -> "WorkDirectory":
        self.processes.from_first(self._open)
        if not self._fingerprint_file.exists():
            raise RunError(
                f"{self.root}: not the directory that the first process sees there",
                "set runtime.work_dir to one that all machines share",
            )
        return self

    def _open(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        self._lock = lock_file(self.root / LOCK)
        if self._lock is None:
            raise RunError(f"{self.root}: another lrc run is using it", "wait for it to end")
        try:
            self._check_fingerprint()
        except BaseException:
            self._lock.close()
            raise

    @property
    def _fingerprint_file(self) -> Path:
        return self.root / FINGERPRINT

    def _check_fingerprint(self) -> None:
        file = self._fingerprint_file
        if not file.exists():
            with replacing(file) as aside:
                write_json(aside, self.fingerprint)
            sync_directory(self.root)
            return
        try:
            found = read_json(file)
        except InputError as error:
            raise RunError(f"{file}: damaged ({error.message})", f"delete {self.root}") from error
        for name, value in self.fingerprint.items():
            if found.get(name) != value:
                raise InputError(
                    f"{self.root}: the work directory was made with another {name}",
                    "set runtime.work_dir to another directory or to null, or delete this one",
                )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._lock is not None:
            self._lock.close()

    @contextmanager
    def logged(self, progress: Progress) -> Iterator[None]:
        """A context in which the first process logs everything, and each other one its failure.

        If another process fails, the first one says where the trace is.
        """
        if not self.processes.is_first:
            with failure_logged(self.root / FAILURES.format(rank=self.processes.rank)):
                yield
            return
        with progress.logged(self.root / LOG):
            try:
                yield
            except LostProcess as error:
                file = self.root / FAILURES.format(rank=error.first)
                where = f"; the trace is in {file}" if file.exists() else ""
                progress.note(f"{error.message}{where}")
                raise

    def _file(self, stage: str, unit: str) -> Path:
        return self.root / stage / f"{unit or WHOLE}{SUFFIX}"

    def _name(self, file: Path) -> str:
        return file.relative_to(self.root).as_posix()

    def has(self, stage: str, unit: str) -> bool:
        """Returns whether the unit has a file. Only `drop_damaged` looks into the file."""
        return self._file(stage, unit).exists()

    def missing(self, stage: str, units: Iterable[str]) -> list[str]:
        """Returns the units that have no file yet, on which all processes agree."""
        return self.processes.from_first(lambda: [x for x in units if not self.has(stage, x)])

    def put(self, stage: str, unit: str, tensors: Tensors, facts: Mapping[str, Any]) -> None:
        """Stores a finished unit: the file is written aside, flushed, then renamed.

        Raises:
            RunError: the disk is full, the file cannot be written for another reason, or
                `check_inputs` keeps the unit out.
        """
        self.check_inputs()
        file = self._file(stage, unit)
        file.parent.mkdir(parents=True, exist_ok=True)
        aside = file.with_suffix(PARTIAL)
        data = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        try:
            save_file(data, aside, metadata=_metadata(self._name(file), data, facts))
        except SafetensorError as error:
            raise RunError(
                f"{file}: cannot be written ({error})",
                "make room on the disk; the same command goes on where it stopped",
            ) from error
        with aside.open("rb") as handle:
            os.fsync(handle.fileno())
        aside.rename(file)
        sync_directory(file.parent)
        self._trusted.add(file)

    def facts(self, stage: str, unit: str) -> dict[str, Any]:
        """Returns a unit's facts alone. Raises as `get` does."""
        return self.get(stage, unit, ())[1]

    def get(
        self, stage: str, unit: str, wanted: Collection[str] | None = None
    ) -> tuple[Tensors, dict[str, Any]]:
        """Returns a unit's tensors, as views of the mapped file, and its facts.

        Only the wanted tensors are read from the disk and compared with their checksums.

        Args:
            wanted: names of tensors, of which the unit may lack some; None: all its tensors.

        Raises:
            DamagedUnit: the file does not hold what was stored, or is gone.
        """
        file = self._file(stage, unit)
        try:
            with safe_open(file, framework="pt") as handle:
                facts, checksums = _read_metadata(self._name(file), handle.metadata() or {})
                _check_names(handle.keys(), checksums)
                names = set(checksums) if wanted is None else set(checksums) & set(wanted)
                tensors = {name: handle.get_tensor(name) for name in names}
        except (SafetensorError, FileNotFoundError, _Mismatch) as error:
            raise DamagedUnit(file, error) from error
        for name, tensor in tensors.items():
            if checksums[name] != _checksum(name, tensor):
                raise DamagedUnit(file, f"tensor {name} is not what was stored")
        return tensors, facts

    def names(self, stage: str, unit: str) -> list[str]:
        """Returns the names of a unit's tensors. Raises as `get` does."""
        file = self._file(stage, unit)
        try:
            with safe_open(file, framework="pt") as handle:
                return list(handle.keys())
        except (SafetensorError, FileNotFoundError) as error:
            raise DamagedUnit(file, error) from error

    def damaged(self, stage: str, unit: str, why: object) -> DamagedUnit:
        """Returns the error for a unit that does not hold what its stage stores."""
        return DamagedUnit(self._file(stage, unit), why)

    def drop_damaged(
        self,
        stage: str,
        units: Iterable[str] | None = None,
        check: Callable[[str, str], object] | None = None,
    ) -> list[str]:
        """Deletes units that do not hold what was stored. All processes call this.

        A unit that this run has stored, or has looked at before, is not looked at.

        Args:
            units: the units of the stage to look at; None: all units in the stage and in stages
                whose names begin with its name and a slash.
            check: called with the stage and the name of every whole unit; may raise DamagedUnit.

        Returns:
            A sentence about every deleted unit, without a full stop.
        """
        return self.processes.from_first(lambda: self._drop_damaged(stage, units, check))

    def _drop_damaged(
        self,
        stage: str,
        units: Iterable[str] | None,
        check: Callable[[str, str], object] | None,
    ) -> list[str]:
        places = self._stored(stage) if units is None else [(stage, unit) for unit in units]
        found = []
        for place, unit in places:
            file = self._file(place, unit)
            if file in self._trusted or not file.exists():
                continue
            try:
                self.get(place, unit)
                if check is not None:
                    check(place, unit)
            except DamagedUnit as error:
                file.unlink()
                found.append(f"{error.what}; it is computed again")
            else:
                self._trusted.add(file)
        return found

    def _stored(self, stage: str) -> list[tuple[str, str]]:
        """Returns the units below a stage's folder: the stage and the name of each."""
        return [
            (file.parent.relative_to(self.root).as_posix(), file.name.removesuffix(SUFFIX))
            for file in sorted((self.root / stage).rglob(f"*{SUFFIX}"))
        ]

    def distrust(self) -> None:
        """Lets `drop_damaged` look at every unit again."""
        self._trusted.clear()

    def remove(self, stage: str, unit: str) -> None:
        """Deletes a unit's file if there is one."""
        self._file(stage, unit).unlink(missing_ok=True)

    def drop(self, stages: Iterable[str]) -> None:
        """Deletes the units of stages, once no process uses them any more; other files stay."""
        self.processes.wait()
        self.processes.from_first(lambda: self._drop(stages))

    def _drop(self, stages: Iterable[str]) -> None:
        for stage in stages:
            _drop_units(self.root / stage)


def _drop_units(stage: Path) -> None:
    """Deletes the files of a stage's units, and the folders that are empty then."""
    if not stage.exists():
        return
    below = sorted(stage.rglob("*"), reverse=True)
    for path in below:
        if path.suffix in (SUFFIX, PARTIAL) and not path.is_dir():
            path.unlink()
    for folder in (*(path for path in below if path.is_dir() and not path.is_symlink()), stage):
        with suppress(OSError):  # it holds something that lrc did not make
            folder.rmdir()


class _Mismatch(Exception):
    """What a file says of itself is not what was stored."""


def _checksum(name: str, tensor: torch.Tensor) -> int:
    """Returns the CRC-32 of a tensor's name, dtype, shape and bytes, at about 2 GB a second."""
    kind = f"{name}:{tensor.dtype}:{tuple(tensor.shape)};"
    return zlib.crc32(tensor_bytes(tensor), zlib.crc32(kind.encode()))


def _metadata(name: str, tensors: Tensors, facts: Mapping[str, Any]) -> dict[str, str]:
    """Returns what a file holds beside tensors: the facts, and checksums of everything.

    One key holds it all, because safetensors writes several keys in any order.

    Args:
        name: the name of the unit's file in the work directory.
    """
    checksums = {key: _checksum(key, tensor) for key, tensor in tensors.items()}
    text = canonical_json({"name": name, "facts": facts, "checksums": checksums})
    return {UNIT: f"{zlib.crc32(text.encode())} {text}"}


def _read_metadata(name: str, metadata: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, int]]:
    """Returns a unit's facts, and the checksum of each tensor by name. Raises _Mismatch."""
    checksum, _, text = metadata.get(UNIT, "").partition(" ")
    if checksum != str(zlib.crc32(text.encode())):
        raise _Mismatch("its facts are not what was stored")
    unit = json.loads(text)
    if unit["name"] != name:
        raise _Mismatch(f"it is the file {unit['name']}")
    return unit["facts"], unit["checksums"]


def _check_names(names: Iterable[str], checksums: Mapping[str, int]) -> None:
    if set(names) != set(checksums):
        raise _Mismatch("its tensors do not have the names that were stored")


class Background:
    """A thread that stores units in a work directory while the caller goes on.

    The object is a context manager. An error is raised by the next call.
    """

    def __init__(self, work: WorkDirectory) -> None:
        self.work = work
        self._thread = ThreadPoolExecutor(1)
        self._waiting: deque[Future[None]] = deque()

    def __enter__(self) -> "Background":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._thread.shutdown(cancel_futures=True)

    def put(self, stage: str, unit: str, tensors: Tensors, facts: Mapping[str, Any]) -> None:
        """Stores a unit soon, as WorkDirectory.put does. The tensors must not change until then."""
        while len(self._waiting) >= MOST_WAITING:
            self._waiting.popleft().result()
        self._waiting.append(self._thread.submit(self.work.put, stage, unit, tensors, facts))

    def flush(self) -> None:
        """Waits until everything is stored."""
        while self._waiting:
            self._waiting.popleft().result()


def compress_gram(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Packs a Gram matrix into its scaled lower triangle in float32, and the scale.

    Jacobi scaling (unit diagonal) bounds the rounding error of entry (i, j) by
    2^-24 sqrt(G_ii G_jj), so outlier channels do not drown the others.

    Args:
        gram: (n, n) float64, of which only the lower triangle is read.

    Returns:
        triangle (n (n + 1) / 2,) float32 and scale (n,) float64, the square root of the diagonal.
    """
    scale = gram.diagonal().clamp(min=0).sqrt()
    safe = torch.where(scale > 0, scale, 1.0)
    n = len(gram)
    triangle = torch.empty(n * (n + 1) // 2, dtype=torch.float32, device=gram.device)
    left, right = _halves(triangle, n)
    half = left.shape[1]
    # A few rows at a time: a scaled copy would be as large as the matrix.
    for rows in torch.arange(n, device=gram.device).split(PACKED_ROWS):
        first, last = int(rows[0]), int(rows[-1]) + 1
        left[first:last] = gram[first:last, :half] / safe[first:last, None] / safe[:half]
    lower = gram[half:, half:].tril().div_(safe[half:, None]).div_(safe[half:])
    right.tril_(-1).add_(lower.T)
    return triangle, scale


def expand_gram(triangle: torch.Tensor, scale: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Undoes `compress_gram` and returns the matrix (n, n), float64 on `device`."""
    n = len(scale)
    left, right = _halves(triangle.to(device), n)
    half = left.shape[1]
    gram = torch.empty(n, n, dtype=torch.float64, device=device)
    gram[:, :half] = left
    gram[:half, half:] = left[half:].T
    for corner, lower in ((gram[:half, :half], left[:half]), (gram[half:, half:], right.T)):
        corner.copy_(lower.tril())
        corner += lower.tril(-1).T.contiguous()
    scale = scale.to(device)
    return gram.mul_(scale[:, None]).mul_(scale)


def _halves(triangle: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns two views of a triangle in rectangular full packed format (Gustavson et al. 2010).

    The format keeps the left ceil(n / 2) columns. The triangle of the right columns is turned over
    and fills the room above the diagonal of the left columns.

    Returns:
        (n, ceil(n / 2)), in which the entries on and below the diagonal count; and the square of
        the right half, in which the entries on and above the diagonal count. The views overlap.
    """
    odd = n % 2
    rectangle = triangle.view(-1, (n + 1) // 2)
    return rectangle[1 - odd :], rectangle[: n // 2, odd : odd + n // 2]
