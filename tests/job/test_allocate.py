"""These tests ask for targets, budgets and overrides: each is met, or refused before any pass."""

from pathlib import Path
from typing import Any

import pico
import pytest
from pico import Models

from lrc_cli.config import load_config
from lrc_cli.errors import InputError
from lrc_cli.job.run import compress
from lrc_cli.runtime.progress import Progress

ALL = "model.layers.*"


def report_of(directory: Path, job: dict[str, Any], **changes: Any) -> dict[str, Any]:
    renamed = {key.replace("__", "."): value for key, value in changes.items()}
    return compress(load_config(pico.job(directory, job | renamed)), progress=Progress(quiet=True))


def refused(directory: Path, job: dict[str, Any], **changes: Any) -> str:
    """Returns the message of a refusal, before which nothing was computed."""
    with pytest.raises(InputError) as caught:
        report_of(directory, job, **changes)
    assert not list(directory.rglob("statistics"))
    return str(caught.value)


def test_the_budget_of_the_whole_checkpoint_counts_converted_tensors(
    tmp_path: Path, llama_job: dict[str, Any]
) -> None:
    """Every tensor doubles from bfloat16 to float32: 0.999 of the bytes cannot be had."""
    options = {"compression__size_of": "checkpoint", "output__dtype": "float32"}
    assert "cannot be reached" in refused(tmp_path, llama_job, **options, compression__size=0.3)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"allocation": "uniform"},
        {"allocation": "relative"},
        {"size_of": "checkpoint"},
        {"allocation": "uniform", "layers": {"*.k_proj": {"size": 1}}},
        {"layers": {"*.mlp.*": {"size": 0.9}}},
        {"storage": "factors"},
    ],
    ids=str,
)
def test_the_size_that_a_refusal_names_can_be_reached(
    tmp_path: Path, llama_job: dict[str, Any], options: dict[str, Any]
) -> None:
    changes = {f"compression__{key}": value for key, value in options.items()}
    changes |= {"compression__method": "frobenius", "compression__sequential": False}
    message = refused(tmp_path, llama_job, **changes, compression__size=0.001)
    assert message.count("cannot be reached") == 1
    least = float(message.rpartition("ask for size: ")[2].partition(" ")[0])
    assert 0.001 < least < 1
    report = report_of(tmp_path, llama_job, **changes, compression__size=least)
    assert report["size"]


def test_layers_that_no_data_reaches_are_named_as_the_cause(
    tmp_path: Path, plain_folder: pico.PlainFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(plain_folder.path)
    changes = plain_folder.model("with_idle") | {
        "compression.method": "frobenius",
        "compression.size": 0.7,
        "calibration.num_sequences": 40,
    }
    ended = pico.call("compress", pico.job(tmp_path, changes), "-q")
    assert ended.code == 2 and ended.err.count("cannot be reached") == 1
    assert "idle" in ended.err and "no calibration sequence reaches" in ended.err


def test_a_layer_of_size_1_stays_dense_in_a_wider_dtype(
    tmp_path: Path, llama_job: dict[str, Any]
) -> None:
    report = report_of(
        tmp_path,
        llama_job,
        output__dtype="float32",
        compression__size=1.0,
        compression__layers={"*.k_proj": {"size": 1}},
    )
    kept = [layer for layer in report["layers"] if layer["name"].endswith("k_proj")]
    assert kept and {layer["storage"] for layer in kept} == {"dense"}
    assert not any(layer["fallback"] for layer in kept)


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_overrides_that_spoil_the_size_are_refused(
    tmp_path: Path, llama_job: dict[str, Any], allocation: str
) -> None:
    message = refused(
        tmp_path,
        llama_job,
        compression__size=0.1,
        compression__allocation=allocation,
        compression__layers={ALL: {"size": 0.6}},
    )
    assert "cannot be reached" in message


def test_an_impossible_rank_is_refused_before_any_pass(
    tmp_path: Path, llama_job: dict[str, Any]
) -> None:
    message = refused(tmp_path, llama_job, compression__layers={ALL: {"rank": 63}})
    assert "rank 63" in message


def test_forced_ranks_that_spoil_the_loss_are_refused(
    tmp_path: Path, llama_job: dict[str, Any]
) -> None:
    with pytest.raises(InputError, match="already miss it"):
        report_of(
            tmp_path,
            llama_job,
            compression__size=None,
            compression__max_loss_increase=1e-9,
            compression__allocation="relative",
            compression__layers={ALL: {"rank": 8}},
        )


def test_a_forced_rank_is_the_rank_that_is_stored(
    tmp_path: Path, llama_job: dict[str, Any]
) -> None:
    report = report_of(
        tmp_path, llama_job, compression__layers={"*.q_proj": {"rank": 13, "storage": "factors"}}
    )
    ranks = {x["rank"] for x in report["layers"] if x["name"].endswith("q_proj")}
    assert ranks == {13}
    assert report["target"]["met"] is True


def test_an_evaluation_text_may_not_take_a_section_s_name(
    tmp_path: Path, llama_job: dict[str, Any], checkpoint: Models, text: Path
) -> None:
    evaluation = [{"name": "calibration", "path": str(text)}]
    assert "rename it" in refused(tmp_path, llama_job, evaluation=evaluation)
