"""These tests check what benchmarks need: a random checkpoint, and the installed versions."""

import sys
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import bench_gram
import bench_quality
import installed
import pico
import pytest
import torch
from bench_inference import FORMS, build
from gpu_check import FULL, blocks_that_fit
from random_llama import llama_config, write_job, write_llama
from transformers import AutoModelForCausalLM

from lrc_cli.network.low_rank.stored import dense_weight


def write(directory: Path) -> Path:
    config = llama_config(width=64, inner=96, blocks=2, heads=4, kv_heads=2, vocabulary=50)
    num_bytes = write_llama(directory, config, shard_bytes=20_000)
    assert num_bytes == sum(tensor.nbytes for tensor in pico.read_state(directory).values())
    return write_job(directory, vocabulary=50, num_sequences=4, length=16, size=0.7)


def test_a_random_llama_is_what_transformers_would_save_and_lrc_compresses_it(
    tmp_path: Path,
) -> None:
    job = write(tmp_path / "a")
    write(tmp_path / "b")
    state = pico.read_state(tmp_path / "a")
    again = pico.read_state(tmp_path / "b")
    assert all(torch.equal(tensor, again[key]) for key, tensor in state.items())
    assert len(list((tmp_path / "a").glob("model-*.safetensors"))) > 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert set(model.state_dict()) - {"lm_head.weight"} <= set(state)
    ended = pico.call("compress", job)
    assert ended.code == 0, ended.err
    assert pico.factorised_keys(pico.read_state(Path(f"{tmp_path / 'a'}-compressed")))


def test_the_measured_forms_keep_the_share_of_the_bytes() -> None:
    for form in FORMS:
        layer = build(form, (512, 384), 0.7, torch.float32)
        size = sum(tensor.nbytes for tensor in layer.state_dict().values())
        assert 0.66 < size / (4 * 512 * 384) <= 0.7
        assert dense_weight(layer).shape == (512, 384)


def test_gram_products_are_timed_with_their_errors(capsys: pytest.CaptureFixture[str]) -> None:
    with mock.patch.multiple(bench_gram, WIDTHS=(40, 300), NUM_ROWS=64, REPEATS=1):
        bench_gram.main()
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows] == ["40", "300"]
    for _, *cells in rows:
        times, errors = [float(cells[i]) for i in (0, 2, 4)], [float(cells[i]) for i in (1, 3)]
        assert min(times) >= 0 and max(errors) < 1e-6


@pytest.mark.parametrize("sequential", [False, True])
def test_rows_of_the_quality_table_with_and_without_sequential_fitting(
    sequential: bool, tmp_path: Path
) -> None:
    given = ["bench_quality.py", "--seeds", "0", "--rows", "0.6 frob"]
    losses = {"dense": {"wikipedia": 1.0}}
    with (
        mock.patch.object(sys, "argv", given + ["--sequential"] * sequential),
        mock.patch.object(bench_quality, "OUT", tmp_path),
        mock.patch.object(bench_quality, "run_seed", return_value=losses) as run,
    ):
        bench_quality.main()
    ((_, _, rows), _) = run.call_args
    ((name, keys),) = rows.items()
    assert "0.6 frobenius" in name and "compression.allocation=uniform" in keys
    assert ("compression.sequential=false" in keys) != sequential


def test_what_is_missing_or_too_old_is_named() -> None:
    assert installed.problem("no-such-package-of-anybody", "1.2") == (
        "no-such-package-of-anybody: missing, 1.2 or newer is needed"
    )
    found = version("click")
    assert installed.problem("click", found) is None
    assert installed.problem("click", "999.1") == (
        f"click: {found} is too old, 999.1 or newer is needed"
    )
    assert installed.numbers("2.11.0+cu130") == (2, 11, 0)


def test_as_many_blocks_are_written_as_the_disk_holds() -> None:
    per_block = FULL.block_bytes
    assert blocks_that_fit(FULL, 1e13) == FULL.blocks
    assert blocks_that_fit(FULL, 4e9 + FULL.table_bytes + 3.5 * per_block) == 3
