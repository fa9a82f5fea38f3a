"""A damaged unit of the work directory is named and computed again: never other bytes."""

import json
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pico
import pytest
from pico import Models
from safetensors import safe_open
from safetensors.torch import save_file

from lrc_cli.job import run
from lrc_cli.job.statistics.sweep import Sweep
from lrc_cli.job.work import GRADIENTS, INPUTS, PARTS, WorkDirectory
from lrc_cli.runtime.files import canonical_json

pytestmark = pytest.mark.long
Damage = Callable[[Path], None]
Contents = dict[str, bytes]

CASES: dict[str, dict[str, Any]] = {
    "plain": {"compression.sequential": False},
    "sequential": {"compression.sequential": True, "calibration.num_sequences": 100},
    "curvature": {"compression.method": "curvature", "compression.sequential": False},
}


def contents(output: Path) -> Contents:
    files = [*output.glob("*.safetensors"), output / "config.json"]
    return {file.name: file.read_bytes() for file in files}


def job_in(folder: Path, checkpoint: Models, text: Path, case: str) -> Path:
    paths = {"model.path": str(checkpoint("llama")), "calibration.path": str(text)}
    return pico.job(folder, paths | {"evaluation": []} | CASES[case])


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, checkpoint: Models, text: Path
) -> Callable[[str], tuple[Path, Contents]]:
    """The work directory of an undisturbed run by case, and what the run wrote."""
    root, found = tmp_path_factory.mktemp("finished"), dict[str, tuple[Path, Contents]]()

    def of(case: str) -> tuple[Path, Contents]:
        if case not in found:
            (root / case).mkdir()
            ended = pico.call("compress", job_in(root / case, checkpoint, text, case))
            assert ended.code == 0, ended.err
            found[case] = root / case / ".lrc-work", contents(root / case / "out")
        return found[case]

    return of


# ---------------------------------------------------------------- kinds of damage


