"""A user sees the time that work takes: shares, what is left, and where it is written."""

import io
import json
import os
import re
import signal
import time
from types import SimpleNamespace
from typing import Any

import pico
import pytest
import tqdm.std
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lrc_cli.runtime import progress
from lrc_cli.runtime.progress import LINE_SECONDS, Progress
from lrc_cli.runtime.signals import Interrupted, stop_on_signals

LINE = re.compile(r"^(?P<phase>[\w ]+): (?P<share>\d+)%, about (?P<left>\d+) s left$", re.MULTILINE)
"""A line of progress in digits only: neither a sign nor "nan" nor "inf" fits."""


class Clock:
    """A clock that goes on when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Returns the clock of lrc's progress and of tqdm's bar."""
    clock = Clock()
    fake = SimpleNamespace(perf_counter=clock, strftime=time.strftime)
    monkeypatch.setattr(progress, "time", fake)
    monkeypatch.setattr(tqdm.std, "time", clock)
    return clock


def run(shown: Progress, clock: Clock, pieces: list[tuple[float, float]], cost: float) -> None:
    """Runs a phase of pieces of (cost, seconds)."""
    with shown.phase("work", cost) as phase:
        for piece, seconds in pieces:
            clock.now += seconds
            phase.advance(piece)


def said(stream: io.StringIO) -> list[tuple[int, int]]:
    """Returns the share in % and the seconds left of every line of progress."""
    return [(int(m["share"]), int(m["left"])) for m in LINE.finditer(stream.getvalue())]


def test_lines_say_the_share_and_the_time_that_is_left(clock: Clock) -> None:
    stream = io.StringIO()
    run(Progress(stream=stream), clock, [(2.0, 10.0)] * 20, 40.0)
    lines = said(stream)
    for share, left in lines:
        assert share / 100 * 200 + left == pytest.approx(200, abs=1)
    assert 5 < len(lines) <= 200 / LINE_SECONDS, "often enough, and not all the time"
    assert stream.getvalue().startswith("work ...\n")
    assert stream.getvalue().endswith("\nwork: 200.0 s\n")


def test_the_time_left_goes_by_cost_and_not_by_count(clock: Clock) -> None:
    stream = io.StringIO()
    # One dear piece comes after nine cheap pieces; each second of work has the same cost.
    run(Progress(stream=stream, verbose=True), clock, [(1.0, 1.0)] * 9 + [(91.0, 91.0)], 100.0)
    assert said(stream) == [(i, 100 - i) for i in range(1, 10)] + [(100, 0)]


# A busy machine makes tests slow, which is no failure.
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    pieces=st.lists(st.tuples(st.floats(1e-3, 1e15), st.floats(0, 1e6)), min_size=1, max_size=8),
    estimate=st.sampled_from([0.5, 1 - 1e-16, 1.0, 1 + 1e-12, 3.0]),
)
def test_no_share_and_no_time_left_is_impossible(
    pieces: list[tuple[float, float]], estimate: float
) -> None:
    """Costs may be estimated wrong, and sums of costs differ by their rounding."""
    stream, clock = io.StringIO(), Clock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress, "time", SimpleNamespace(perf_counter=clock, strftime=time.strftime))
        cost = estimate * sum(piece for piece, _ in pieces)
        run(Progress(stream=stream, verbose=True), clock, pieces, cost)
    lines = said(stream)
    assert len(lines) == len(pieces), stream.getvalue()
    shares = [share for share, _ in lines]
    assert shares == sorted(shares) and max(shares) <= 100


def test_a_phase_without_any_work_divides_by_nothing(clock: Clock) -> None:
    stream = io.StringIO()
    run(Progress(stream=stream, verbose=True), clock, [(0.0, 1.0)], 0.0)
    assert stream.getvalue() == "work ...\nwork: 1.0 s\n"


def test_a_terminal_has_a_bar_with_the_time_left(clock: Clock) -> None:
    stream = Terminal()
    run(Progress(stream=stream), clock, [(5.0, 10.0)] * 20, 100.0)
    shown = re.findall(
        r"work: +(\d+)%\|[^\r]*\| (\d\d):(\d\d) \(about (\d\d):(\d\d) left\)", stream.getvalue()
    )
    assert len(shown) > 10
    for share, *times in shown:
        minutes, seconds, minutes_left, seconds_left = map(int, times)
        elapsed, left = 60 * minutes + seconds, 60 * minutes_left + seconds_left
        assert elapsed == 2 * int(share) and left == pytest.approx(200 - elapsed, abs=1)
    assert "nan" not in stream.getvalue() and stream.getvalue().endswith("work: 200.0 s\n")


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_quiet_shows_nothing(stream: io.StringIO, clock: Clock) -> None:
    run(Progress(stream=stream, quiet=True), clock, [(5.0, 10.0)] * 20, 100.0)
    assert stream.getvalue() == ""


def test_progress_goes_to_standard_error(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    run(Progress(), clock, [(5.0, 10.0)] * 20, 100.0)
    written = capsys.readouterr()
    assert written.out == "" and LINE.search(written.err)


# ---------------------------------------------------------------- `lrc compress`

PHASES = ("checks", "statistics", "spectra", "factors", "writing", "verification", "evaluation")


def test_a_job_prints_its_phases_and_the_time_left(
    tmp_path: Any, llama_job: dict[str, Any]
) -> None:
    ended = pico.call("compress", pico.job(tmp_path, llama_job), "-v")
    assert ended.code == 0 and ended.out == f"{tmp_path / 'out'}\n"
    begun = re.findall(r"^(\w+) \.\.\.$", ended.err, re.MULTILINE)
    assert begun == list(PHASES)
    for phase in PHASES:
        assert re.search(rf"^{phase}: \d+\.\d s$", ended.err, re.MULTILINE)
    lines = [(m["phase"], int(m["share"])) for m in LINE.finditer(ended.err)]
    for phase in ("statistics", "spectra", "factors", "evaluation"):
        shares = [share for name, share in lines if name == phase]
        assert shares == sorted(shares) and shares[-1] == 100


def test_standard_output_stays_machine_readable(tmp_path: Any, llama_job: dict[str, Any]) -> None:
    ended = pico.call("compress", pico.job(tmp_path, llama_job), "-v", "--json")
    assert json.loads(ended.out)["schema_version"] == 1 and LINE.search(ended.err)
    quiet = pico.call("compress", tmp_path / "job.yaml", "--force", "--restart", "-q", "--json")
    assert json.loads(quiet.out)["schema_version"] == 1 and quiet.err == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_stops_after_a_step_and_the_second_at_once(
    number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(number)
    done = []
    with pytest.raises(Interrupted) as caught, stop_on_signals() as stop:
        os.kill(os.getpid(), number)
        done.append("the step")
        assert stop.number == number and "once more to stop now" in capsys.readouterr().err
        os.kill(os.getpid(), number)
        done.append("never")
    assert done == ["the step"] and caught.value.exit_code == 128 + number
    with (
        pytest.raises(Interrupted),
        stop_on_signals() as stop,
        Progress(stop=stop, quiet=True).phase("work", 2) as phase,
    ):
        os.kill(os.getpid(), number)
        done.append("another step")
        phase.advance(1)
        done.append("never")
    assert done == ["the step", "another step"]
    assert signal.getsignal(number) is before
