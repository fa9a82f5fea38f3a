"""Nothing that people read can disturb a terminal, and no stream that fails can disturb a run."""

import ast
import errno
import io
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from lrc_cli.runtime.places import open_to_append
from lrc_cli.runtime.progress import Progress
from lrc_cli.runtime.signals import Interrupted
from lrc_cli.runtime.streams import (
    LONGEST,
    Lenient,
    NotDelivered,
    deliver,
    deliver_json,
    lenient_streams,
    tell,
)
from lrc_cli.text import cut, named, told, visible, visible_lines

PACKAGE = Path(__file__).resolve().parents[2] / "lrc_cli"

CONTROLS = {
    "ESC": ("\x1b[2J", r"\x1b[2J"),
    "BEL": ("\x07", r"\x07"),
    "NUL": ("\0", r"\x00"),
    "DEL": ("\x7f", r"\x7f"),
    "CSI of C1": ("\x9b31m", r"\x9b31m"),
    "NEL": ("\x85", r"\x85"),
    "newline": ("a\nb", r"a\nb"),
    "return": ("a\rb", r"a\rb"),
    "tab": ("a\tb", r"a\tb"),
    "right to left": ("\u202egpj.exe", r"\u202egpj.exe"),
    "isolate": ("\u2066a\u2069", r"\u2066a\u2069"),
    "line separator": ("a\u2028b", r"a\u2028b"),
    "paragraph separator": ("a\u2029b", r"a\u2029b"),
    "zero width": ("a\u200bb", r"a\u200bb"),
    "byte order mark": ("\ufeffa", r"\ufeffa"),
    "soft hyphen": ("a\xadb", r"a\xadb"),
    "half a pair": ("\ud800", r"\ud800"),
    "a byte of a file's name": ("\udcff", r"\udcff"),
    "a tag": ("\U000e0041", r"\U000e0041"),
}


@pytest.mark.parametrize(("text", "shown"), CONTROLS.values(), ids=CONTROLS)
def test_control_characters_are_shown_escaped(text: str, shown: str) -> None:
    assert visible(text) == shown and visible(text).isprintable()


@pytest.mark.parametrize(
    "text", ["layers.0", "größer \u2013 70 %", "模型", "a\xa0b", "e\u0301", ""]
)
def test_all_other_text_stays(text: str) -> None:
    assert visible(text) == text


def test_what_is_kept_stays_and_no_name_begins_a_line() -> None:
    assert visible("a\n\x1bb", keep="\n") == "a\n\\x1bb"
    assert visible_lines(["a\nerror: b", "c"]) == "a\\nerror: b\nc"


def test_the_middle_of_a_long_text_is_left_out() -> None:
    text = cut("a" * 5000 + "end", 300)
    assert text == f"{'a' * 200} [... 4,703 characters ...] {'a' * 97}end"
    assert cut("a" * 300, 300) == "a" * 300


def test_an_error_without_a_text_has_its_type() -> None:
    class Silent(Exception):
        def __str__(self) -> str:
            raise SystemExit(0)

    assert named(Silent()) == "Silent: (its text cannot be had)"
    assert told(Silent()) == "(its text cannot be had)"


class Full(io.StringIO):
    """A stream on a full disk."""

    def __init__(self, number: int = errno.ENOSPC, *, at: str = "write") -> None:
        super().__init__()
        self.number, self.at = number, at

    def write(self, text: str) -> int:
        if self.at == "write":
            raise OSError(self.number, os.strerror(self.number))
        return super().write(text)

    def flush(self) -> None:
        if self.at == "flush":
            raise OSError(self.number, os.strerror(self.number))


def closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


