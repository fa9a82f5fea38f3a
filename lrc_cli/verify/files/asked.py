"""These checks need the files only: the report must have all that the config asks for, no more."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lrc_cli.checkpoint.choice import NAMED
from lrc_cli.checkpoint.side_files import OTHER_WEIGHT_SUFFIXES, PICKLE_SUFFIXES, TENSOR_SUFFIX
from lrc_cli.config import Config, to_dict
from lrc_cli.data.draw import Purpose
from lrc_cli.data.kinds import member
from lrc_cli.data.purposes import CALIBRATION, CERTIFICATION, RECOVER, purposes_of
from lrc_cli.report.record import SCHEMA_VERSION
from lrc_cli.verify.files.fields import architecture_of
from lrc_cli.verify.files.training import training_problem
from lrc_cli.verify.files.written import Written
from lrc_cli.verify.statements import Findings

SPECIAL = 8
"""The most special tokens that a tokenizer is taken to add to a sequence."""
PACKAGES = ["safetensors", "torch", "transformers"]
TIE = 1e-9
"""The relative difference below which two figures may both be the largest."""
NOT_ASKED = "none was asked for: the configuration has no certification section"
NO_SEQUENCES = "none could be issued: no sequence was left for certification"
UNMEASURED = "none could be issued: nothing could be measured by sequence"


def check_asked(written: Written, config: Config, findings: Findings) -> None:
    """Checks what was drawn and measured against what the config asks for."""
    report = written.report
    assert report is not None
    facts = report["provenance"]
    findings.equal("config", "the report has its version", report["schema_version"], SCHEMA_VERSION)
    what = "the report names the model of the config"
    findings.equal("config", what, report["model"], Path(config.model.path).name)
    what = "the report names the class that config.json names"
    findings.equal("config", what, report["architecture"], architecture_of(written))
    what = "the target is a share of what the config says"
    of = config.compression.size_of if report["target"]["name"] == "size" else None
    findings.equal("config", what, report["target"]["of"], of)
    what = "the report has the hash of every data file of the config, and of no other"
    findings.equal("config", what, sorted(facts["data_files_sha256"]), sorted(_data_of(config)))
    what = "the report has the versions of the packages that compute, and peak memory"
    stated = [sorted(facts["packages"]), sorted(report["memory"])]
    peaks = ["gpu_allocated"] if facts["device"].startswith("cuda") else []
    findings.equal("config", what, stated, [PACKAGES, [*peaks, "host_resident"]])
    if written.source is not None and written.source.config is not None:
        what = "the report has the hash of the original's config.json"
        there = "config.json" in facts["checkpoint_sha256"]
        findings.judge("config", what, None if there else "it has none")
    odd = sum(len(name.split()) != 1 for name in facts["left_out"])
    if odd:  # a page shows these names, and only the original tells whether it has such files
        what = "the files that were left out are the original's"
        findings.not_checked("files.origin", what, f"{odd} of their names are several words")
    _check_machine(facts, config, findings)
    _check_draws(report, config, findings)
    _check_certificate(report, config, findings)
    findings.judge(
        "recovery", "the factors were trained as asked", training_problem(report, config)
    )
    with findings.guard("files.origin", "the original's side files are there"):
        _check_side_files(written, facts["checkpoint_sha256"], findings)
    with findings.guard("gates", "the report's gates are right"):
        _check_gates(report, config, findings)


def _data_of(config: Config) -> set[str]:
    """Returns the names under which data files, and the factory's file, have their hashes."""
    recover = config.recover if config.recover.is_used else None
    sections = (config.calibration, config.certification, recover, *(config.evaluation or ()))
    paths = {section.path for section in sections if section is not None}
    return {path for path in (*paths, config.model.factory) if path is not None}


def _check_machine(facts: Mapping[str, Any], config: Config, findings: Findings) -> None:
    """Device and dtype must be the config's where the config does not leave them open."""
    device, dtype = config.runtime.device, config.runtime.dtype
    if device != "auto":
        what = "the device is the config's"
        same = facts["device"] == device or facts["device"].startswith(f"{device}:")
        findings.judge("config", what, None if same else f"stated {facts['device']}, not {device}")
    if dtype != "auto":
        what = "the activations' dtype is the config's"
        findings.equal("config", what, facts["activation_dtype"], dtype)


