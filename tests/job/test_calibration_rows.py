"""Tests of the rows that calibration data give layers, and of the default amount of data."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
import yaml

from lrc_cli.config import Config, load_config, parse_config
from lrc_cli.data.draw import Sequences
from lrc_cli.execution.constancy import Pass, Trace
from lrc_cli.job.calibration_rows import (
    ROWS_PER_INPUT,
    Reach,
    default_number,
    reach_of,
    rows_per_sequence,
)
from lrc_cli.job.plan import make_plan
from lrc_cli.network.keys import Keys
from lrc_cli.network.layer import Layer

LENGTH = 8
"""A sequence so short that 64 of them are few for the pico Llama's 96 inputs."""
ENOUGH = ROWS_PER_INPUT * 96 // LENGTH


def layer(name: str, m: int, n: int) -> Layer:
    keys = Keys(f"{name}.weight")
    return Layer(name=name, keys=keys, kind="", shape=(m, n), dtype=torch.float32, unit="")


def traced(layers: list[Layer], rows: dict[str, int]) -> Trace:
    """A pass over one sequence in which the layers had so many rows."""
    returned = Counter({x.name: rows[x.name] * x.shape[0] for x in layers})
    return Trace(batch={}, layers=layers, did=Pass(returned=returned), state={})


def reach(inputs: int, rows: float, number: int = 64, short: float = 0.0) -> Reach:
    return Reach(name="x", num_inputs=inputs, rows=rows, num_sequences=number, short=short)


def drawn(number: int, population: int, one_in: int | None = None) -> Sequences:
    inputs = {"input_ids": torch.zeros(number, 512, dtype=torch.int64)}
    return Sequences(
        name="calibration", inputs=inputs, population=population, sha256="", one_in=one_in
    )


def config(**changes: Any) -> Config:
    values = {
        "model": {"path": "m"},
        "calibration": {"path": "a.txt"},
        "compression": {"size": 0.5},
        "evaluation": [],
        "output": {"path": "out"},
        **changes,
    }
    return parse_config(yaml.safe_dump(values), "job.yaml")


CASES = {
    "narrow: the config's default": (reach(576, 64 * 512), drawn(64, 9000), {}, 64),
    "wide": (reach(2048, 64 * 512), drawn(64, 9000), {}, 80),
    "rounded up to whole sequences": (reach(2050, 64 * 512), drawn(64, 9000), {}, 81),
    "experts that see a share of the tokens": (reach(2048, 64 * 64), drawn(64, 9000), {}, 640),
    "data that ends": (reach(4096, 64 * 512), drawn(64, 100), {}, 100),
    "fewer than the default": (reach(4096, 9 * 512, 9), drawn(9, 9), {}, 9),
    "no more than a bound": (reach(4096, 64.0), drawn(64, 10**6), {}, 2048),
    "a long text of which a part is read": (reach(4096, 64 * 512), drawn(64, 90, 8), {}, 160),
    "no layer that needs data": (None, drawn(64, 9000), {}, 64),
    "no row at all": (reach(4096, 0.0), drawn(64, 9000), {}, 64),
    "held back for evaluation": (
        *(reach(4096, 64 * 512), drawn(64, 200), {"evaluation": None}, 136),
    ),
    "certification of shorter sequences": (
        reach(4096, 64 * 512),
        drawn(64, 200),
        {"certification": {"sequence_length": 64}},
        160,
    ),
    "certification that leaves too little": (
        *(reach(4096, 64 * 512), drawn(64, 150), {"certification": {}}, 64),
    ),
    "certification on other data": (
        *(reach(4096, 64 * 512), drawn(64, 150), {"certification": {"path": "b.txt"}}, 150),
    ),
    "training takes the rest": (
        *(reach(4096, 64 * 512), drawn(64, 170), {"recover": {"scope": "model", "path": "a.txt"}}),
        160,
    ),
    "training that asks for a number": (
        *(reach(4096, 64 * 512), drawn(64, 170)),
        {"recover": {"scope": "model", "num_sequences": 50}},
        120,
    ),
}


@pytest.mark.parametrize("case", list(CASES))
def test_the_default_number(case: str) -> None:
    found, sequences, changes, number = CASES[case]
    assert default_number(config(**changes), found, sequences) == number


