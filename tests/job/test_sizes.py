"""These tests run `compress --sizes`: one pass of statistics, reuse at another size, run.log."""

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pico
import pytest

from lrc_cli.job import run
from lrc_cli.job.work import SPECTRA, WorkDirectory

Changes = dict[str, Any]


@pytest.fixture
def job(tmp_path: Path, llama_job: Changes) -> Path:
    return pico.job(tmp_path, llama_job | {"runtime.work_dir": str(tmp_path / "work")})


def same_weights(first: Path, second: Path) -> bool:
    names = ("model.safetensors", "config.json")
    return all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


def test_each_size_is_what_it_would_be_alone(tmp_path: Path, job: Path) -> None:
    ended = pico.call("compress", job, "--sizes", "0.8,0.6")
    assert ended.code == 0, ended.err
    outputs = [tmp_path / "out-0.8", tmp_path / "out-0.6"]
    assert ended.out.splitlines() == [str(path) for path in outputs]
    assert ended.err.count("statistics ...") == 1 and ended.err.count("factors ...") == 2
    reports = [json.loads((path / "report.json").read_text()) for path in outputs]
    assert [report["target"]["value"] for report in reports] == [0.8, 0.6]
    assert "statistics" in reports[0]["timing"] and "statistics" not in reports[1]["timing"]

    elsewhere = ["--set", f"runtime.work_dir={tmp_path / 'other'}"]
    alone = pico.call("compress", job, *elsewhere, "--output", tmp_path / "alone")
    assert alone.code == 0, alone.err
    assert same_weights(outputs[1], tmp_path / "alone")
    # The second size would have found by itself what it took over from the first size.
    fresh = json.loads((tmp_path / "alone" / "report.json").read_text())
    for one, other in zip(reports[1]["layers"], fresh["layers"], strict=True):
        assert one.get("errors") == other.get("errors")

    again = pico.call("compress", job, "--sizes", "0.8,0.6", "--json")
    assert again.code == 0 and again.err.count("already what the config asks for") == 2
    assert [report["target"]["value"] for report in json.loads(again.out)] == [0.8, 0.6]
    third = pico.call("compress", job, "--sizes", "0.8,0.7")
    assert third.code == 0 and "statistics ..." not in third.err
    assert third.err.count("already what") == 1 and (tmp_path / "out-0.7").is_dir()


def test_a_stop_between_two_sizes(
    tmp_path: Path, job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run.output_directory

    @contextmanager
    def stop_after(output: Path, **options: Any) -> Iterator[Path]:
        with whole(output, **options) as directory:
            yield directory
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(run, "output_directory", stop_after)
        ended = pico.call("compress", job, "--sizes", "0.8,0.6")
    assert ended.code == 130 and ended.out == f"{tmp_path / 'out-0.8'}\n"
    assert not (tmp_path / "out-0.6").exists() and not (tmp_path / "out-0.6.partial").exists()
    ended = pico.call("compress", job, "--sizes", "0.8,0.6")
    assert ended.code == 0 and "statistics ..." not in ended.err
    assert (tmp_path / "out-0.6").is_dir()


def test_the_worst_size_decides(tmp_path: Path, job: Path) -> None:
    gate = ["--set", "gates.max_perplexity_increase=0.02"]
    junit = tmp_path / "found.xml"
    ended = pico.call("compress", job, "--sizes", "1,0.3", *gate, "--junit", junit, "-q")
    assert ended.code == 3 and "size 0.3: " in ended.err and "size 1: " not in ended.err
    suites = ElementTree.parse(junit).getroot()
    assert [suite.get("name") for suite in suites] == ["lrc size 1", "lrc size 0.3"]
    assert [suite.get("failures") for suite in suites] == ["0", "1"]


def test_nothing_begins_if_one_size_cannot_be(tmp_path: Path, job: Path) -> None:
    (tmp_path / "out-0.6").mkdir()
    ended = pico.call("compress", job, "--sizes", "0.8,0.6")
    assert ended.code == 2 and "out-0.6: the output exists" in ended.err
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("sizes", "piece"),
    [("0.8,0.80", "twice"), ("0.8;0.7", "not a list"), ("0.8,1.5", "compression.size")],
)
def test_wrong_sizes(sizes: str, piece: str, job: Path) -> None:
    ended = pico.call("compress", job, "--sizes", sizes)
    assert ended.code == 2 and piece in ended.err and "Traceback" not in ended.err


def test_restart_forgets_what_sizes_share(tmp_path: Path, job: Path) -> None:
    assert pico.call("compress", job).code == 0
    fingerprint = json.loads((tmp_path / "work" / "fingerprint.json").read_text())
    with WorkDirectory(tmp_path / "work", fingerprint) as work:
        assert all(work.has(SPECTRA, f"model.layers.{i}") for i in range(2))
    ended = pico.call("compress", job, "--restart", "--force")
    assert ended.code == 0 and "statistics ..." in ended.err


def test_the_log_keeps_what_was_said(tmp_path: Path, job: Path) -> None:
    assert pico.call("compress", job, "-q").err == ""
    log = (tmp_path / "work" / "run.log").read_text()
    for piece in ("checks: ", "statistics: ", "factors: ", "compression.sequential: "):
        assert piece in log
    assert all(line[:2] == "20" for line in log.splitlines())
    assert pico.call("compress", job, "--set", "compression.size=0.001", "--force").code == 2
    ended = pico.call("compress", job, "--force", "-v", "--restart")
    assert ended.code == 0 and ended.err.count("statistics: ") > 2
    assert len((tmp_path / "work" / "run.log").read_text()) > len(log)
