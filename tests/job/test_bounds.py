"""What lrc writes, lrc can read again; folders that are none of a checkpoint's are not walked."""

import json
import time
from pathlib import Path

import damage
import pico
import pytest
import yaml
from command_helpers import Changes, assert_one_sentence
from memory_helpers import peak_growth
from pico import Models

from lrc_cli.checkpoint import side_files
from lrc_cli.checkpoint.source import open_source
from lrc_cli.config import check_written, load_config
from lrc_cli.errors import InputError
from lrc_cli.job import inputs
from lrc_cli.verify.files.manifest import check_manifest, open_manifest
from lrc_cli.verify.statements import Findings


def with_overrides(directory: Path, count: int, length: int = 8) -> Path:
    """Writes a job with so many overrides, each with one key."""
    layers = {f"{'x' * length}{i}": {"size": 0.5} for i in range(count)}
    job = pico.job(directory, {"model.path": "m", "calibration.path": "t.txt", "gates": None})
    tree = yaml.safe_load(job.read_text())
    tree["compression"]["layers"] = layers
    job.write_text(yaml.safe_dump(tree, sort_keys=False))
    return job


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("count", "length"), [(8000, 8), (530, 900)])
def test_a_config_that_could_not_be_read_again_is_refused(
    count: int, length: int, tmp_path: Path
) -> None:
    job = with_overrides(tmp_path, count, length)
    assert job.stat().st_size < 500_000
    command = "compress" if count > 1000 else "plan"
    ended = pico.call(command, job, "-q")
    assert_one_sentence(ended, 2, f"{count:,} entries in compression.layers", "one pattern")
    assert not (tmp_path / "out").exists()


def test_a_config_that_can_be_read_again_is_taken(tmp_path: Path) -> None:
    check_written(load_config(with_overrides(tmp_path, 300)))


# ---------------------------------------------------------------- folders


@pytest.fixture
def crowded(tmp_path: Path, checkpoint: Models, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns a folder with a checkpoint and more files than a checkpoint has."""
    for module in (side_files, inputs):
        monkeypatch.setattr(module, "MOST_SIDE_FILES", 200)
    for file in checkpoint("llama").iterdir():
        (tmp_path / "home" / file.name).parent.mkdir(exist_ok=True)
        (tmp_path / "home" / file.name).write_bytes(file.read_bytes())
    for i in range(300):
        (tmp_path / "home" / f"notes{i % 3}").mkdir(exist_ok=True)
        (tmp_path / "home" / f"notes{i % 3}" / f"{i}.txt").touch()
    return tmp_path / "home"


@pytest.mark.timeout(60)
def test_a_checkpoint_in_a_crowded_folder_is_refused(
    crowded: Path, tmp_path: Path, text: Path
) -> None:
    job = pico.job(tmp_path, {"model.path": str(crowded), "calibration.path": str(text)})
    for command in (("compress", job, "-q"), ("plan", job, "-q"), ("inspect", crowded)):
        assert_one_sentence(pico.call(*command), 2, str(crowded), "more than 200 files")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("place", ["/", "/usr", "/proc"])
def test_the_roots_of_a_system_end_in_seconds(place: str, tmp_path: Path, text: Path) -> None:
    for changes in (
        {"model.path": place, "calibration.path": str(text)},
        {"model.path": str(tmp_path), "calibration.path": place},
    ):
        job = pico.job(tmp_path, changes)
        assert pico.call("compress", job, "-q").code == 2


def test_a_folder_of_few_files_is_walked_whole(crowded: Path) -> None:
    for file in (crowded / "notes0").iterdir():
        file.unlink()
    for file in (crowded / "notes1").iterdir():
        file.unlink()
    assert len(open_source(crowded).side_files()) > 100


# ---------------------------------------------------------------- manifests


def manifest_of(directory: Path, entries: int) -> int:
    """Writes a manifest with so many entries, and returns its bytes."""
    files = {f"f{i}.txt": "0" * 64 for i in range(entries)}
    text = json.dumps({"manifest_version": 1, "files": files, "tensors": {}})
    return (directory / "manifest.json").write_text(text)


@pytest.mark.timeout(60)
def test_a_manifest_of_a_million_entries_is_refused_at_once(tmp_path: Path) -> None:
    assert manifest_of(tmp_path, 10**6) > 80_000_000
    start = time.perf_counter()
    with peak_growth() as grown, pytest.raises(InputError, match="at most 64,000,000 are read"):
        open_manifest(tmp_path)
    assert time.perf_counter() - start < 5 and grown() < 1e8


@pytest.mark.timeout(120)
def test_the_largest_manifest_takes_bounded_time_and_memory(tmp_path: Path) -> None:
    assert 60_000_000 < manifest_of(tmp_path, 750_000) < 64_000_000
    findings = Findings()
    with peak_growth() as grown:
        check_manifest(tmp_path, open_manifest(tmp_path), findings)
    assert grown() < 1.5e9


@pytest.mark.timeout(60)
def test_eval_does_not_open_what_a_stranger_names(tmp_path: Path, llama_job: Changes) -> None:
    output, _ = pico.compressed(tmp_path, llama_job)
    config = (output / "lrc.yaml").read_text()
    name = llama_job["calibration.path"]
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    for place in ("/etc/passwd", "/dev/zero", "/proc", str(tmp_path / "zero.txt")):
        (output / "lrc.yaml").write_text(config.replace(str(name), place))
        damage.rewrite_manifest(output)
        ended = pico.call("eval", output, "-q")
        assert_one_sentence(ended, 2, "lrc.yaml: the data of", place, "--data")
        assert pico.call("eval", output, "--data", name, "-q").code == 0