BROKEN: dict[str, Any] = {
    "full": Full,
    "full when flushed": lambda: Full(at="flush"),
    "no reader": lambda: Full(errno.EPIPE),
    "no terminal any more": lambda: Full(errno.EIO),
    "closed": closed,
    "closed from the start": lambda: None,
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_a_broken_standard_error_disturbs_nothing(
    broken: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr", broken())
    tell("a line")
    progress = Progress()
    progress.note("a note")
    with progress.phase("work", 2) as phase:
        phase.advance(1)
        phase.advance(1)
    assert phase.done == 2


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_a_broken_standard_output_is_an_error_for_results(
    broken: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout", broken())
    with pytest.raises(NotDelivered) as caught:
        deliver("a result")
    assert caught.value.exit_code == 1
    assert caught.value.is_quiet == (broken is BROKEN["no reader"])


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_prints_of_strangers_do_not_fail(broken: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", broken())
    monkeypatch.setattr("sys.stderr", broken())
    with lenient_streams():
        print("from a stranger", flush=True)


def test_text_that_the_encoding_cannot_hold_is_escaped() -> None:
    raw = io.BytesIO()
    stream = Lenient(io.TextIOWrapper(raw, encoding="ascii"))
    stream.write("größer \x1b[2J\n")
    stream.flush()
    assert raw.getvalue() == b"gr\\xf6\\xdfer \\x1b[2J\n" and not stream.is_lost


def test_a_line_is_cut_and_a_result_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    tell("x" * 1_000_000)
    deliver("y" * 100_000)
    shown = capsys.readouterr()
    assert len(shown.err) < LONGEST + 60 and len(shown.out) == 100_001


def test_json_stays_json(capsys: pytest.CaptureFixture[str]) -> None:
    deliver_json({"\x7f\x1b\u202e\ud800": "\n"})
    assert capsys.readouterr().out == '{\n  "\\u007f\\u001b\\u202e\\ud800": "\\n"\n}\n'


def test_a_signal_while_a_line_is_written_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Busy(io.StringIO):
        def write(self, text: str) -> int:
            raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stderr>'>")

    monkeypatch.setattr("sys.stderr", Busy())
    tell("stopping")


WRITERS = {"print", "echo", "secho"}


def calls(file: Path) -> list[str]:
    """Returns what a file calls to write for people in another way."""
    found = []
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "id", None) or getattr(node.func, "attr", None)
            if name in WRITERS:
                found.append(f"{file.name}:{node.lineno}: {name}")
        if isinstance(node, ast.Attribute) and node.attr in ("stdout", "stderr"):
            found.append(f"{file.name}:{node.lineno}: {node.attr}")
    return found


def test_everything_for_people_goes_one_way() -> None:
    allowed = {"streams.py": None, "progress.py": "stderr"}
    found = [line for file in sorted(PACKAGE.rglob("*.py")) for line in calls(file)]
    others = [x for x in found if x.split(":")[0] not in allowed]
    assert not others, others


# ---------------------------------------------------------------- the log


@pytest.fixture
def shown() -> io.StringIO:
    return io.StringIO()


def test_a_log_has_the_whole_text_and_the_trace(tmp_path: Path, shown: io.StringIO) -> None:
    progress = Progress(stream=shown)
    with pytest.raises(ValueError, match="x"), progress.logged(tmp_path / "run.log"):
        progress.note("n" * 5000 + "\x1b")
        raise ValueError("x" * 5000 + "\n\x1b[2J")
    text = (tmp_path / "run.log").read_text()
    assert "n" * 5000 + "\\x1b" in text and "x" * 5000 + "\\n\\x1b[2J" in text
    assert "Traceback" in text and "test_streams.py" in text and "\x1b" not in text
    assert len(shown.getvalue()) < 2 * LONGEST


@pytest.mark.parametrize("kind", ["directory", "pipe", "link", "device's link", "no right"])
def test_a_log_that_cannot_be_opened_is_said_and_missed(
    kind: str, tmp_path: Path, shown: io.StringIO
) -> None:
    file = tmp_path / "run.log"
    if kind == "directory":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "link":
        file.symlink_to(tmp_path / "elsewhere")
    elif kind == "device's link":
        file.symlink_to("/dev/full")
    else:
        file = tmp_path / "absent" / "run.log"
    progress = Progress(stream=shown)
    with progress.logged(file):
        progress.note("the work goes on")
    assert "there is no log: " in shown.getvalue() and "the work goes on" in shown.getvalue()
    assert not (tmp_path / "elsewhere").exists()


def test_a_log_on_a_full_disk_is_given_up(
    tmp_path: Path, shown: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "lrc_cli.runtime.progress.open_to_append", lambda *_: os.open("/dev/full", os.O_WRONLY)
    )
    progress = Progress(stream=shown)
    with progress.logged(tmp_path / "run.log"):
        progress.note("the work goes on")
    assert "No space left on device): the run goes on without it" in shown.getvalue()
    assert shown.getvalue().count("the work goes on") == 1


@pytest.mark.parametrize("replaced", [False, True])
def test_a_log_that_goes_while_the_run_goes_on_is_missed(
    replaced: bool, tmp_path: Path, shown: io.StringIO
) -> None:
    file = tmp_path / "run.log"
    progress = Progress(stream=shown)
    with progress.logged(file):
        file.unlink()
        if replaced:
            file.write_text("another")
        progress.note("the work goes on")
    assert "the log was removed or replaced" in shown.getvalue()
    assert not replaced or file.read_text() == "another"


def test_a_generator_that_is_not_asked_for_more_has_not_failed(
    tmp_path: Path, shown: io.StringIO
) -> None:
    progress = Progress(stream=shown)

    def jobs() -> Any:
        with progress.logged(tmp_path / "run.log"):
            yield 1

    running = jobs()
    assert next(running) == 1
    running.close()
    assert "GeneratorExit" not in (tmp_path / "run.log").read_text()


def test_a_signal_is_a_line_in_the_log_without_a_trace(tmp_path: Path, shown: io.StringIO) -> None:
    progress = Progress(stream=shown)
    with pytest.raises(Interrupted), progress.logged(tmp_path / "run.log"):
        raise Interrupted(signal.SIGINT)
    text = (tmp_path / "run.log").read_text()
    assert text.count("\n") == 1 and "Interrupted: interrupted; the same command goes on" in text


def test_a_log_is_appended_to(tmp_path: Path) -> None:
    for _ in range(2):
        os.close(open_to_append("log", tmp_path / "run.log"))
    assert (tmp_path / "run.log").read_text() == ""
