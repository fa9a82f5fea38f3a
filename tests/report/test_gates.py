"""Gates and JUnit: a miss is exit code 3, with the output there and marked as failed."""

import json
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pico
import process_helpers
import pytest
import report_helpers
from pico import Models
from report_helpers import render_card, render_html

from lrc_cli.checkpoint.manifest import matches_manifest
from lrc_cli.config import Gates
from lrc_cli.errors import GateMissed
from lrc_cli.report import gates as gate_checks
from lrc_cli.report import junit
from lrc_cli.report.record import Gate, parse_record

Changes = dict[str, Any]


@pytest.fixture
def small_job(llama_job: Changes) -> Changes:
    return llama_job | {"compression.method": "svd"}


def certified(job: Changes) -> Changes:
    """With held-out sequences to measure layers on."""
    part = {"part": [0.4, 0.6], "num_sequences": 8}
    return job | {"calibration.part": [0.0, 0.4], "certification": part}


def read_report(directory: Path) -> Any:
    return json.loads((directory / "report.json").read_text())


def check_gates(gates: Gates, report: Changes) -> tuple[Gate, ...]:
    return gate_checks.check_gates(gates, parse_record(report))


def fail_if_missed(report: Changes) -> None:
    gate_checks.fail_if_missed(parse_record(report))


def render_junit(report: Changes, *, strict: bool = False) -> str:
    return junit.render_junit(parse_record(report), strict=strict)


def statement(name: str, status: str, text: str) -> Changes:
    """A statement of a certificate, as far as JUnit shows it."""
    unknown = dict.fromkeys(("bound", "observed", "worst", "clip", "order", "num_needed", "layer"))
    quantity, _, kind = name.partition(".")
    known = {"id": name, "quantity": quantity, "kind": kind, "status": status, "text": text}
    return unknown | known | {"unit": "nats", "num_clipped": 0, "delta": 0.01}


def with_gates(**limits: float) -> Any:
    """The small report, a layer and a text of it measured, with its gates checked."""
    report = report_helpers.small_report()
    for layer, deployed in zip(report["layers"][:2], (0.3, 0.4), strict=True):
        others = dict.fromkeys(("inherited", "new", "same_input", "worst_sequence"), 0.1)
        held_out = {"deployed": deployed, **others, "tolerance": 0.5, "num_sequences": 8}
        layer["errors"]["held_out"] = held_out
    report["quality"][1]["loss_after"] = math.log(30.6)
    report["gates"] = [gate.to_json() for gate in check_gates(Gates(**limits), report)]
    return report


# ---------------------------------------------------------------- what a gate measures


def test_without_gates_there_is_nothing_to_miss() -> None:
    report = with_gates()
    assert report["gates"] == []
    fail_if_missed(report)
    assert "Gate" not in render_card(report) and "Gate" not in render_html(report)


@pytest.mark.parametrize(("limit", "met"), [(0.5 + 1e-9, True), (0.5 - 1e-9, False)])
def test_the_worst_text_counts(limit: float, met: bool) -> None:
    (gate,) = with_gates(max_perplexity_increase=limit)["gates"]
    assert gate["name"] == "max_perplexity_increase" and gate["limit"] == limit
    assert gate["where"] == "news" and gate["met"] is met and gate["reason"] is None
    assert gate["measured"] == pytest.approx(30.6 / 20.4 - 1)


@pytest.mark.parametrize(("limit", "met"), [(0.4, True), (0.399, False)])
def test_the_worst_layer_counts(limit: float, met: bool) -> None:
    report = with_gates(max_layer_error=limit)
    (gate,) = report["gates"]
    assert gate["where"] == report["layers"][1]["name"] and gate["measured"] == 0.4
    assert gate["met"] is met
    assert "1 factorised layers were not reached" in gate["reason"]  # the third has no figure


def test_what_was_not_measured_is_missed_with_the_reason() -> None:
    report = report_helpers.small_report()
    gates = Gates(max_perplexity_increase=10.0, max_layer_error=0.9)
    for row in report["quality"]:
        del row["loss_before"], row["loss_after"]
    for gate, reason in zip(
        check_gates(gates, report), ["no text has a perplexity", "no factorised layer"], strict=True
    ):
        assert not gate.met and gate.measured is None and gate.where is None
        assert gate.reason and gate.reason.startswith("not measured: ") and reason in gate.reason
    report["quality"], report["layers"] = [], []
    reasons = [gate.reason or "" for gate in check_gates(gates, report)]
    assert "no evaluation data" in reasons[0] and "no layer is factorised" in reasons[1]


def test_a_ruined_network_misses_although_its_perplexity_overflows() -> None:
    report = report_helpers.small_report()
    report["quality"][0]["loss_after"] = 1e5
    (gate,) = check_gates(Gates(max_perplexity_increase=1e9), report)
    assert not gate.met and gate.where == "wikipedia"


def test_every_missed_gate_is_named() -> None:
    report = with_gates(max_perplexity_increase=0.25, max_layer_error=0.2)
    with pytest.raises(GateMissed) as caught:
        fail_if_missed(report)
    text = str(caught.value)
    assert caught.value.exit_code == 3
    assert "gates.max_perplexity_increase: 0.25 is missed: 0.5 on news" in text
    assert "gates.max_layer_error: 0.2 is missed: 0.4 on model.layers.1.q_proj" in text


