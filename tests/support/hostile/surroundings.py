"""Hostile surroundings: streams, limits, permissions, encodings, clocks and signals of a process.

A case runs `lrc` in a process of its own, which is forked after the libraries were imported.
"""

import contextlib
import ctypes
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import process_helpers
import torch

from hostile.checkpoints import both, write
from hostile.data import job
from hostile.harness import COMPRESS, Spoil, nothing
from lrc_cli.cli import main
from lrc_cli.runtime.files import hash_file

Enter = Callable[[], None]
LONG = "n" * 240
ACCENTS = "caf\u00e9 \u6f22"


def stay() -> None:
    """Changes nothing of the process."""


@dataclass(frozen=True, kw_only=True)
class Surrounding:
    """One hostile surrounding of a command."""

    name: str
    """What is odd, as the test's id."""
    enter: Enter = stay
    """What the process does before the command begins, in the room."""
    spoil: Spoil = nothing
    """What is changed in the room."""
    command: tuple[str, ...] = COMPRESS
    """The arguments of `lrc`, run in the room."""
    code: int = 0
    """The exit code."""
    said: tuple[str, ...] = ()
    """What standard error must hold."""
    output: str = "out"
    """The output's name in the room, for exit code 0."""
    environment: Mapping[str, str | None] = field(default_factory=dict)
    """Variables to set; None: a variable to remove."""
    is_done: bool = False
    """Whether the room has a finished output from the start."""

    def __str__(self) -> str:
        return self.name


def all_of(*enters: Enter) -> Enter:
    """Several things are odd."""

    def enter() -> None:
        for each in enters:
            each()

    return enter


def limit(what: int, most: int) -> Enter:
    """The system gives no more than this of something."""

    def enter() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python does when it starts
        resource.setrlimit(what, (most, most))

    return enter


def less_memory(more: int) -> Enter:
    """The process may map no more than this beyond what it has mapped."""

    def enter() -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit(resource.RLIMIT_AS, pages * resource.getpagesize() + more)()

    return enter


def without(*descriptors: int) -> Enter:
    """The process starts without some of its three streams."""

    def enter() -> None:
        streams = ("stdin", "stdout", "stderr")
        for descriptor in descriptors:
            os.close(descriptor)
            setattr(sys, streams[descriptor], None)

    return enter


def powerless() -> None:
    """Root is refused what others are refused."""
    version, nothing_at_all = 0x20080522, (ctypes.c_uint32 * 6)()
    header = (ctypes.c_uint32 * 2)(version, 0)
    assert ctypes.CDLL(None, use_errno=True).capset(header, nothing_at_all) == 0


def masked(bits: int) -> Enter:
    """New files and folders lack these permissions."""

    def enter() -> None:
        os.umask(bits)

    return enter


def encoded(encoding: str) -> Enter:
    """The streams take other characters."""

    def enter() -> None:
        for number, name in ((1, "stdout"), (2, "stderr")):
            setattr(sys, name, open(number, "w", encoding=encoding, closefd=False))  # noqa: SIM115

    return enter


def unmade_directory() -> None:
    """The working directory is deleted, and the process stays in it."""
    os.mkdir("gone")
    os.chdir("gone")
    os.rmdir("../gone")


def inner(mode: int) -> Enter:
    """The working directory is a folder of this mode in the room."""

    def enter() -> None:
        os.mkdir("inner")
        os.chdir("inner")
        os.chmod(".", mode)

    return enter


def mode(name: str, bits: int) -> Spoil:
    """A file or a folder of the room has this mode."""
    return lambda room: (room / name).chmod(bits)


def folder(name: str, bits: int) -> Spoil:
    """The room has a folder of this mode."""

    def spoil(room: Path) -> None:
        (room / name).mkdir()
        (room / name).chmod(bits)

    return spoil


def absolute(room: Path) -> None:
    """The config names all places by their whole paths."""
    places = {"model__path": "model", "calibration__path": "text.txt", "output__path": "out"}
    job(**{key: str(room / name) for key, name in places.items()})(room)


def called(name: str) -> Spoil:
    """The checkpoint, the data and the output have this name, and the config says so."""

    def spoil(room: Path) -> None:
        (room / "models").mkdir()
        (room / "model").rename(room / "models" / name)
        (room / "text.txt").rename(room / f"{name}.txt")
        places = {"model__path": f"models/{name}", "calibration__path": f"{name}.txt"}
        job(**places, output__path=name)(room)

    return spoil


def dated(seconds: float) -> Spoil:
    """All inputs were changed so many seconds from now."""

    def spoil(room: Path) -> None:
        for path in (*room.rglob("*"), room):
            os.utime(path, (time.time() + seconds, time.time() + seconds))

    return spoil


