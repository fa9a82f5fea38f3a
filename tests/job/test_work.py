"""These tests check the work directory: whole units, one run at a time, packed Gram matrices."""

import json
from pathlib import Path

import pytest
import torch
from engine_helpers import gaussian, second_moments

from lrc_cli.errors import InputError, RunError
from lrc_cli.job.work import WorkDirectory, compress_gram, expand_gram

FIELDS = {"checkpoint": {"a": "1"}, "seed": 0, "loss": "auto"}


def test_a_unit_comes_back_as_it_was_put(tmp_path: Path) -> None:
    work = WorkDirectory(tmp_path / "deep" / "work", FIELDS)
    assert not work.has("spectra", "model.layers.0") and not work.has("spectra", "")
    tensors = {"x": torch.arange(6.0).reshape(2, 3).T, "n": torch.tensor([1, 2])}
    work.put("spectra", "model.layers.0", tensors, {"dense": {"é": "why"}})
    work.put("spectra", "", {}, {"empty": True})
    again = WorkDirectory(tmp_path / "deep" / "work", FIELDS)
    assert again.has("spectra", "model.layers.0") and not again.has("statistics", "model.layers.0")
    found, facts = again.get("spectra", "model.layers.0")
    assert set(found) == set(tensors) and facts == {"dense": {"é": "why"}}
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert again.get("spectra", "") == ({}, {"empty": True})


def test_nothing_half_written_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = WorkDirectory(tmp_path, FIELDS)

    def crash(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", crash)
        work.put("spectra", "a", {"x": torch.zeros(3)}, {})
    assert not work.has("spectra", "a")
    work.put("spectra", "a", {"x": torch.ones(3)}, {})
    assert work.get("spectra", "a")[0]["x"].tolist() == [1, 1, 1]
    assert [file.name for file in (tmp_path / "spectra").iterdir()] == ["a.safetensors"]


def test_units_with_dots_do_not_collide(tmp_path: Path) -> None:
    work = WorkDirectory(tmp_path, FIELDS)
    for unit in ("layers.1", "layers.2", "layers", "layers.10"):
        work.put("spectra", unit, {}, {"unit": unit})
    for unit in ("layers.1", "layers.2", "layers", "layers.10"):
        assert work.get("spectra", unit)[1] == {"unit": unit}


def test_another_fingerprint_is_an_error_that_names_the_field(tmp_path: Path) -> None:
    with WorkDirectory(tmp_path, FIELDS):
        pass
    other = WorkDirectory(tmp_path, {**FIELDS, "seed": 1})
    with pytest.raises(InputError, match="made with another seed") as caught, other:
        pass
    assert "work_dir" in str(caught.value)
    other = WorkDirectory(tmp_path, {**FIELDS, "checkpoint": {"a": "2"}})
    with pytest.raises(InputError, match="made with another checkpoint"), other:
        pass
    with WorkDirectory(tmp_path, FIELDS):
        pass


@pytest.mark.parametrize("content", [b'{"seed": ', b"\xff\xfe"])
def test_a_damaged_fingerprint_is_named_with_the_way_out(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "fingerprint.json").write_bytes(content)
    work = WorkDirectory(tmp_path, FIELDS)
    with pytest.raises(RunError, match=rf"fingerprint\.json: damaged .*delete {tmp_path}"), work:
        pass


def test_a_fingerprint_is_written_whole_and_under_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    work = WorkDirectory(tmp_path / "work", FIELDS)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", crash)
        work.__enter__()
    assert not (tmp_path / "work" / "fingerprint.json").exists()
    other = WorkDirectory(tmp_path / "work", {**FIELDS, "seed": 1})
    with work, pytest.raises(RunError, match="another lrc run"), other:
        pass


def test_a_second_run_is_kept_out_until_the_first_ends(tmp_path: Path) -> None:
    with (
        WorkDirectory(tmp_path, FIELDS),
        pytest.raises(RunError, match="another lrc run is using it"),
        WorkDirectory(tmp_path, FIELDS),
    ):
        pass
    with WorkDirectory(tmp_path, FIELDS):
        pass


def test_a_damaged_unit_is_named_with_the_way_out(tmp_path: Path) -> None:
    work = WorkDirectory(tmp_path, FIELDS)
    work.put("spectra", "a", {"x": torch.zeros(30)}, {})
    file = tmp_path / "spectra" / "a.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(RunError, match=r"a\.safetensors: damaged .*--restart"):
        work.get("spectra", "a")


def test_restart_drops_the_stages_it_names(tmp_path: Path) -> None:
    work = WorkDirectory(tmp_path, FIELDS)
    for stage in ("statistics", "factors/one", "factors/two"):
        work.put(stage, "a", {}, {})
    work.drop(["statistics", "factors/one", "never"])
    assert not work.has("statistics", "a") and not work.has("factors/one", "a")
    assert work.has("factors/two", "a")
    with work:
        assert json.loads((tmp_path / "fingerprint.json").read_text()) == FIELDS


@pytest.mark.parametrize("size", [1, 2, 7, 32, 300])
def test_a_gram_matrix_survives_in_half_the_space(size: int) -> None:
    gram = second_moments(size, seed=size)
    triangle, scale = compress_gram(gram)
    assert triangle.nbytes == size * (size + 1) // 2 * 4
    found = expand_gram(triangle, scale, torch.device("cpu"))
    bound = 2**-23 * gram.diagonal().sqrt()
    assert (found - gram).abs().le(bound[:, None] * bound[None] * 2**23 + 1e-300).all()
    assert torch.allclose(found, found.T, rtol=1e-15, atol=0) and found.dtype == torch.float64


def test_an_outlier_channel_does_not_drown_the_others() -> None:
    scale = torch.ones(16, dtype=torch.float64)
    scale[3], scale[5] = 1e6, 0.0
    gram = scale[:, None] * second_moments(16, seed=1) * scale
    found = expand_gram(*compress_gram(gram), torch.device("cpu"))
    assert torch.equal(found[5], torch.zeros(16, dtype=torch.float64))
    others = [i for i in range(16) if i not in (3, 5)]
    wanted = gram[others][:, others]
    direction = gaussian(14, seed=3)
    assert direction @ found[others][:, others] @ direction == pytest.approx(
        (direction @ wanted @ direction).item(), rel=1e-5
    )
