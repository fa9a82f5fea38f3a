"""A job whose logits do not fit at once gives what it gives where they do, and is verified."""

from pathlib import Path
from typing import Any

import pico
import pytest
from pico import Models
from verify_helpers import failed

from lrc_cli.execution import tail
from lrc_cli.verify import verify_directory

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "next token": ("llama", {}),
    "drawn labels": ("llama", {"compression.loss": "sampled"}),
    "probes": ("llama", {"compression.loss": "output"}),
    "masked tokens": ("bert-mlm", {}),
    "the head too": ("llama", {"compression.embeddings": True, "compression.exclude": []}),
    "sequential": ("llama", {"compression.sequential": True, "compression.size": 0.5}),
    "recover": ("qwen2", {"recover.scope": "model", "recover.tokens": 3000}),
}
DRAWN = ("drawn labels", "probes")
"""What is drawn part by part is drawn otherwise."""
LOOSE = {**dict.fromkeys(DRAWN, 0.2), "recover": 0.05, "the head too": 0.05}
"""The relative differences that are allowed where rounding decides more than the last digits."""
POSITIONS = 20
"""How many positions run at once: less than a sequence of 32 tokens."""


@pytest.fixture(params=list(CASES))
def jobs(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    checkpoint: Models,
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[str, Path, dict[str, Any], dict[str, Any]]:
    """The cut job's output, and the reports of the whole and of the cut job."""
    name, changes = CASES[request.param]
    changes = {
        "model.path": str(checkpoint(name)),
        "calibration.path": str(text),
        "calibration.num_sequences": 80,
        "runtime.dtype": "float32",
        "certification": {"num_sequences": 12, "part": [0.6, 0.8]},
        "evaluation": [{"name": "rest", "path": str(text), "part": [0.8, 1.0]}],
        **changes,
    }
    found = []
    for folder, number in (("whole", 10**9), ("cut", POSITIONS)):
        monkeypatch.setattr(tail, "OUTPUT_BYTES", number * 4 * len(pico.VOCABULARY))
        (tmp_path / folder).mkdir()
        found.append(pico.compressed(tmp_path / folder, changes))
    (_, whole), (output, cut) = found
    return request.param, output, whole, cut


def test_a_cut_job_reports_the_same_and_is_verified(
    jobs: tuple[str, Path, dict[str, Any], dict[str, Any]], checkpoint: Models
) -> None:
    name, output, whole, cut = jobs
    loose = LOOSE.get(name, 1e-3)
    for first, second in zip(numbers(whole), numbers(cut), strict=True):
        assert second == pytest.approx(first, rel=loose, abs=loose / 10)
    if name not in DRAWN:
        assert ranks(whole) == ranks(cut)
    found = verify_directory(output, against=checkpoint(CASES[name][0]))
    assert not failed(found)


def numbers(report: dict[str, Any]) -> list[float]:
    (row,) = report["quality"]
    values = [x for x in row.values() if isinstance(x, float)]
    bounded = [x["observed"] for x in report["certificate"]["statements"]]
    return values + [x for x in bounded if x is not None]


def ranks(report: dict[str, Any]) -> dict[str, Any]:
    return {layer["name"]: layer.get("rank") for layer in report["layers"]}
