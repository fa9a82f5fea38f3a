"""These tests compress the real models that scripts/fetch_demo.py fetches.

Calibration is short and only some blocks are compressed, to keep the suite fast. The figures that
the project claims come from scripts/bench_quality.py.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from lrc_cli.config import load_config
from lrc_cli.job.run import compress
from lrc_cli.runtime.progress import Progress

ROOT = Path(__file__).resolve().parents[2]
MODELS, DATA = ROOT / ".cache" / "models", ROOT / ".cache" / "data"

GENERATE = """
import sys
import lrc_cli.hf
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = AutoTokenizer.from_pretrained(sys.argv[1])("The capital of France is", return_tensors="pt")
print(AutoTokenizer.from_pretrained(sys.argv[1]).decode(
    model.generate(**ids, max_new_tokens=8, do_sample=False)[0]))
"""


pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]
"""The seconds of a real model's run: minutes alone, several times more on a shared machine."""


def run(config: str, output: Path, *overrides: str) -> dict[str, Any]:
    """Compresses by a shipped config, with paths made absolute."""
    settings = (f"output.path={output}", *overrides)
    return compress(load_config(ROOT / "configs" / config, settings), progress=Progress(quiet=True))


def texts(count: int) -> list[str]:
    """Returns overrides that point a shipped config at the cache and shorten its evaluation."""
    return [
        f"calibration.path={DATA / 'wikipedia.txt'}",
        f"evaluation.0.path={DATA / 'wikipedia.txt'}",
        f"evaluation.1.path={DATA / 'news.txt'}",
        f"evaluation.0.num_sequences={count}",
        f"evaluation.1.num_sequences={count}",
    ]


@pytest.fixture(scope="module", autouse=True)
def fair_share_of_the_cores() -> Iterator[None]:
    """Gives each worker its part of the cores: conftest's one thread suits tiny models only.

    More threads than free cores wait for each other, which takes longer than one thread does.
    """
    before = torch.get_num_threads()
    num_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // num_workers))
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Returns reports by method: the first four blocks at 70 %, 8 x 256 calibration tokens."""
    root = tmp_path_factory.mktemp("smollm2")
    common = [
        f"model.path={MODELS / 'smollm2-135m'}",
        *texts(4),
        "calibration.num_sequences=8",
        "calibration.sequence_length=256",
        r"compression.include=['re:model\.layers\.[0-3]\..*']",
        "compression.size=0.7",
    ]
    baseline = ["compression.allocation=uniform", "compression.storage=factors"]
    return {
        "curvature": run("demo.yaml", root / "curvature", *common),
        "frobenius": run(
            "demo.yaml", root / "frobenius", *common, "compression.method=frobenius", *baseline
        ),
        "path": {"root": root},
    }


def test_a_real_language_model_keeps_its_perplexity(smollm2: dict[str, dict[str, Any]]) -> None:
    for row, baseline in zip(
        smollm2["curvature"]["quality"], smollm2["frobenius"]["quality"], strict=True
    ):
        assert 15 < row["perplexity_before"] < 60
        increase = row["loss_after"] - row["loss_before"]
        assert 0 < increase < 0.5
        assert increase < 0.7 * (baseline["loss_after"] - baseline["loss_before"])
        assert row["kl"] > 0
        assert 0.5 < row["top1_agreement"] < 1


def test_the_report_counts_the_bytes_that_were_written(smollm2: dict[str, dict[str, Any]]) -> None:
    size = smollm2["curvature"]["size"]
    directory = smollm2["path"]["root"] / "curvature"
    written = 0
    for file in directory.glob("*.safetensors"):
        with safe_open(file, framework="pt") as handle:
            for key in handle.keys():  # noqa: SIM118
                tensor = handle.get_tensor(key)
                written += tensor.numel() * tensor.element_size()
    assert written == size["checkpoint_bytes"]["after"]
    assert 0.69 < size["kept_compressible"] <= 0.7


def test_stored_errors_are_near_their_optimum(smollm2: dict[str, dict[str, Any]]) -> None:
    for layer in smollm2["curvature"]["layers"]:
        if layer["storage"] == "dense":
            continue
        metric = layer["errors"]["metric"]
        # bfloat16 adds a rounding error, which counts only where the rank's error is tiny.
        rounding = 2e-3 * metric["total"]
        assert metric["optimum"] * 0.99 < metric["stored"], layer["name"]
        assert metric["stored"] < 1.25 * metric["optimum"] + rounding, layer["name"]
        assert metric["stored"] < metric["svd"]


def test_a_fresh_process_generates_text(smollm2: dict[str, dict[str, Any]]) -> None:
    directory = smollm2["path"]["root"] / "curvature"
    done = subprocess.run(
        [sys.executable, "-c", GENERATE, str(directory)], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("The capital of France is")
    assert len(done.stdout.split()) > 6


def test_a_real_encoder(tmp_path: Path) -> None:
    """MiniLM is compressed by the output loss, and by `frobenius` at the same size."""
    common = [
        f"model.path={MODELS / 'minilm'}",
        *texts(16),
        "calibration.num_sequences=32",
        "compression.size=0.6",
    ]
    ours = run("encoder.yaml", tmp_path / "ours", *common)
    assert ours["loss"]["kind"] == "output"
    plain = run("encoder.yaml", tmp_path / "plain", *common, "compression.method=frobenius")
    for row, other in zip(ours["quality"], plain["quality"], strict=True):
        assert row["relative_output_error"] < 0.9 * other["relative_output_error"]
    report = json.loads((tmp_path / "ours" / "report.json").read_text(encoding="utf-8"))
    assert report["size"] == ours["size"]