def test_a_tenth_of_the_weights_does_not_decide() -> None:
    layers = [layer("wide", 10, 90), layer("plain", 100, 90), layer("head", 1, 900)]
    trace = traced(layers, {"wide": 100, "plain": 100, "head": 1})
    found = reach_of(layers, trace, drawn(8, 8))
    assert found is not None and found.num_inputs == 90 and found.rows == 800
    assert found.short == pytest.approx(900 / 10800)
    assert found.shortfalls == []
    assert reach_of([], trace, drawn(8, 8)) is None


def test_most_weights_with_fewer_rows_than_inputs_are_said() -> None:
    layers = [layer("a", 10, 90), layer("b", 10, 30)]
    found = reach_of(layers, traced(layers, {"a": 4, "b": 4}), drawn(10, 10))
    assert found is not None
    assert found.shortfalls == [
        "calibration: layers with 75.0% of the weights have more inputs than rows to fit to, such"
        " as a: 90 inputs, 40 rows: give more sequences"
    ]


def job_of(tmp_path: Path, changes: dict[str, Any]) -> Path:
    """A job without a number of sequences."""
    file = pico.job(tmp_path, {"calibration.sequence_length": LENGTH, **changes})
    values = yaml.safe_load(file.read_text())
    if "calibration.num_sequences" not in changes:
        del values["calibration"]["num_sequences"]
    file.write_text(yaml.safe_dump(values))
    return file


def test_a_job_takes_what_its_widest_layers_need_and_says_so(
    tmp_path: Path, llama_job: dict[str, Any]
) -> None:
    job = job_of(tmp_path, llama_job)
    ended = pico.call("compress", job)
    assert ended.code == 0, ended.err
    written = load_config(tmp_path / "out" / "lrc.yaml")
    assert written.calibration.num_sequences == ENOUGH
    assert "already what the config asks for" in pico.call("compress", job).err
    verified = pico.call("verify", tmp_path / "out", "--against", llama_job["model.path"])
    assert verified.code == 0, verified.out
    # The same job with the number written out is the same job.
    explicit = job_of(tmp_path, {**llama_job, "calibration.num_sequences": ENOUGH})
    assert "already what the config asks for" in pico.call("compress", explicit).err


@pytest.mark.parametrize("number", [12, 64])
def test_a_number_that_is_written_is_taken(
    number: int, tmp_path: Path, llama_job: dict[str, Any]
) -> None:
    job = job_of(tmp_path, {**llama_job, "calibration.num_sequences": number})
    plan = make_plan(load_config(job))
    assert len(plan.sequences["calibration"]) == number
    assert plan.config == load_config(job)


@pytest.mark.parametrize("method", ["svd", "frobenius"])
def test_plain_svd_needs_no_data(method: str, tmp_path: Path, llama_job: dict[str, Any]) -> None:
    plan = make_plan(load_config(job_of(tmp_path, {**llama_job, "compression.method": method})))
    assert len(plan.sequences["calibration"]) == (64 if method == "svd" else ENOUGH)
    assert (plan.reach is None) == (method == "svd")


def test_rows_of_layers_are_counted_without_padding(
    tmp_path: Path, llama_job: dict[str, Any]
) -> None:
    plan = make_plan(load_config(job_of(tmp_path, llama_job)))
    sequences = plan.sequences["calibration"]
    rows = rows_per_sequence(plan.trace, plan.layers, sequences)
    assert set(rows.values()) == {float(LENGTH)}
    mask = torch.ones_like(sequences.inputs["input_ids"])
    mask[:, LENGTH // 2 :] = 0
    padded = replace(sequences, inputs={**sequences.inputs, "attention_mask": mask})
    rows = rows_per_sequence(plan.trace, plan.layers, padded)
    assert set(rows.values()) == {LENGTH / 2}


def test_experts_of_all_blocks_share_their_mean() -> None:
    layers = [layer(f"blocks.{i}.experts.{j}.up", 8, 16) for i in range(2) for j in range(3)]
    seen = {x.name: rows for x, rows in zip(layers, (9, 0, 0, 1, 1, 1), strict=True)}
    rows = rows_per_sequence(traced(layers, seen), layers, drawn(1, 1))
    assert set(rows.values()) == {2.0}
