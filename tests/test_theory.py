"""docs/theory.md speaks of everything that the tool states."""

import re
from pathlib import Path

import pytest
import torch
from engine_helpers import gaussian, square_root

from lrc_cli.certificate import UNITS
from lrc_cli.certify import ERRORS
from lrc_cli.engine import FROBENIUS, SOLVERS, Drift, Sequential
from lrc_cli.engine.nuclear import UNIT as NUCLEAR_UNIT
from lrc_cli.engine.rectified import UNIT as RELU_UNIT

THEORY = (Path(__file__).resolve().parent.parent / "docs" / "theory.md").read_text(encoding="utf-8")
METRICS = {solver.unit for name, solver in SOLVERS.items() if name not in ("nuclear", "relu")}


def anchors() -> set[str]:
    """Of every heading, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", THEORY, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", sorted({*UNITS, *ERRORS, "worst_sequence", "tolerance"}))
def test_every_measured_quantity_is_explained(name: str) -> None:
    assert f"`{name}`" in THEORY


@pytest.mark.parametrize("unit", sorted({*METRICS, NUCLEAR_UNIT, RELU_UNIT}))
def test_the_unit_of_every_metric_is_explained(unit: str) -> None:
    assert f"`{unit}`" in THEORY


def test_every_link_leads_somewhere() -> None:
    links = re.findall(r"\]\(#([^)]*)\)", THEORY)
    assert len(links) > 15
    assert set(links) <= anchors()


def test_every_statement_has_a_proof_or_a_citation() -> None:
    sections = re.split(r"^#+ ", THEORY, flags=re.MULTILINE)
    stating = [section for section in sections if "**Statement.**" in section]
    assert len(stating) > 10
    assert all("*Proof" in section for section in stating)


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
