"""Every field of what training gave is measured again, follows from files, or is not checked."""

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import damage
import pico
import pytest
from pico import Models
from verify_helpers import failed, unchecked

from lrc_cli.checkpoint.source import Source, open_source
from lrc_cli.network.opening import open_module
from lrc_cli.report.record import Recovery
from lrc_cli.runtime.progress import Progress
from lrc_cli.verify import verify_directory
from lrc_cli.verify.again.networks import OpenedRun, open_run
from lrc_cli.verify.again.recovery import check_recovery
from lrc_cli.verify.files.asked import check_asked
from lrc_cli.verify.files.written import open_written
from lrc_cli.verify.original.unchanged import check_norms
from lrc_cli.verify.statements import Findings

Opened = tuple[OpenedRun, Source, Path]

AGAINST: dict[str, Any] = {
    "scope": "block",
    "objective": "half the squared change of the outputs per token, or per sequence without",
    "after": lambda value: value * 0.9,
    "planned_steps": lambda value: value + 1,
    "tokens": lambda value: value - 64,
    "planned_tokens": lambda value: value + 64,
    "num_sequences": lambda value: value - 1,
    "num_held_out": lambda value: value - 1,
    "num_left_out": 1,
    "norms": lambda value: value[1:],
    "reason": "training all layers together takes about 1 MB, and the memory of cpu is 2 GB",
    "windows": [],
}
"""A change of each field that the original and the data tell."""
CLAIMED: dict[str, Any] = {
    "before": lambda value: value * 1.5,
    "rate": 0.5,
    "trials": lambda value: {rate: 9.0 for rate in value},
    "steps": lambda value: value - 1,
}
"""A change of each other field, which is the run's own claim: it is said to be not checked."""


@pytest.fixture(scope="module")
def opened(
    tmp_path_factory: pytest.TempPathFactory, checkpoint: Models, text: Path
) -> Iterator[Opened]:
    """A trained output with both networks and its data."""
    original = checkpoint("bert-mlm")
    changes = {
        "model.path": str(original),
        "calibration.path": str(text),
        "calibration.num_sequences": 40,
        "certification": {"num_sequences": 12, "part": [0.6, 1.0]},
        "compression.method": "frobenius",
        "recover.scope": "model",
        "recover.tokens": 16000,
        "recover.norms": True,
    }
    output, report = pico.compressed(tmp_path_factory.mktemp("trained"), changes)
    assert report["recovery"]["after"] < report["recovery"]["before"]
    findings, source = Findings(), open_source(original)
    written = open_written(output, findings)
    run = open_run(written, source, None, None, False, findings, Progress(quiet=True))
    assert run is not None and not findings.failed
    yield run, source, output


def statements(opened: Opened, field: str | None, change: Any) -> Findings:
    """Returns what is said of a report in which one field of the recovery is another."""
    run, source, _ = opened
    report = copy.deepcopy(run.written.report)
    assert report is not None and run.written.config is not None
    found = report["recovery"]
    if field is not None:
        found[field] = change(found[field]) if callable(change) else change
    written = dataclasses.replace(run.written, report=report)
    findings = Findings()
    with findings.guard("asked", "the config"):
        check_asked(written, run.written.config, findings)
    again = dataclasses.replace(run, written=written, findings=findings)
    with findings.guard("recovery", "what training gave can be measured"):
        check_recovery(again)
    module, _ = open_module(source, factory=None, trust_remote_code=False)
    check_norms(module, written, source, findings)
    return findings


def test_every_field_has_its_place() -> None:
    fields = {field.name for field in dataclasses.fields(Recovery)}
    assert fields == AGAINST.keys() | CLAIMED.keys()


def test_an_untouched_outcome_holds_and_says_what_nobody_can_check(opened: Opened) -> None:
    found = statements(opened, None, None)
    assert not found.failed and not found.left_open
    open_ids = {s.id for s in found.with_status("not checked")}
    assert {"recovery.before", "recovery.trials"} <= open_ids
    assert "recovery.after" in {s.id for s in found.with_status("holds")}


@pytest.mark.parametrize("field", AGAINST)
def test_what_follows_from_the_data_is_found(field: str, opened: Opened) -> None:
    found = statements(opened, field, AGAINST[field])
    ids = {s.id for s in found.with_status("fails")}
    assert any(id.startswith(("recovery", "original.norms")) for id in ids), field


@pytest.mark.parametrize("field", CLAIMED)
def test_what_nobody_can_measure_is_not_called_true(field: str, opened: Opened) -> None:
    found = statements(opened, field, CLAIMED[field])
    words = "the objective before" if field == "before" else "the trials of rates"
    assert any(words in s.what for s in found.with_status("not checked"))


def test_data_that_is_not_there_is_said_to_be_missing(opened: Opened) -> None:
    run, *_ = opened
    findings = Findings()
    check_recovery(dataclasses.replace(run, sequences={}, findings=findings))
    said = {s.id: s.detail for s in findings.with_status("not checked")}
    assert said["recovery.after"] == said["recovery.data"] == "the calibration data is not there"
    assert {s.id for s in findings.left_open} == {"recovery.after", "recovery.data"}


@pytest.mark.parametrize("moved", ["a norm", "a bias of a dense layer", "an embedding"])
def test_norms_that_are_named_may_differ_and_nothing_else(
    moved: str, opened: Opened, tmp_path: Path
) -> None:
    """A norm that moves further is found by what it does; any other tensor by its bits."""
    _, source, output = opened
    output = damage.copied(output, tmp_path)
    state = pico.read_state(output)
    report = damage.read_report(output)
    named, factorised = report["recovery"]["norms"], set(pico.factorised_keys(state))
    if moved == "a norm":
        key = named[0]
    elif moved == "an embedding":
        key = next(key for key in state if "word_embeddings" in key)
    else:
        key = next(
            key
            for key in state
            if key.endswith(".bias") and key not in named and key[:-5] not in factorised
        )
    damage.edit_tensors(output, key, lambda tensor: tensor + 0.25)
    damage.rewrite_manifest(output)
    found = verify_directory(output, against=source.path)
    lines = failed(found)
    tensors = [line for line in lines if line.startswith("original.tensors")]
    assert bool(tensors) is (moved != "a norm"), lines
    assert any(line.startswith("recovery.after") for line in lines) or moved != "a norm", lines
    assert "recovery.before" in unchecked(found)