# ---------------------------------------------------------------- the table

DESCRIPTORS: Sequence[tuple[int, ...]] = (*((0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)),)


def streams() -> Iterator[Surrounding]:
    """A case for each choice of streams that are closed."""
    for closed in DESCRIPTORS:
        said = () if 2 in closed or 1 not in closed else ("it is closed; the output is ",)
        words = " and ".join(map(str, closed))
        yield Surrounding(name=f"without streams {words}", enter=without(*closed), said=said)
        yield Surrounding(
            name=f"verify without streams {words}",
            enter=without(*closed),
            command=("verify", "out"),
            code=int(1 in closed),
            is_done=True,
        )


NAMES = {
    "with spaces": "a b  c",
    "with a line end": "a\nb",
    "with a dash first": "-o",
    "with two dashes": "--force",
    "with quotes": "a'b\"c",
    "with a dollar": "$HOME",
    "with a star": "*",
    "with a colon": "a:b",
    "with a hash": "#a",
    "with a percent": "%s%n",
    "with braces": "{x}",
    "with a backslash": "a\\b",
    "with a tilde": "~",
    "of 240 characters": LONG,
    "of composed letters": "\u00f6ut",
    "of decomposed letters": "o\u0308ut",
    "of wide letters": "\uff0e\uff0e",
    "of emoji": "\U0001f600",
    "from right to left": "\u202etxt.tuo",
}


def names() -> Iterator[Surrounding]:
    """A case for each odd name, which output, checkpoint and data have."""
    for words, name in NAMES.items():
        yield Surrounding(name=f"names {words}", spoil=called(name), output=name)
    yield Surrounding(
        name="an output of 250 characters",
        spoil=job(output__path="n" * 250),
        code=2,
        said=("File name too long",),
    )