def flip(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


def header_length(file: Path) -> int:
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")


def flip_a_bit_of_a_tensor(file: Path) -> None:
    flip(file, (header_length(file) + file.stat().st_size) // 2)


def flip_the_last_bit(file: Path) -> None:
    flip(file, -1)


def flip_a_bit_of_the_facts(file: Path) -> None:
    flip(file, file.read_bytes().index(b"facts") + 12)


def flip_a_bit_of_a_checksum(file: Path) -> None:
    flip(file, file.read_bytes().index(b"checksums") + 40)


def flip_a_bit_of_a_length(file: Path) -> None:
    flip(file, 1)


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 3)


def empty(file: Path) -> None:
    file.write_bytes(b"")


def fill_with_zeros(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def rewrite_without_checksums(file: Path) -> None:
    """An earlier version wrote no checksums."""
    with safe_open(file, framework="pt") as handle:
        tensors = {key: handle.get_tensor(key).clone() for key in handle.keys()}  # noqa: SIM118
    save_file(tensors, file, metadata={"facts": "{}"})


def turn_a_tensor_over(file: Path) -> None:
    """The numbers stay and their order changes, as in a wrong permutation."""
    with safe_open(file, framework="pt") as handle:
        tensors = {key: handle.get_tensor(key).clone() for key in handle.keys()}  # noqa: SIM118
        metadata = handle.metadata()
    key = max(tensors, key=lambda key: tensors[key].numel())
    tensors[key] = tensors[key].flip(0).contiguous()
    save_file(tensors, file, metadata=metadata)


def drop_a_tensor(file: Path) -> None:
    with safe_open(file, framework="pt") as handle:
        tensors = {key: handle.get_tensor(key).clone() for key in handle.keys()}  # noqa: SIM118
        metadata = handle.metadata()
    tensors.popitem()
    save_file(tensors, file, metadata=metadata)


def put_another_unit_there(file: Path) -> None:
    other = next(x for x in sorted(file.parent.iterdir()) if x != file)
    shutil.copyfile(other, file)


def take_a_fact_away(file: Path) -> None:
    """The checksums are right, as if a stage had stored other facts."""
    with safe_open(file, framework="pt") as handle:
        tensors = {key: handle.get_tensor(key).clone() for key in handle.keys()}  # noqa: SIM118
        unit = json.loads(handle.metadata()["unit"].partition(" ")[2])
    del next(iter(unit["facts"].values()))["storage"]
    written = canonical_json(unit)
    save_file(tensors, file, metadata={"unit": f"{zlib.crc32(written.encode())} {written}"})


DAMAGES: list[Damage] = [
    flip_a_bit_of_a_tensor,
    flip_the_last_bit,
    flip_a_bit_of_the_facts,
    flip_a_bit_of_a_checksum,
    flip_a_bit_of_a_length,
    truncate,
    empty,
    fill_with_zeros,
    rewrite_without_checksums,
    turn_a_tensor_over,
    drop_a_tensor,
    put_another_unit_there,
]


def unit_of(work: Path, stage: str, number: int = 0) -> Path:
    return sorted(work.glob(f"*/{stage}/**/*.safetensors"))[number]


TABLE = [
    *(("plain", "factors", damage) for damage in DAMAGES),
    *(("plain", stage, damage) for stage in ("statistics", "spectra") for damage in DAMAGES[:6]),
    *(("sequential", "factors", damage) for damage in (DAMAGES[0], DAMAGES[9])),
    *((case, "factors", take_a_fact_away) for case in ("plain", "sequential")),
    *(("curvature", stage, DAMAGES[0]) for stage in ("statistics", "spectra", "factors")),
]


@pytest.mark.parametrize(
    ("case", "stage", "damage"), TABLE, ids=[f"{c}-{s}-{d.__name__}" for c, s, d in TABLE]
)
def test_a_damaged_unit_is_named_and_computed_again(
    case: str,
    stage: str,
    damage: Damage,
    tmp_path: Path,
    checkpoint: Models,
    text: Path,
    finished: Callable[[str], tuple[Path, Contents]],
) -> None:
    work, wanted = finished(case)
    shutil.copytree(work, tmp_path / ".lrc-work")
    file = unit_of(tmp_path / ".lrc-work", stage, 1)
    before = file.read_bytes()
    damage(file)
    assert file.read_bytes() != before
    ended = pico.call("compress", job_in(tmp_path, checkpoint, text, case), "-q")
    assert ended.code == 0 and "Traceback" not in ended.err
    assert ended.err.count(": damaged (") == 1 and f"{file}: damaged (" in ended.err
    assert "computed again" in ended.err
    assert contents(tmp_path / "out") == wanted
    assert file.read_bytes() == before
    log = next((tmp_path / ".lrc-work").glob("*/run.log")).read_text()
    assert f"{file}: damaged (" in log


# ---------------------------------------------------------------- what is on the way to statistics


def stopped(
    folder: Path, job: Path, monkeypatch: pytest.MonkeyPatch, last: Callable[[str], bool]
) -> None:
    """Runs the job until a unit of a certain stage has been stored."""
    put = WorkDirectory.put

    def put_and_stop(self: WorkDirectory, stage: str, *rest: Any) -> None:
        put(self, stage, *rest)
        if last(stage):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(WorkDirectory, "put", put_and_stop)
        patch.setattr(Sweep, "_is_due", lambda _: True)
        code = pico.call("compress", job).code
    assert code != 0 and not (folder / "out").exists()


@pytest.mark.parametrize("damage", [DAMAGES[0], DAMAGES[2], truncate, empty])
@pytest.mark.parametrize(
    ("case", "stage"), [("plain", INPUTS), ("curvature", INPUTS), ("curvature", GRADIENTS)]
)
def test_damage_on_the_way_to_the_statistics_changes_nothing(
    case: str,
    stage: str,
    damage: Damage,
    tmp_path: Path,
    checkpoint: Models,
    text: Path,
    finished: Callable[[str], tuple[Path, Contents]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, wanted = finished(case)
    job = job_in(tmp_path, checkpoint, text, case)
    stopped(tmp_path, job, monkeypatch, lambda place: place == "statistics")
    file = unit_of(tmp_path / ".lrc-work", stage)
    damage(file)
    ended = pico.call("compress", job, "-q")
    assert ended.code == 0 and f"{file}: damaged (" in ended.err, ended.err
    assert contents(tmp_path / "out") == wanted
    (work,) = (tmp_path / ".lrc-work").iterdir()
    assert not any((work / place).exists() for place in (INPUTS, GRADIENTS, PARTS))


def test_damaged_statistics_take_what_is_on_the_way_with_them(
    tmp_path: Path,
    checkpoint: Models,
    text: Path,
    finished: Callable[[str], tuple[Path, Contents]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The pass goes backwards: inputs of the unit that is gone were deleted with it."""
    _, wanted = finished("curvature")
    job = job_in(tmp_path, checkpoint, text, "curvature")
    count = iter(range(100))
    stopped(tmp_path, job, monkeypatch, lambda x: x == "statistics" and next(count) == 1)
    flip_a_bit_of_a_tensor(unit_of(tmp_path / ".lrc-work", "statistics"))
    ended = pico.call("compress", job, "-q")
    assert ended.code == 0 and ": damaged (" in ended.err
    assert contents(tmp_path / "out") == wanted


# ---------------------------------------------------------------- while a run goes on


def damage_a_copy(damage: Damage, file: Path) -> None:
    """Puts a damaged copy in the file's place: the run has mapped the pages of the file itself."""
    copy = file.with_name("copy")
    shutil.copyfile(file, copy)
    damage(copy)
    file.unlink()
    if copy.exists():
        copy.rename(file)


@pytest.mark.parametrize(
    ("moment", "stage"),
    [
        ("allocate", "statistics"),
        ("allocate", "spectra"),
        ("decide", "statistics"),
        ("write_checkpoint", "factors"),
        ("finish_output", "factors"),
    ],
)
@pytest.mark.parametrize("damage", [DAMAGES[0], DAMAGES[2], empty, Path.unlink])
def test_a_unit_that_is_damaged_while_the_run_goes_on_is_computed_again(
    moment: str,
    stage: str,
    damage: Damage,
    tmp_path: Path,
    checkpoint: Models,
    text: Path,
    finished: Callable[[str], tuple[Path, Contents]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, wanted = finished("plain")
    step, calls = getattr(run, moment), [0]

    def damaging(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == 1:
            damage_a_copy(damage, unit_of(tmp_path / ".lrc-work", stage))
        return step(*arguments)

    monkeypatch.setattr(run, moment, damaging)
    ended = pico.call("compress", job_in(tmp_path, checkpoint, text, "plain"), "-q")
    assert ended.code == 0 and "Traceback" not in ended.err
    assert contents(tmp_path / "out") == wanted
    assert not (tmp_path / "out.partial").exists()
    assert json.loads((tmp_path / "out" / "report.json").read_text())["layers"]


def test_a_disk_that_damages_every_unit_ends_the_run(
    tmp_path: Path, checkpoint: Models, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = run.write_checkpoint

    def damaging(*arguments: Any) -> Any:
        damage_a_copy(DAMAGES[0], unit_of(tmp_path / ".lrc-work", "factors"))
        return step(*arguments)

    monkeypatch.setattr(run, "write_checkpoint", damaging)
    ended = pico.call("compress", job_in(tmp_path, checkpoint, text, "plain"), "-q")
    assert ended.code == 1 and ": damaged (" in ended.err and "Traceback" not in ended.err
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
    monkeypatch.undo()
    ended = pico.call("compress", tmp_path / "job.yaml", "-q")
    assert ended.code == 0 and ": damaged (" in ended.err
