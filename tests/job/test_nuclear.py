"""These tests compress with method nuclear: by size, by error, by the threshold itself."""

from pathlib import Path
from typing import Any

import pico
import pytest

from lrc_cli.config import load_config
from lrc_cli.errors import InputError
from lrc_cli.job.run import compress
from lrc_cli.runtime.progress import Progress

NUCLEAR = {"compression.method": "nuclear", "evaluation": [], "output.dtype": "float32"}
THRESHOLD = {**NUCLEAR, "compression.size": None, "compression.storage": "factors"}


def factorised(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [layer for layer in report["layers"] if layer["storage"] != "dense"]


def refused(directory: Path, changes: dict[str, Any]) -> str:
    with pytest.raises(InputError) as caught:
        compress(load_config(pico.job(directory, changes)), progress=Progress(quiet=True))
    assert not list(directory.rglob("statistics"))
    return str(caught.value)


@pytest.fixture(scope="module")
def by_size(tmp_path_factory: pytest.TempPathFactory, checkpoint: Any, text: Path) -> Any:
    job = {"model.path": str(checkpoint("llama")), "calibration.path": str(text), **NUCLEAR}
    return pico.compressed(tmp_path_factory.mktemp("size"), job)


def test_by_size_the_budget_holds_and_the_programme_is_solved(by_size: Any) -> None:
    _, report = by_size
    assert report["target"]["met"] and report["size"]["kept_compressible"] <= 0.6
    layers = factorised(report)
    assert layers
    for layer in layers:
        metric = layer["errors"]["metric"]
        assert "nuclear norm" in metric["unit"]
        assert metric["optimum"] <= metric["stored"] < metric["optimum"] * (1 + 1e-4)
        assert metric["svd"] > metric["stored"]
        assert 0 < layer["threshold_share"] < 1
        # Nuclear shrinks what it keeps, so its plain error is above the least error of the rank.
        assert layer["errors"]["output"]["stored"] > layer["errors"]["output"]["optimum"]


def test_the_page_says_what_was_minimised(by_size: Any) -> None:
    output, report = by_size
    page = (output / "report.html").read_text()
    assert "nuclear norm of the outputs" in page
    shares = [layer["threshold_share"] for layer in factorised(report)]
    assert f"Thresholds l: {min(shares):.3g} to {max(shares):.3g} of the largest" in page


def test_the_stored_weights_shrink_the_outputs(
    by_size: Any, llama_job: dict[str, Any], tmp_path: Path
) -> None:
    """At the same ranks frobenius keeps more of every layer's weight."""
    output, report = by_size
    ranks = {x["name"]: {"rank": x["rank"], "storage": x["storage"]} for x in factorised(report)}
    changes = {**llama_job, **NUCLEAR, "compression.method": "frobenius"}
    others, _ = pico.compressed(tmp_path, {**changes, "compression.layers": ranks})
    shrunk, plain = (pico.rebuilt(pico.read_state(path)) for path in (output, others))
    for name in ranks:
        key = f"{name}.weight"
        assert shrunk[key].norm() < plain[key].norm()


def test_by_error_every_layer_keeps_the_bound(llama_job: dict[str, Any], tmp_path: Path) -> None:
    changes = {**llama_job, **NUCLEAR, "compression.max_layer_error": 0.5}
    _, report = pico.compressed(tmp_path, changes)
    layers = factorised(report)
    assert report["target"]["met"] and layers
    assert all(layer["errors"]["output"]["stored"] <= 0.5 for layer in layers)


def test_by_threshold_every_layer_cuts_at_the_same_share(
    llama_job: dict[str, Any], tmp_path: Path
) -> None:
    changes = {**llama_job, **THRESHOLD, "compression.threshold": 0.5}
    _, high = pico.compressed(tmp_path, changes)
    changes |= {"compression.threshold": 0.25, "output.path": str(tmp_path / "low")}
    _, low = pico.compressed(tmp_path, changes)
    ranks = {layer["name"]: layer["rank"] for layer in factorised(high)}
    for report, share in ((high, 0.5), (low, 0.25)):
        assert report["target"] == {"name": "threshold", "value": share, "of": None, "met": True}
        for layer in factorised(report):
            assert layer["threshold_share"] == pytest.approx(share, rel=1e-9)
            assert layer["bytes_after"] < layer["bytes_before"] * 2  # from bfloat16 to float32
    assert len(ranks) == len(high["layers"])
    assert all(x["rank"] > ranks[x["name"]] for x in factorised(low))


def test_a_threshold_too_low_to_save_bytes_leaves_the_layer_dense(
    llama_job: dict[str, Any], tmp_path: Path
) -> None:
    _, report = pico.compressed(
        tmp_path, {**llama_job, **THRESHOLD, "compression.threshold": 0.001}
    )
    assert not factorised(report)
    assert not any(layer["fallback"] for layer in report["layers"])


def test_a_forced_rank_is_the_rank_and_sets_its_own_threshold(
    llama_job: dict[str, Any], tmp_path: Path
) -> None:
    changes = {"compression.threshold": 0.5, "compression.layers": {"*.q_proj": {"rank": 13}}}
    _, report = pico.compressed(tmp_path, {**llama_job, **THRESHOLD, **changes})
    for layer in factorised(report):
        forced = layer["name"].endswith("q_proj")
        assert not forced or layer["rank"] == 13
        assert (layer["threshold_share"] == pytest.approx(0.5, rel=1e-9)) != forced


@pytest.mark.parametrize("allocation", ["global", "relative"])
def test_an_override_to_nuclear_is_relative_or_refused(
    llama_job: dict[str, Any], tmp_path: Path, allocation: str
) -> None:
    changes = {
        **llama_job,
        "evaluation": [],
        "compression.allocation": allocation,
        "compression.layers": {"*.q_proj": {"method": "nuclear"}},
    }
    if allocation == "global":
        assert "curvature and nuclear" in refused(tmp_path, changes)
        return
    _, report = pico.compressed(tmp_path, changes)
    for layer in factorised(report):
        assert layer["method"] == ("nuclear" if layer["name"].endswith("q_proj") else "curvature")
        assert ("threshold" in layer) == (layer["method"] == "nuclear")


def test_a_threshold_beside_another_method_is_refused(
    llama_job: dict[str, Any], tmp_path: Path
) -> None:
    changes = {"compression.threshold": 0.5, "compression.layers": {"*.q_proj": {"method": "svd"}}}
    message = refused(tmp_path, {**llama_job, **THRESHOLD, **changes})
    assert "compression.threshold: needs method nuclear" in message and "q_proj" in message


def test_keys_that_a_threshold_makes_idle_are_named(
    llama_job: dict[str, Any], tmp_path: Path
) -> None:
    changes = {**llama_job, **THRESHOLD, "compression.threshold": 0.5}
    ended = pico.call("compress", pico.job(tmp_path, changes))
    assert ended.code == 0 and "is not used" not in ended.err
    idle = {"allocation": "uniform", "size_of": "checkpoint", "ridge": 0.5}
    changes |= {f"compression.{key}": value for key, value in idle.items()}
    ended = pico.call("compress", pico.job(tmp_path, changes), "--force")
    assert ended.code == 0, ended.err
    for key, value in idle.items():
        assert f"compression.{key}: {value} is not used: " in ended.err


def test_with_a_free_bias_nothing_is_lost_on_calibration(
    llama_job: dict[str, Any], tmp_path: Path
) -> None:
    """The centred fit is the soft threshold of the centred outputs, at the same ranks."""
    forced = {"compression.layers": {"*": {"rank": 16}}, "compression.size": 1.0}
    both = {}
    for center in (False, True):
        changes = {"compression.center": center, "output.path": str(tmp_path / str(center))}
        _, both[center] = pico.compressed(tmp_path, {**llama_job, **NUCLEAR, **forced, **changes})
    plain, centred = (factorised(both[center]) for center in (False, True))
    assert len(plain) == len(centred) == 14
    for a, b in zip(plain, centred, strict=True):
        before, after = a["errors"]["output"]["stored"], b["errors"]["output"]["stored"]
        assert after < before
