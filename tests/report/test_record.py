"""report.json: its keys and types are frozen, and whoever reads it names what does not fit."""

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pico
import pytest
import report_helpers
from pico import Models

from lrc_cli.errors import InputError
from lrc_cli.report.record import parse_record, read_record

Report = dict[str, Any]
TABLE = Path(__file__).with_name("report_keys.txt")
"""Every key of the reports below with the types of its values."""
NAMES = (
    *("timing", "memory", "copies", "fused", "provenance.packages", "provenance.sequences"),
    *("provenance.checkpoint_sha256", "provenance.data_files_sha256", "provenance.data"),
    "provenance.left_out",
    *("certificate.tolerances", "certificate.clips", "certificate.values.layers"),
)
"""Objects whose keys are names: of layers, files, phases, packages."""
KINDS = {
    **{bool: "bool", int: "int", float: "float", str: "str", type(None): "null"},
    **{list: "list", dict: "object"},
}


@pytest.fixture(scope="module")
def reports(
    tmp_path_factory: pytest.TempPathFactory,
    checkpoint: Models,
    text: Path,
    plain_folder: pico.PlainFolder,
) -> list[tuple[Path, Report]]:
    """Outputs that have every key between them: certified and sequential, of `nuclear`, plain."""
    llama = {"model.path": str(checkpoint("llama")), "calibration.path": str(text)}
    llama["runtime.device"] = "cpu"
    certified = {
        "compression.method": "frobenius",
        "compression.sequential": True,
        "calibration.num_sequences": 100,
        "certification.part": [0.6, 1.0],
        "certification.num_sequences": 80,
        "certification.sequence_length": 16,
        "certification.quantile": 0.5,
        "gates.max_layer_error": 0.99,
    }
    nuclear = {
        "compression.method": "nuclear",
        "compression.size": None,
        "compression.threshold": 0.05,
    }
    jobs = [
        llama | certified,
        llama | nuclear,
        llama | {"compression.storage": "factors"},
        plain_folder.model("mlp") | {"compression.method": "relu", "runtime.device": "cpu"},
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(plain_folder.path)
        return [pico.compressed(tmp_path_factory.mktemp("job"), job) for job in jobs]


def flat(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Paths with types; entries of a list, and values of an object in NAMES, count as one."""
    yield path, KINDS[type(value)]
    if isinstance(value, list):
        for item in value:
            yield from flat(item, f"{path}[]")
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from flat(item, f"{path}.{'*' if path in NAMES else key}".lstrip("."))


def keys(found: list[Report]) -> list[str]:
    """A line for every path, sorted."""
    types: dict[str, set[str]] = {}
    for report in found:
        for path, kind in flat(report):
            types.setdefault(path, set()).add(kind)
    del types[""]
    return [f"{path}: {' | '.join(sorted(types[path]))}" for path in sorted(types)]


def test_the_keys_of_a_report_and_their_types_are_frozen(
    reports: list[tuple[Path, Report]],
) -> None:
    assert keys([report for _, report in reports]) == TABLE.read_text().splitlines()


def test_a_report_is_the_same_after_it_was_read(reports: list[tuple[Path, Report]]) -> None:
    for output, report in reports:
        record = read_record(output)
        # Text tells the order of the keys, and 1 from 1.0.
        assert json.dumps(record.to_json()) == json.dumps(report)
        assert parse_record(record.to_json()) == record


def small() -> Report:
    """A certified report with a gate."""
    report = report_helpers.small_report()
    report_helpers.certify(report, per_layer=True)
    gate = {"name": "max_layer_error", "limit": 0.5, "measured": 0.4, "where": "a", "met": True}
    report["gates"] = [gate | {"reason": None}]
    return json.loads(json.dumps(report))


def test_keys_that_are_not_known_are_passed_over_and_later_ones_may_be_missing() -> None:
    report = small()
    wanted = parse_record(report)
    report["layers"][0]["errors"]["colour"] = "blue"
    for key in ("copies", "fused", "worst_case"):
        report.pop(key, None)
    assert parse_record(report) == wanted
    del report["gates"]
    assert parse_record(report).gates == ()


Change = Callable[[Report], Any]


def put(path: str, value: Any) -> Change:
    """Sets what lies at a dotted path; a number is a place in a list."""

    def change(report: Report) -> None:
        *above, last = (int(x) if x.isdecimal() else x for x in path.split("."))
        place: Any = report
        for step in above:
            place = place[step]
        place[last] = value

    return change


DAMAGE: dict[str, Change] = {
    "layers[3].errors.metric.stored: a number is needed, not a string": put(
        "layers.3.errors.metric.stored", "0.1"
    ),
    "layers[0].fallback: true or false is needed, not a number": put("layers.0.fallback", 1),
    "layers[0].shape[1]: a whole number is needed, not true or false": put(
        "layers.0.shape.1", True
    ),
    "layers[0].shape: a list is needed, not a string": put("layers.0.shape", "64 x 48"),
    "layers[1]: an object is needed, not null": put("layers.1", None),
    "layers: a list is needed, not an object": put("layers", {}),
    "layers[2].bytes_after: a whole number is needed, not a number": put(
        "layers.2.bytes_after", 0.5
    ),
    "layers[2].storage: this key is missing": lambda report: report["layers"][2].pop("storage"),
    "size.parameters.before: this key is missing": lambda report: report["size"]["parameters"].pop(
        "before"
    ),
    "target.value: a number is needed, not null": put("target.value", None),
    "model: a string is needed, not a number": put("model", 7),
    "timing.checks: a number is needed, not a string": put("timing.checks", "long"),
    "quality[1].loss_after: a number is needed, not a list": put("quality.1.loss_after", []),
    "certificate.population.size: a whole number is needed, not a string": put(
        "certificate.population.size", "6584"
    ),
    "certificate.values.kl[7]: a number is needed, not null": put("certificate.values.kl.7", None),
    "certificate.values.layers: an object is needed, not a list": put(
        "certificate.values.layers", []
    ),
    "certificate.statements[0].bound: a number is needed, not a string": put(
        "certificate.statements.0.bound", "0.3"
    ),
    "certificate: an object is needed, not a string": put("certificate", "none"),
    "gates[0].limit: a number is needed, not null": put("gates.0.limit", None),
    "provenance.sequences.calibration: an object is needed, not a number": put(
        "provenance.sequences.calibration", 8
    ),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_what_does_not_fit_is_named_with_its_place(message: str) -> None:
    report = small()
    damaged = copy.deepcopy(report)
    DAMAGE[message](damaged)
    assert damaged != report
    with pytest.raises(InputError) as caught:
        parse_record(damaged)
    assert str(caught.value) == f"report.json: {message}"


def test_a_file_that_is_no_object_is_no_report(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("[]")
    with pytest.raises(InputError, match=r"report\.json is not a JSON object"):
        read_record(tmp_path)