def test_the_card_and_the_page_say_it_near_the_top() -> None:
    report = with_gates(max_perplexity_increase=0.25, max_layer_error=0.9)
    card, page = render_card(report), report_helpers.Page(render_html(report))
    line = "Gate missed: gates.max_perplexity_increase: 0.25 is missed: 0.5 on news."
    assert line in card.split("## ")[0] and "max_layer_error" not in card.split("## ")[0]
    assert "## Gates" in card and "| max_layer_error | 0.9 | 0.4 |" in card
    assert line in page.text and page.marked("p", "alarm") == 1
    assert "Gates" in page.texts and page.marked("tr", "fallback") == 1


# ---------------------------------------------------------------- junit


def cases(text: str) -> dict[str, ElementTree.Element]:
    suite = ElementTree.fromstring(text)
    found = {f"{c.get('classname')} {c.get('name')}": c for c in suite.iter("testcase")}
    assert suite.tag == "testsuite" and suite.get("name") == "lrc"
    assert suite.get("tests") == str(len(found)) and suite.get("errors") == "0"
    for kind, attribute in (("failure", "failures"), ("skipped", "skipped")):
        number = sum(case.find(kind) is not None for case in found.values())
        assert suite.get(attribute) == str(number)
    return found


def message(case: ElementTree.Element, kind: str) -> str:
    found = case.find(kind)
    assert found is not None
    return found.get("message") or ""


def test_junit_has_a_case_for_everything_promised() -> None:
    report = with_gates(max_perplexity_increase=0.25, max_layer_error=0.9)
    report_helpers.certify(report)
    report["certificate"]["statements"] = [
        statement("kl.mean", "certified", "at most 0.3"),
        statement("kl.quantile", "cannot certify", "N = 20 < 59 needed"),
    ]
    report["target"]["met"] = False
    found = cases(render_junit(report, strict=True))
    assert list(found) == [
        "lrc.gates max_perplexity_increase <= 0.25",
        "lrc.gates max_layer_error <= 0.9",
        "lrc.strict no layer fell back",
        "lrc.target size 0.8",
        "lrc.certificate kl.mean",
        "lrc.certificate kl.quantile",
    ]
    failures = [name for name, case in found.items() if case.find("failure") is not None]
    assert failures == ["lrc.gates max_perplexity_increase <= 0.25", "lrc.target size 0.8"]
    assert "0.5 on news" in message(found[failures[0]], "failure")
    assert message(found["lrc.certificate kl.quantile"], "skipped") == "N = 20 < 59 needed"
    assert found["lrc.certificate kl.mean"].find("skipped") is None
    text = render_junit(report)
    properties = {
        p.get("name"): p.get("value") for p in ElementTree.fromstring(text).iter("property")
    }
    assert properties["kept_compressible"] == "0.797"
    assert properties["perplexity_after.wikipedia"] == "25.5"
    assert "lrc.strict no layer fell back" not in cases(text)


def test_junit_names_layers_that_fell_back_and_survives_odd_names() -> None:
    report = with_gates()
    report["target"]["met"] = True
    odd = 'a<b>&"\x00\x1b.proj'
    report["layers"].append(report_helpers.dense_layer(odd, fallback=True))
    found = cases(render_junit(report, strict=True))
    told = message(found["lrc.strict no layer fell back"], "failure")
    assert told == '1 layer fell back: a<b>&"\\x00\\x1b.proj'


# ---------------------------------------------------------------- through the command


def test_gates_that_are_met(tmp_path: Path, small_job: Changes) -> None:
    changes = certified(small_job) | {
        "compression.size": 0.9,
        "gates.max_perplexity_increase": 1e9,
        "gates.max_layer_error": 0.999,
    }
    output, report = pico.compressed(tmp_path, changes, "--junit", str(tmp_path / "lrc.xml"))
    assert [gate["met"] for gate in report["gates"]] == [True, True]
    assert report["gates"][0]["where"] == "rest"
    layers = [layer for layer in report["layers"] if layer["storage"] != "dense"]
    errors = {x["name"]: x["errors"]["held_out"]["deployed"] for x in layers}
    assert report["gates"][1]["measured"] == max(errors.values())
    assert errors[report["gates"][1]["where"]] == max(errors.values()) > 0
    assert "Gate missed" not in (output / "README.md").read_text()
    found = cases((tmp_path / "lrc.xml").read_text())
    assert not any(case.find("failure") is not None for case in found.values())
    assert {name.split()[0] for name in found} >= {"lrc.gates", "lrc.target", "lrc.certificate"}


