"""docs/theory.md speaks of everything that the tool states."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from engine_helpers import gaussian, square_root
from report_helpers import certify, small_report

from lrc_cli.engine import FROBENIUS, SOLVERS, Drift, Sequential, Shrunk, Statistics
from lrc_cli.engine.solvers.nuclear import UNIT as NUCLEAR_UNIT
from lrc_cli.engine.solvers.relu import UNIT as RELU_UNIT
from lrc_cli.quality.certificate import (
    ALL_LAYERS,
    LAYER_ERROR,
    UNITS,
    make_certificate,
)
from lrc_cli.quality.certificate_record import CANNOT, CERTIFIED, CertificateData
from lrc_cli.quality.held_out import ERRORS
from lrc_cli.report.facts import loss_estimate
from lrc_cli.report.record import parse_record
from lrc_cli.report.tables import Table, held_out_table, layer_table
from lrc_cli.report.worst_case import worst_case_note

THEORY = (Path(__file__).resolve().parents[2] / "docs" / "theory.md").read_text(encoding="utf-8")
METRICS = {solver.unit for name, solver in SOLVERS.items() if name not in ("nuclear", "relu")}


def anchor(heading: str) -> str:
    """The anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lstrip("# ").lower()).replace(" ", "-")


def anchors() -> set[str]:
    return {anchor(heading) for heading in re.findall(r"^#+ .*$", THEORY, re.MULTILINE)}


class Row(NamedTuple):
    """A row of the table of what is printed."""

    printed: str
    proof: str

    @property
    def sections(self) -> set[str]:
        """The anchors of the sections that prove it."""
        return set(re.findall(r"\]\(#([^)]*)\)", self.proof))