def _check_draws(report: Mapping[str, Any], config: Config, findings: Findings) -> None:
    """Every purpose of the config must have its sequences, in the config's order."""
    wanted = purposes_of(config)
    drawn, rows = report["provenance"]["sequences"], report["quality"]
    fitted = (CALIBRATION, CERTIFICATION, RECOVER)
    names = [purpose.name for purpose in wanted if purpose.name not in fitted]
    stated = [row["text"] for row in rows]
    what = "the report has a row for each text of the config, in its order, and no other"
    there = [name for name in names if name in stated]
    problem = None if stated == there else f"stated {stated}, asked for were {names}"
    findings.judge("quality.rows", what, problem)
    what = "sequences were drawn for the purposes that the config has"
    asked = {purpose.name for purpose in wanted}
    findings.judge(
        "draws", what, None if set(drawn) <= asked else f"stated for {', '.join(sorted(drawn))}"
    )
    found = {**drawn, **{row["text"]: row for row in rows}}
    data = report["provenance"]["data"]
    what = "the report says how much of the data was asked for and found, for every purpose"
    told = {name: [facts["asked"], facts["found"]] for name, facts in data.items()}
    numbers = {purpose.name: purpose.num_sequences for purpose in wanted}
    counted = {n: [numbers[n], x["num_sequences"]] for n, x in found.items() if n in numbers}
    findings.equal("draws", what, {n: told[n] for n in told if n in counted}, counted)
    strays = sorted(set(told) - asked)
    problem = f"also for {', '.join(strays[:3])}" if strays else None
    findings.judge("draws", "the report tells of the config's data only", problem)
    taken: list[tuple[Purpose, int]] = []
    for purpose in wanted:
        facts = found.get(purpose.name)
        if facts is None:
            _check_missing(purpose, wanted[0], drawn.get(CALIBRATION), taken, findings)
            continue
        what = f"the number of sequences drawn for {purpose.name} is the config's"
        findings.judge("draws", what, _draw_problem(purpose, facts))
        taken.append((purpose, facts["num_sequences"]))


