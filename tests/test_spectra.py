"""Eigenproblems are what phase two and `spectra` spend their time on: none is solved for nothing.

A layer's problem depends on its own weight, so that no two layers share one, not even q, k and v,
whose inputs are the same. What is needed:

- values of every layer, because ranks are granted once all spectra are known;
- vectors of every layer that is factorised: its factors. Phase one could have found them with the
  values, but they cost more than these, take m x m numbers, and are not needed of layers that stay
  dense; the solution of a rank holds those of all lower ones, so other forms cost nothing;
- vectors of W itself, for the report's plain SVD, which errors in every direction;
- values of W G W^T, for the report's least output error, where the method minimises another one.

The last two do not depend on the rank: another size finds them in the work directory.
"""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pico
import pytest
import torch

VALUES, VECTORS = "eigvalsh", "eigh"
OTHERS = ("eig", "eigvals", "svd", "svdvals", "lobpcg")

NEEDED: dict[str, tuple[Counter[str], Counter[str]]] = {
    "frobenius": (Counter({VECTORS: 1}), Counter({VECTORS: 1})),
    "curvature": (Counter({VECTORS: 1}), Counter({VECTORS: 1, VALUES: 1})),
    "svd": (Counter({VECTORS: 1}), Counter()),  # it is the plain SVD, on inputs that count as white
}
"""By method, of a factorised layer beside its spectrum: at every size, and once."""


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


def factorised(output: Path) -> set[str]:
    report = json.loads((output / "report.json").read_text())
    return {layer["name"] for layer in report["layers"] if layer["storage"] != "dense"}


@pytest.mark.parametrize("method", list(NEEDED))
def test_no_eigenproblem_is_solved_for_nothing(
    method: str, tmp_path: Path, llama_job: dict[str, Any], solved: Counter[str]
) -> None:
    always, once = NEEDED[method]
    output, report = pico.compressed(tmp_path, llama_job | {"compression.method": method})
    first = factorised(output)
    spectra = Counter({VALUES: len(report["layers"])})
    assert first and solved <= spectra + times(always + once, len(first))

    solved.clear()
    ended = pico.call("compress", tmp_path / "job.yaml", "--sizes", "0.8,0.5")
    assert ended.code == 0 and "spectra ..." not in ended.err
    others = [factorised(tmp_path / f"out-{size}") for size in (0.8, 0.5)]
    new = set.union(*others) - first
    assert solved <= times(always, sum(map(len, others))) + times(once, len(new))


def test_a_plan_leaves_its_spectra_to_the_job(
    tmp_path: Path, llama_job: dict[str, Any], solved: Counter[str]
) -> None:
    job = pico.job(tmp_path, llama_job | {"compression.method": "frobenius"})
    assert pico.call("plan", job).code == 0
    assert solved[VALUES] >= 14, "the size/error curve needs every layer's"
    solved.clear()
    assert pico.call("compress", job).code == 0
    assert solved == times(sum(NEEDED["frobenius"], Counter()), len(factorised(tmp_path / "out")))


@pytest.mark.parametrize("center", [False, True])
def test_bounded_layer_errors_need_no_second_spectrum(
    center: bool, tmp_path: Path, llama_job: dict[str, Any], solved: Counter[str]
) -> None:
    """The errors that `frobenius` minimises are those that the target bounds."""
    changes = {"compression.method": "frobenius", "compression.max_layer_error": 0.4}
    _, report = pico.compressed(tmp_path, llama_job | changes | {"compression.center": center})
    assert solved[VALUES] == len(report["layers"]) == 14