def table() -> list[Row]:
    text = THEORY.partition("## What is printed")[2].partition("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("| ")][2:]
    return [Row(*line.strip("| ").split(" | ")) for line in lines]


ROWS = table()


def assert_explained(*words: str) -> None:
    """A row has all the words, and a section."""
    found = [row for row in ROWS if all(word in row.printed for word in words)]
    assert found, f"no row of theory.md's first table has {words}"
    assert all(row.sections for row in found)


def test_every_row_leads_to_a_section_or_is_a_plain_measurement() -> None:
    for row in ROWS:
        assert row.sections <= anchors(), row
        assert row.sections or row.proof.startswith("measurements: "), row


def certificates() -> list[dict[str, Any]]:
    """Certificates of every quantity: too few sequences, enough, enough for single layers too."""
    report = small_report()
    certify(report)
    data = CertificateData.from_json(report["certificate"], "report.json")
    quantities = sorted(set(UNITS) - {ALL_LAYERS, LAYER_ERROR})
    found = []
    for num_sequences, quantile in ((20, 0.95), (120, 0.95), (240, 0.9)):
        ramp = [i / num_sequences for i in range(num_sequences)]
        found.append(
            make_certificate(
                dict.fromkeys(quantities, ramp),
                {"up": ramp, "down": ramp},
                clips=dict.fromkeys(quantities, 4.0),
                tolerances={"up": 0.3, "down": 0.3},
                confidence=0.95,
                quantile=quantile,
                data=data,
            ).to_json()
        )
    return found


def test_every_statement_of_a_certificate_has_its_section() -> None:
    seen = set()
    for certificate in certificates():
        for statement in certificate["statements"]:
            quantity, kind = statement["quantity"], statement["kind"]
            seen.add((quantity, statement["status"]))
            assert_explained(f"certificate, {kind}: ", f"`{quantity}`")
            if statement["status"] == CANNOT:
                assert statement["text"].startswith("cannot certify: N = ")
                assert_explained("cannot certify: N = ")
    assert {quantity for quantity, _ in seen} == set(UNITS)
    assert {status for _, status in seen} == {CERTIFIED, CANNOT}


DESCRIBING = {
    *("layer", "kind", "shape", "method", "storage", "rank"),
    *("before", "after", "kept", "why"),
}
"""Columns of the tables of layers that say what a layer is, and nothing of an error."""


@pytest.mark.parametrize("made", [layer_table, held_out_table])
def test_every_error_of_a_layer_has_its_section(made: Callable[[Any], Table]) -> None:
    report = small_report()
    certify(report)
    errors = set(made(parse_record(report)).head) - DESCRIBING
    assert len(errors) > 4
    for heading in errors:
        assert_explained(heading)


@pytest.mark.parametrize("name", sorted({*ERRORS, "worst_sequence", "tolerance", "worst_case"}))
def test_every_entry_of_a_layers_errors_is_explained(name: str) -> None:
    assert_explained(f"`{name}`")


@pytest.mark.parametrize("unit", sorted({*METRICS, NUCLEAR_UNIT, RELU_UNIT}))
def test_the_unit_of_every_metric_is_explained(unit: str) -> None:
    assert_explained(f"`{unit}`")


def test_every_figure_that_a_problem_adds_is_explained() -> None:
    weight, gram = gaussian(6, 5, seed=1), torch.eye(5, dtype=torch.float64)
    drift = Drift(compressed=gram, cross=0 * gram, drift=0 * gram, num_tokens=10)
    sequential = Sequential(weight, drift, FROBENIUS, ridge=1e-2)
    nuclear = Shrunk(weight, Statistics(gram=gram), share=0.1)
    assert sequential.unit.startswith(FROBENIUS.unit)
    assert_explained(f"`{sequential.unit.removeprefix(FROBENIUS.unit + ', ')}`")
    for name in {*sequential.facts, *nuclear.facts}:
        assert_explained(f"`{name.removesuffix('_share')}`")


def test_every_sentence_about_figures_has_its_section() -> None:
    report = small_report()
    report["worst_case"] = dict.fromkeys(("bound", "measured", "output_norm"), 1.0)
    report["worst_case"] |= {"label": "", "num_inputs": 3, "inputs": "calibration", "layers": []}
    record = parse_record(report)
    for note, start in (
        (loss_estimate(record), "The layers' estimated loss increases add up to"),
        (worst_case_note(record), "Worst case"),
    ):
        assert note.startswith(start)
        assert_explained(f'"{start}')


def test_every_link_leads_somewhere() -> None:
    links = re.findall(r"\]\(#([^)]*)\)", THEORY)
    assert len(links) > 15
    assert set(links) <= anchors()


def test_every_statement_has_a_proof_and_belongs_to_something_printed() -> None:
    """A proof follows before the next statement or heading; the table leads to the section."""
    linked = set.union(*(row.sections for row in ROWS))
    above, number = "", 0
    for heading, text in re.findall(r"^(#+ .*)\n((?:(?!^#).*\n?)*)", THEORY, re.MULTILINE):
        above = heading if heading.startswith("# ") else above
        _, *statements = text.split("**Statement.**")
        number += len(statements)
        assert all("*Proof" in statement for statement in statements), heading
        assert not statements or {anchor(heading), anchor(above)} & linked, heading
    assert number > 10


@pytest.mark.parametrize("rank", [1, 4, 9])
@pytest.mark.parametrize("size", [0.0, 0.1, 1.0])
def test_errors_of_sequential_fitting_add_in_quadrature(rank: int, size: float) -> None:
    """C3: E_l^2 <= ||W (X - X~)||^2 / T + tail_r(W (X X^T / T + l I)^(1/2))^2."""
    m, n, num_tokens, share = 12, 10, 300, 1e-2
    weight, x = gaussian(m, n, seed=1), gaussian(n, num_tokens, seed=2)
    compressed = x + size * gaussian(n, n, seed=3) @ x
    drift = x - compressed
    moments = Drift(
        compressed=compressed @ compressed.T / num_tokens,
        cross=drift @ compressed.T / num_tokens,
        drift=drift @ drift.T / num_tokens,
        num_tokens=num_tokens,
    )
    fitted = Sequential(weight, moments, FROBENIUS, ridge=share).solve(rank).factors.dense()
    error = (weight @ x - fitted @ compressed).square().sum() / num_tokens
    inherited = (weight @ drift).square().sum() / num_tokens
    regular = x @ x.T / num_tokens + moments.ridge(share) * torch.eye(n, dtype=torch.float64)
    tail = torch.linalg.svdvals(weight @ square_root(regular))[rank:].square().sum()
    assert error <= (inherited + tail) * (1 + 1e-9)
    bound_by_norms = torch.linalg.matrix_norm(weight, 2) ** 2 * drift.square().sum() / num_tokens
    assert inherited <= bound_by_norms * (1 + 1e-9)
