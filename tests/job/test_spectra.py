"""These tests show that phase one's `spectra` solve no eigenproblem for nothing.

Eigenproblems take most of the time. A layer's problem depends on its own weight, so no two layers
share a problem, not even q, k and v, which read one input. These are needed once for all sizes:

- values and vectors of every layer: ranks are granted once all values are known, and the vectors
  hold the solution of every rank;
- vectors of W itself, for the report's plain SVD, which errors in every direction;
- values of W G W^T, for the report's least output error, where the method minimises another one.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from engine_helpers import gaussian

from lrc_cli.engine import SOLVERS, Statistics

VALUES, VECTORS = "eigvalsh", "eigh"
OTHERS = ("eig", "eigvals", "svd", "svdvals", "lobpcg")

NEEDED: dict[str, Counter[str]] = {
    "frobenius": Counter({VECTORS: 2}),
    "curvature": Counter({VECTORS: 2, VALUES: 1}),
    "svd": Counter({VECTORS: 1}),  # method svd is the plain SVD, on inputs that count as white
}
"""{method: the calls that every layer needs}."""


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Counts calls of torch's eigensolvers and singular value decompositions, by name."""
    counts: Counter[str] = Counter()

    def counting(name: str, function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            counts[name] += 1
            return function(*arguments, **options)

        return call

    for name in (VALUES, VECTORS, *OTHERS):
        place = torch if name == "lobpcg" else torch.linalg
        monkeypatch.setattr(place, name, counting(name, getattr(place, name)))
    yield counts


def times(counts: Counter[str], number: int) -> Counter[str]:
    return Counter({name: count * number for name, count in counts.items()})


@pytest.mark.parametrize("method", list(NEEDED))
def test_no_eigenproblem_is_solved_for_nothing(
    method: str, tmp_path: Path, llama_job: dict[str, Any], solved: Counter[str]
) -> None:
    _, report = pico.compressed(tmp_path, llama_job | {"compression.method": method})
    assert solved == times(NEEDED[method], len(report["layers"]))
    solved.clear()
    ended = pico.call("compress", tmp_path / "job.yaml", "--sizes", "0.8,0.5")
    assert ended.code == 0 and "spectra ..." not in ended.err
    assert not solved


def test_a_plan_leaves_its_spectra_to_the_job(
    tmp_path: Path, llama_job: dict[str, Any], solved: Counter[str]
) -> None:
    job = pico.job(tmp_path, llama_job | {"compression.method": "frobenius"})
    assert pico.call("plan", job).code == 0
    assert solved[VECTORS] >= 2 * 14, "the size/error curve needs every layer's"
    solved.clear()
    assert pico.call("compress", job).code == 0
    assert not solved


@pytest.mark.parametrize("method", ["frobenius", "curvature"])
@pytest.mark.parametrize("center", [False, True])
def test_bounded_layer_errors_need_no_second_spectrum(
    center: bool, method: str, tmp_path: Path, llama_job: dict[str, Any], solved: Counter[str]
) -> None:
    """The layer's own spectrum tells the errors that the target bounds."""
    changes = {"compression.method": method, "compression.max_layer_error": 0.4}
    _, report = pico.compressed(tmp_path, llama_job | changes | {"compression.center": center})
    assert solved == times(NEEDED[method], len(report["layers"]))


@pytest.mark.parametrize("shape", [(24, 60), (60, 24), (24, 24)])
@pytest.mark.parametrize("method", ["frobenius", "curvature"])
def test_nothing_is_solved_or_factorised_on_the_larger_side(
    method: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With m > n no root of F is taken, with m <= n no root of G: each is of the larger side."""
    m, n = shape
    weight, x, g = gaussian(m, n, seed=0), gaussian(200, n, seed=1), gaussian(200, m, seed=2)
    statistics = Statistics(gram=x.T @ x / 200, fisher=g.T @ g / 200)
    seen: list[tuple[str, torch.Size]] = []

    def noting(name: str, function: Any) -> Any:
        def call(matrix: torch.Tensor, *rest: Any, **options: Any) -> Any:
            seen.append((name, matrix.shape))
            return function(matrix, *rest, **options)

        return call

    names = (VALUES, VECTORS, *OTHERS[:-1], "cholesky", "cholesky_ex", "qr", "inv")
    for name in names:
        monkeypatch.setattr(torch.linalg, name, noting(name, getattr(torch.linalg, name)))
    solver = SOLVERS[method]
    found = solver.survey(weight, statistics)
    solver.factorize(weight, statistics, 6)
    assert found.vectors is not None and solver.spanned is not None
    solver.spanned(weight, solver.metric(statistics), found.vectors[:, :6].float())
    assert VECTORS in {name for name, _ in seen}
    assert all(max(size) <= min(m, n) for _, size in seen), seen
    roots = [size for name, size in seen if name.startswith("cholesky") and max(size) > 6]
    assert bool(roots) == (m > n or method == "curvature")
