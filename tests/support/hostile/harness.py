"""A hostile input is a case: how a job is spoiled, what is run, and how the command must end.

Every case starts from a copy of a directory that nothing is wrong with. The copy is hashed after it
was spoiled and once more after the command.
"""

import contextlib
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import pico
import torch
from command_helpers import seen

Spoil = Callable[[Path], None]
"""Changes the directory of a job."""

COMPRESS = ("compress", "job.yaml", "-q")
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
"""Characters that a terminal or a log must not be sent, in whatever a stranger wrote."""
LONGEST_LINE = 2100
LONGEST = 6000
MARK = "ran"
"""The file that a stranger's code makes in the cases in which it must not run."""


def nothing(_: Path) -> None:
    """Leaves the directory as it is."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One hostile input."""

    name: str
    """What is wrong, as the test's id."""
    said: tuple[str, ...]
    """What the message must hold: the culprit first."""
    spoil: Spoil = nothing
    """What makes the directory hostile."""
    command: tuple[str, ...] = COMPRESS
    """The arguments of `lrc`, run in the directory."""
    code: int = 2
    """The exit code."""
    is_done: bool = False
    """Whether the directory has a finished output and its work directory from the start."""
    made: frozenset[str] = frozenset()
    """The names that the command may add to the directory, or change there."""
    environment: Mapping[str, str | None] = field(default_factory=dict)
    """Variables to set; None: a variable to remove."""

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Pristine:
    """Directories that nothing is wrong with, from which cases start."""

    root: Path

    @cached_property
    def job(self) -> Path:
        """A checkpoint, a text and a config."""
        path = self.root / "job"
        pico.write_model(path / "model", "llama")
        (path / "text.txt").write_text(pico.words(2000))
        write_job(path)
        return path

    @cached_property
    def done(self) -> Path:
        """The same, with a finished output and its work directory."""
        path = self.root / "done"
        shutil.copytree(self.job, path)
        with contextlib.chdir(path):
            ended = pico.call(*COMPRESS)
        assert ended.code == 0, ended.err
        return path


def write_job(path: Path, **changes: object) -> None:
    """Writes `job.yaml` with changes by dotted key, in which two underscores stand for a dot."""
    given = {key.replace("__", "."): value for key, value in changes.items()}
    with contextlib.chdir(path):
        pico.job(
            Path(),
            {
                "model.path": "model",
                "calibration.path": "text.txt",
                "output.path": "out",
                "compression.method": "svd",
                "evaluation": [],
                **given,
            },
        )


@contextlib.contextmanager
def untouched_process(directory: Path, environment: Mapping[str, str | None]) -> Iterator[None]:
    """Everything in this process that a stranger's code may change is put back at the end."""
    variables, path, modules = dict(os.environ), list(sys.path), set(sys.modules)
    dtype, threads, mask = torch.get_default_dtype(), torch.get_num_threads(), os.umask(0o22)
    os.umask(mask)
    for name, value in environment.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    try:
        with contextlib.chdir(directory):
            yield
    finally:
        os.environ.clear()
        os.environ.update(variables)
        sys.path[:] = path
        for name in set(sys.modules) - modules:
            if str(directory) in str(getattr(sys.modules[name], "__file__", "")):
                del sys.modules[name]
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)
        torch.set_grad_enabled(True)
        os.umask(mask)


def try_case(case: Case, pristine: Pristine, directory: Path) -> None:
    """Runs a case in a directory that does not exist yet, and checks all that a case promises."""
    shutil.copytree(pristine.done if case.is_done else pristine.job, directory)
    case.spoil(directory)
    before = seen(directory)
    with untouched_process(directory, case.environment):
        ended = pico.call(*case.command)
    check_words(case, ended)
    check_files(case, before, seen(directory))


def check_words(case: Case, ended: pico.Ended) -> None:
    """The exit code is right, and the message is short, plain and names the culprit."""
    shown = f"exit code {ended.code}\n{ended.err[:4000]}\n{ended.out[:4000]}"
    assert ended.code == case.code, shown
    both = ended.out + ended.err
    assert "Traceback" not in both, shown
    assert not CONTROL.search(both), repr(CONTROL.findall(both)[:5]) + shown
    both.encode()  # a terminal cannot be sent what is no text
    for piece in case.said:
        assert piece in both, f"{piece!r} is not in:\n{shown}"
    if case.code in (1, 2):
        assert ended.out == "", shown
        assert re.match(r"error: |Usage: |Error: ", ended.err), shown
        assert len(ended.err) < LONGEST, f"{len(ended.err)} characters\n{shown}"
        assert max(map(len, ended.err.splitlines())) < LONGEST_LINE, shown


def check_files(case: Case, before: Mapping[str, object], after: Mapping[str, object]) -> None:
    """Inputs are as they were, and only what the exit code allows was added."""
    allowed = {0: {"out", ".lrc-work"}, 1: {".lrc-work"}}.get(case.code, set()) | case.made
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    strays = {name for name in changed if name.split("/")[0] not in allowed}
    assert not strays, f"changed or added: {sorted(strays)[:10]}"
    finished = {name for name in changed if name.endswith("manifest.json")}
    assert case.code in (0, 3, 4) or not finished, f"published: {finished}"