def test_a_missed_gate_is_exit_three_each_time(tmp_path: Path, small_job: Changes) -> None:
    job = pico.job(tmp_path, small_job | {"gates.max_perplexity_increase": 1e-6})
    junit = tmp_path / "lrc.xml"
    for again in (False, True):
        junit.unlink(missing_ok=True)
        ended = pico.call("compress", job, "--junit", junit)
        assert ended.code == 3
        assert ended.out == f"{tmp_path / 'out'}\n"
        last = ended.err.splitlines()[-1]
        assert last.startswith("error: gates.max_perplexity_increase: 1e-06 is missed: ")
        assert last.endswith(" on rest; the output is there, marked as failed")
        assert ("already what the config asks for" in ended.err) is again
        found = cases(junit.read_text())
        assert "on rest" in message(found["lrc.gates max_perplexity_increase <= 1e-06"], "failure")
    assert read_report(tmp_path / "out")["gates"][0]["met"] is False
    assert "**Gate missed: " in (tmp_path / "out" / "README.md").read_text()
    assert "Gate missed: " in (tmp_path / "out" / "report.html").read_text()
    assert matches_manifest(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir() if "partial" in path.name) == []


def test_another_limit_needs_no_other_run(tmp_path: Path, small_job: Changes) -> None:
    job = pico.job(tmp_path, small_job)
    assert pico.call("compress", job, "-q").code == 0
    strict = pico.call("compress", job, "--set", "gates.max_perplexity_increase=1e-6", "--json")
    assert strict.code == 3 and json.loads(strict.out)["gates"][0]["met"] is False
    loose = pico.call("compress", job, "--set", "gates.max_perplexity_increase=1e9", "--json")
    assert loose.code == 0 and json.loads(loose.out)["gates"][0]["met"] is True
    assert read_report(tmp_path / "out")["gates"] == []


def test_the_process_exits_with_three(tmp_path: Path, small_job: Changes) -> None:
    changes = certified(small_job) | {"gates.max_layer_error": 1e-6}
    running = process_helpers.start(
        ["compress", pico.job(tmp_path, changes), "-q"], tmp_path / "log"
    )
    assert running.wait() == 3, running.err
    (gate,) = read_report(tmp_path / "out")["gates"]
    assert f"is missed: {gate['measured']:.6g} on {gate['where']}" in running.err


def test_gates_come_before_strict(
    tmp_path: Path, plain_folder: pico.PlainFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(plain_folder.path)
    changes = plain_folder.model("with_idle") | {"compression.size": 0.9}
    job = pico.job(tmp_path, changes)
    assert pico.call("compress", job, "--strict", "-q").code == 4
    junit = tmp_path / "lrc.xml"
    options = ["--set", "gates.max_perplexity_increase=1", "--strict", "-q", "--junit", junit]
    ended = pico.call("compress", job, *options)
    assert ended.code == 3 and "not measured: no text has a perplexity" in ended.err
    found = cases(junit.read_text())
    assert "idle" in message(found["lrc.strict no layer fell back"], "failure")


@pytest.mark.parametrize(
    ("changes", "pieces"),
    [
        (
            {"gates.max_perplexity_increase": 0.2, "evaluation": []},
            ["gates.max_perplexity_increase", "evaluation is []"],
        ),
        (
            {"gates.max_layer_error": 0.2},
            ["gates.max_layer_error", "no certification section"],
        ),
        ({"gates.max_layer_error": 0}, ["max_layer_error", "0"]),
    ],
)
def test_a_gate_that_cannot_be_measured_is_found_at_once(
    changes: Changes, pieces: list[str], tmp_path: Path, small_job: Changes
) -> None:
    ended = pico.call("compress", pico.job(tmp_path, small_job | changes), "-q")
    assert ended.code == 2 and ended.out == "" and ended.err.startswith("error: ")
    assert all(piece in ended.err for piece in pieces) and "Traceback" not in ended.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["job.yaml"]


@pytest.mark.parametrize(
    ("place", "piece"),
    [
        ("", "is a directory"),
        ("absent/lrc.xml", "not a writable directory"),
        ("out/lrc.xml", "lies in the output directory"),
        ("/proc/lrc.xml", "not a writable directory"),
    ],
)
def test_a_bad_junit_path_is_found_at_once(
    place: str, piece: str, tmp_path: Path, small_job: Changes
) -> None:
    ended = pico.call("compress", pico.job(tmp_path, small_job), "--junit", tmp_path / place)
    assert ended.code == 2 and ended.out == "" and piece in ended.err
    assert ended.err.startswith("error: --junit: ") and "; " in ended.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["job.yaml"]


def test_junit_does_not_go_into_the_output(tmp_path: Path, small_job: Changes) -> None:
    output, _ = pico.compressed(tmp_path, small_job)
    job = tmp_path / "job.yaml"
    ended = pico.call("compress", job, "--force", "--junit", output / "lrc.xml")
    assert ended.code == 2 and "lies in the output directory" in ended.err
    assert matches_manifest(output)


def test_an_encoder_has_no_perplexity_to_limit(
    tmp_path: Path, checkpoint: Models, text: Path
) -> None:
    changes = {"model.path": str(checkpoint("bert")), "calibration.path": str(text)}
    job = pico.job(tmp_path, changes | {"gates.max_perplexity_increase": 0.5})
    ended = pico.call("compress", job, "-q")
    assert ended.code == 3 and "not measured: no text has a perplexity" in ended.err