TEN_KB = 10_000
LIMITS: Mapping[str, tuple[Enter, int, tuple[str, ...]]] = {
    "64 open files": (limit(resource.RLIMIT_NOFILE, 64), 0, ()),
    "32 open files": (limit(resource.RLIMIT_NOFILE, 32), 0, ()),
    "12 open files": (limit(resource.RLIMIT_NOFILE, 12), 1, ("error: ",)),
    "no large files": (limit(resource.RLIMIT_FSIZE, TEN_KB), 1, ("make room",)),
    "files of one byte": (limit(resource.RLIMIT_FSIZE, 1), 1, ()),
    "files of no byte": (limit(resource.RLIMIT_FSIZE, 0), 1, ()),
    "no more memory": (less_memory(1 << 20), 1, ("out of memory",)),
    "30 MB of memory": (less_memory(30 << 20), 1, ("out of memory",)),
    "a gigabyte of memory": (less_memory(1 << 30), 0, ()),
    "no core files": (limit(resource.RLIMIT_CORE, 0), 0, ()),
    "no locked memory": (limit(resource.RLIMIT_MEMLOCK, 0), 0, ()),
}
ENVIRONMENTS: Mapping[str, Mapping[str, str | None]] = {
    "no HOME": {"HOME": None},
    "an empty HOME": {"HOME": ""},
    "a HOME that is missing": {"HOME": "/nonexistent/home"},
    "a HOME that is a device": {"HOME": "/dev/null"},
    "a TMPDIR that is missing": {"TMPDIR": "/nonexistent/tmp"},
    "a TMPDIR that is a device": {"TMPDIR": "/dev/null"},
    "an empty TMPDIR": {"TMPDIR": ""},
    "LANG=C": {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0"},
    "no PATH": {"PATH": None},
    "no USER": {"USER": None, "LOGNAME": None},
    "a terminal of no kind": {"TERM": "dumb", "COLUMNS": "0", "LINES": "-1"},
    "columns that are no number": {"COLUMNS": "wide"},
    "a time zone of no place": {"TZ": "No/Where"},
}
SHUT = "Permission denied"


def processes() -> Iterator[Surrounding]:
    """Cases of what a process may be born with."""
    for words, (enter, code, said) in LIMITS.items():
        yield Surrounding(name=words, enter=enter, code=code, said=said)
    for words, variables in ENVIRONMENTS.items():
        yield Surrounding(name=words, environment=variables)
    for encoding in ("ascii", "latin-1", "cp1252", "utf-16"):
        yield Surrounding(
            name=f"streams in {encoding}",
            enter=encoded(encoding),
            spoil=both(write("model/L\u00cdCENSE \u6f22.txt", ACCENTS), job(output__path=ACCENTS)),
            output=ACCENTS,
            command=("compress", "job.yaml"),
        )
        yield Surrounding(
            name=f"an error on streams in {encoding}",
            enter=encoded(encoding),
            spoil=job(calibration__path=f"{ACCENTS}.txt"),
            code=2,
        )
    for bits in (0o777, 0o377, 0o177, 0):
        yield Surrounding(
            name=f"umask {bits:03o}", enter=all_of(powerless, masked(bits)), code=int(bits > 0)
        )


def places() -> Iterator[Surrounding]:
    """Cases of directories that are gone, shut or old."""
    away = ("compress", "{room}/job.yaml", "-q")
    yield Surrounding(
        name="a working directory that is gone",
        enter=unmade_directory,
        command=away,
        code=2,
        said=("working directory",),
    )
    yield Surrounding(
        name="a working directory that is gone, whole paths",
        enter=unmade_directory,
        spoil=absolute,
        command=away,
    )
    for bits in (0o000, 0o100, 0o500):
        yield Surrounding(
            name=f"a working directory of mode {bits:03o}, whole paths",
            enter=all_of(powerless, inner(bits)),
            spoil=absolute,
            command=away,
        )
    for name, code in (
        ("model", 2),
        ("text.txt", 2),
        ("job.yaml", 2),
        ("model/config.json", 2),
        ("model/model.safetensors", 2),
        ("model/tokenizer.json", 2),
    ):
        yield Surrounding(
            name=f"{name} is shut",
            enter=powerless,
            spoil=mode(name, 0),
            code=code,
            said=(Path(name).name,),
        )
    yield Surrounding(
        name="the output's folder is shut",
        enter=powerless,
        spoil=both(folder("shut", 0o500), job(output__path="shut/out")),
        code=2,
        said=("shut",),
    )
    yield Surrounding(
        name="the room is shut",
        enter=powerless,
        spoil=mode(".", 0o500),
        code=2,
    )
    yield Surrounding(
        name="the checkpoint cannot be written",
        enter=powerless,
        spoil=mode("model", 0o500),
    )
    yield Surrounding(
        name="a HOME that cannot be written",
        enter=powerless,
        spoil=folder("home", 0o500),
        environment={"HOME": "home"},
    )
    yield Surrounding(
        name="a TMPDIR that cannot be written",
        enter=powerless,
        spoil=folder("tmp", 0o500),
        environment={"TMPDIR": "tmp"},
    )
    yield Surrounding(name="inputs of tomorrow", spoil=dated(86400))
    yield Surrounding(name="inputs of another century", spoil=dated(3e9))
    yield Surrounding(name="inputs of before 1970", spoil=dated(-time.time() - 1e6))


CASES = [*streams(), *names(), *processes(), *places()]
BY_NAME = {case.name: case for case in CASES}


def try_surrounding(case: Surrounding, start: Path, room: Path) -> None:
    """Runs a case in a room that does not exist yet, and checks all that a case promises."""
    shutil.copytree(start, room)
    case.spoil(room)
    inputs = _inputs(room)
    process = process_helpers.fork(run_case, case.name, str(room))
    process.join(process_helpers.PATIENCE)
    code = process.exitcode
    out, err = ((room.parent / name).read_text("utf-8", "replace") for name in ("out", "err"))
    shown = f"exit code {code}\n{err[:3000]}\n{out[:2000]}"
    assert code == case.code, shown
    assert "Traceback" not in err + out and "Exception ignored" not in err, shown
    if code in (1, 2):
        assert len(err.splitlines()) <= 4, shown
    for piece in case.said:
        assert piece in err, f"{piece!r} is not in:\n{shown}"
    for path in (room, *room.rglob("*")):
        with contextlib.suppress(OSError):
            path.chmod(path.stat().st_mode | 0o700)
    after = _inputs(room)
    assert {name: after.get(name) for name in inputs} == inputs, "an input was changed"
    published = {path.parent.name for path in room.rglob("manifest.json")}
    assert published == ({case.output} if code == 0 or case.is_done else set()), published


def _inputs(room: Path) -> dict[str, str]:
    """Returns the hashes of everything that was in the room before."""
    return {
        path.relative_to(room).as_posix(): hash_file(path)
        for path in room.rglob("*")
        if path.is_file() and "out" not in path.parts
    }


def run_case(name: str, place: str) -> None:
    """Runs a case in this process."""
    case, room = BY_NAME[name], Path(place)
    os.chdir(room)
    for number, file in ((1, "out"), (2, "err")):
        descriptor = os.open(room.parent / file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.dup2(descriptor, number)
        os.close(descriptor)
    torch.set_num_threads(1)
    for variable, value in case.environment.items():
        os.environ.pop(variable, None)
        if value is not None:
            os.environ[variable] = value
    encoded("utf-8")()
    case.enter()
    sys.argv = ["lrc", *(argument.format(room=place) for argument in case.command)]
    main()
