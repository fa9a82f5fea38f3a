"""These tests check when `compression.sequential` is on, and the sentence that says why."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pico
import pytest
from engine_helpers import storage_bytes
from sequential_helpers import (
    Changes,
    factorised,
)

from lrc_cli.config import load_config
from lrc_cli.engine import DENSE_STORAGE, Choice, pivot_block
from lrc_cli.job.factors.decide_sequential import decide
from lrc_cli.job.plan import Plan, make_plan
from lrc_cli.network.layer import Layer


@dataclass
class Known:
    """A work directory that knows how many tokens reached every layer."""

    plan: Plan
    tokens: int

    def facts(self, stage: str, unit: str) -> dict[str, Any]:
        return {"layers": {x.name: {"tokens": self.tokens} for x in self.plan.layers}}


AUTO: dict[str, tuple[Changes, int, int, bool, str]] = {
    "strong": ({}, 8, 1631, True, "14 of 14 factorised layers"),
    "half-of-the-layers": (
        {"allocation": "relative", "layers": {"*self_attn*": {"method": "svd"}}},
        8,
        1631,
        False,
        "6 of 14 factorised layers",
    ),
    "weak": (
        {},
        40,
        1631,
        False,
        "84.7% of the bytes are kept, and it is on from 60% down",
    ),
    "few-tokens": ({}, 8, 1085, False, "0 of 14 factorised layers"),
    "enough-for-most": ({}, 8, 1086, False, "12 of 14 factorised layers"),
    "not-quite-enough": ({}, 8, 1629, False, "12 of 14 factorised layers"),
    "just-enough-tokens": ({}, 8, 1630, True, "14 of 14 factorised layers"),
    "nothing-held-back": ({"correction": 1}, 8, 1440, True, "14 of 14 factorised layers"),
    "svd": ({"method": "svd"}, 8, 1631, False, "0 of 14 factorised layers"),
    "layer-error": ({"max_layer_error": 0.5}, 8, 1631, False, "max_layer_error is about the dense"),
    "loss-increase": ({"max_loss_increase": 1}, 8, 1631, False, "max_loss_increase is about the"),
    "nothing": ({}, None, 1631, False, "100.0% of the bytes are kept"),
}
"""{name: (keys of compression, every layer's rank (None: dense), tokens, decision, its reason)}.

7 of 60 sequences are held back, which are 190 of 1630 tokens.
"""


def _granted(layer: Layer, rank: int | None) -> Choice:
    """Returns a layer's choice of a rank, with error 0."""
    itemsize = layer.dtype.itemsize
    if rank is None:
        return DENSE_STORAGE.choices(layer.shape, itemsize)[0]
    m, n = layer.shape
    size = storage_bytes("auto", m, n, rank, itemsize, pivot_block(m, rank))
    return Choice("auto", rank, size, 0.0)


@pytest.mark.parametrize("name", AUTO)
def test_auto_is_on_where_it_pays_and_says_why(
    name: str, tmp_path: Path, sequential_job: Any
) -> None:
    asked, rank, tokens, used, reason = AUTO[name]
    config = load_config(pico.job(tmp_path, sequential_job("llama", **asked)))
    plan = make_plan(config)
    work: Any = Known(plan, tokens)
    decision = decide(plan, work, {layer.name: _granted(layer, rank) for layer in plan.layers})
    assert decision.used is used
    assert decision.reason.startswith("auto: ") and reason in decision.reason
    off = replace(config.compression, sequential=False)
    plain = replace(plan, config=replace(config, compression=off))
    decision = decide(plain, work, {layer.name: _granted(layer, rank) for layer in plan.layers})
    assert not decision.used and decision.reason == "compression.sequential is false"


def test_auto_is_said_in_the_log_and_in_the_report(tmp_path: Path, sequential_job: Any) -> None:
    ended = pico.call("compress", pico.job(tmp_path, sequential_job("llama", size=0.4)))
    assert ended.code == 0, ended.err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    found = report["sequential"]
    assert found["used"] and "39.7% of the bytes are kept" in found["reason"]
    assert f"compression.sequential: on: {found['reason']}" in ended.err.splitlines()
    assert all(layer["sequential"] for layer in factorised(report))


def test_auto_is_off_with_few_tokens(tmp_path: Path, sequential_job: Any) -> None:
    changes = sequential_job("llama", size=0.4) | {"calibration.num_sequences": 33}
    _, report = pico.compressed(tmp_path, changes)
    assert not report["sequential"]["used"]
    assert "0 of 13 factorised layers" in report["sequential"]["reason"]
    assert not any("sequential" in layer for layer in report["layers"])


def test_where_many_layers_have_few_tokens_none_is_fitted_sequentially(
    tmp_path: Path, sequential_job: Any
) -> None:
    """960 tokens are 15 for each of 64 inputs. The last layer of a block has 96 inputs."""
    changes = sequential_job("llama", size=0.4, sequential=True) | {"calibration.num_sequences": 34}
    _, report = pico.compressed(tmp_path, changes)
    assert not report["sequential"]["used"] and report["sequential"]["held_back"] == 0
    reason = report["sequential"]["reason"]
    assert "11 of 13" in reason and "2 have fewer tokens" in reason
    assert not any("sequential" in layer for layer in report["layers"])


def test_the_share_that_decides_counts_gained_biases(tmp_path: Path, sequential_job: Any) -> None:
    changes = sequential_job("llama", method="frobenius", center=True, size=0.4, storage="factors")
    _, report = pico.compressed(tmp_path, changes)
    share = report["size"]["kept_compressible"]
    assert report["sequential"]["reason"].startswith(f"auto: {share:.1%} of the bytes are kept")


def test_a_bound_on_layer_errors_is_refused(tmp_path: Path, sequential_job: Any) -> None:
    changes = sequential_job("llama", max_layer_error=0.3, sequential=True)
    ended = pico.call("compress", pico.job(tmp_path, changes), "-q")
    assert ended.code == 2 and ended.err.count("\n") == 1
    assert "compression.sequential: max_layer_error bounds errors" in ended.err
    assert "sequential: false" in ended.err and not (tmp_path / ".lrc-work").exists()


@pytest.mark.parametrize("method", ["svd", "nuclear"])
def test_methods_without_a_form_on_two_networks_are_refused(
    method: str, tmp_path: Path, sequential_job: Any
) -> None:
    ended = pico.call(
        "compress",
        pico.job(tmp_path, sequential_job("llama", method=method, sequential=True)),
        "-q",
    )
    assert ended.code == 2 and not (tmp_path / ".lrc-work").exists()
    assert f"no layer has method frobenius or curvature, but {method}; set" in ended.err