def _draw_problem(purpose: Purpose, facts: Mapping[str, Any]) -> str | None:
    number, population, most = facts["num_sequences"], facts["population"], purpose.num_sequences
    wanted = most if purpose.required else min(most, population)
    if number != wanted or not number <= population:
        return f"{number} of {population}, asked for were {most}"
    tokens = facts.get("num_tokens")
    if tokens is not None and member(purpose.path) == "block":
        length = purpose.sequence_length
        # An encoder reads the first half of a sequence, and its decoder the rest.
        lengths = {length, length // 2, length - length // 2}
        right = tokens in {number * own for own in lengths}
        return None if right else f"{tokens} tokens, not {number * length}"
    return None


def _check_missing(
    purpose: Purpose,
    calibration: Purpose,
    facts: Mapping[str, Any] | None,
    taken: Sequence[tuple[Purpose, int]],
    findings: Findings,
) -> None:
    """A purpose may have no sequences only if its number was left open and none was left."""
    what = f"sequences were drawn for {purpose.name}, as the config asks"
    id = "draws" if purpose.name in (CERTIFICATION, RECOVER) else "quality.rows"
    if purpose.required or purpose is calibration or facts is None:
        findings.judge(id, what, "the report has none")
        return
    left = _least_left(purpose, calibration, facts["population"], taken)
    if left > 0:
        findings.judge(id, what, f"the report has none, and at least {left} were left")
    else:
        reason = "the report has none; only the data tells whether any were left"
        findings.not_checked(id, what, reason)


def _least_left(
    purpose: Purpose, calibration: Purpose, population: int, taken: Sequence[tuple[Purpose, int]]
) -> int:
    """Returns a number of sequences that were free for a purpose, or 0.

    The calibration population tells the least length of its file. Each sequence that another
    purpose took can touch only so many of this purpose's.
    """
    if purpose.path != calibration.path:
        return 0
    blocks = member(purpose.path) == "block"
    own = purpose.sequence_length if blocks else 1
    width = max(calibration.sequence_length - SPECIAL, 1) if blocks else 1
    first, last = calibration.part
    length = population * width / (last - first)
    low, high = purpose.part
    free = int((high - low) * length) // own - 1
    for other, number in taken:
        apart = other.part[1] <= low or high <= other.part[0]
        if other.path == purpose.path and not apart:
            free -= number * (-(-other.sequence_length // own) + 1 if blocks else 1)
    return free


def _check_certificate(report: Mapping[str, Any], config: Config, findings: Findings) -> None:
    """There must be a certificate if and only if the config asks for one and it could be made."""
    certificate, drawn = report["certificate"], report["provenance"]["sequences"]
    what = "there is a certificate if and only if the config asks for one"
    asked, note = config.certification is not None, certificate["note"]
    if certificate["statements"]:
        findings.judge("certificate", what, None if asked else "none was asked for")
    elif not asked:
        findings.equal("certificate", what, note, NOT_ASKED)
    elif CERTIFICATION not in drawn:
        findings.equal("certificate", what, note, NO_SEQUENCES)
    elif findings.judge(
        "certificate", what, None if note == UNMEASURED else "it is missing, and was asked for"
    ):
        reason = "only --against and the data tell whether anything can be measured by sequence"
        findings.not_checked("certificate.measurable", "no certificate could be made", reason)


def _check_side_files(written: Written, recorded: Mapping[str, str], findings: Findings) -> None:
    """Side files whose hashes the report has must lie in the output."""
    named = ((written.source.config if written.source else None) or {}).get(NAMED)
    decisive = {"config.json", named}
    missing = [
        name
        for name in recorded
        if name not in decisive
        and not _may_hold_the_network(name)
        and not (written.directory / name).is_file()
    ]
    single = len(recorded) == 1  # the original is one file, which has no side files
    problem = f"not there: {', '.join(missing[:3])}" if missing and not single else None
    findings.judge("files.origin", "the original's side files are there", problem)


def _may_hold_the_network(name: str) -> bool:
    """Returns whether a file of the original may be one of its own weight files, by the name."""
    ends = (TENSOR_SUFFIX, *PICKLE_SUFFIXES, *OTHER_WEIGHT_SUFFIXES)
    return "/" not in name and (name.startswith(".") or name.endswith(ends))


def _check_gates(report: Mapping[str, Any], config: Config, findings: Findings) -> None:
    """The report must have the config's gates, each with what follows from its other figures."""
    limits = {k: v for k, v in to_dict(config)["gates"].items() if v is not None}
    what = "the report has the config's gates, in their order"
    stated = [(gate["name"], gate["limit"]) for gate in report["gates"]]
    if not findings.equal("gates", what, stated, list(limits.items())):
        return
    for gate in report["gates"]:
        what = f"what the gate {gate['name']} says follows from the report"
        measured, wheres, reason = _measured(gate["name"], report)
        met = measured is not None and measured <= gate["limit"]
        near = gate["measured"] == measured or (
            None not in (gate["measured"], measured)
            and math.isclose(gate["measured"], measured or 0.0, rel_tol=TIE)
        )
        problem = None
        if not near:
            problem = f"stated {gate['measured']}, found {measured}"
        elif gate["met"] is not met:
            problem = f"it is stated as {'met' if gate['met'] else 'missed'}"
        elif gate["where"] not in wheres or gate["reason"] != reason:
            problem = "its place or its note is another"
        findings.judge("gates", what, problem)


def _measured(
    gate: str, report: Mapping[str, Any]
) -> tuple[float | None, Sequence[str | None], str | None]:
    """Returns the worst figure of a gate's kind, where it may have been found, and the note."""
    if gate == "max_perplexity_increase":
        found = {row["text"]: _increase(row) for row in report["quality"]}
        why = "no text has a perplexity" if found else "there was no evaluation data"
        return _worst(found, f"not measured: {why}", None)
    layers = [row for row in report["layers"] if row["storage"] != "dense"]
    errors = {row["name"]: row["errors"].get("held_out") for row in layers}
    found = {name: error and error["deployed"] for name, error in errors.items()}
    left = sum(error is None for error in errors.values())
    reached = "no factorised layer was reached by certification data"
    why = reached if layers else "no layer is factorised"
    note = f"{left} factorised layers were not reached by certification data" if left else None
    return _worst(found, f"not measured: {why}", note)


def _increase(row: Mapping[str, Any]) -> float | None:
    before, after = row.get("loss_before"), row.get("loss_after")
    if before is None or after is None:
        return None
    return math.expm1(after - before) if after - before < 700 else math.inf


def _worst(
    found: Mapping[str, float | None], nothing: str, note: str | None
) -> tuple[float | None, Sequence[str | None], str | None]:
    measured = {name: value for name, value in found.items() if value is not None}
    if not measured:
        return None, [None], nothing
    worst = max(measured.values())
    near = [x for x, value in measured.items() if math.isclose(value, worst, rel_tol=TIE)]
    return worst, near, note
