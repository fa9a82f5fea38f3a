"""A run whose inputs change under it ends with exit 1, names the file and publishes nothing."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import media_helpers
import pico
import pytest
from pico import Models, PlainFolder
from process_helpers import start_many
from safetensors.torch import load_file, save_file

from lrc_cli.job import run
from lrc_cli.job.work import STATISTICS, WorkDirectory

pytestmark = pytest.mark.long
Change = Callable[[Path], None]
Contents = dict[str, bytes]


def contents(output: Path) -> Contents:
    files = [*output.glob("*.safetensors"), output / "config.json"]
    return {file.name: file.read_bytes() for file in files}


# ---------------------------------------------------------------- what may happen to a file


def change_a_byte(file: Path) -> None:
    """The size and the inode stay."""
    with file.open("r+b") as handle:
        handle.seek(-2, os.SEEK_END)
        (byte,) = handle.read(1)
        handle.seek(-2, os.SEEK_END)
        handle.write(bytes([byte ^ 1]))


def grow(file: Path) -> None:
    with file.open("ab") as handle:
        handle.write(b"\n")


def truncate(file: Path) -> None:
    """Less than a page goes: the system kills a process that reads a mapped page which is gone."""
    os.truncate(file, file.stat().st_size - 3)


def replace(file: Path) -> None:
    other = file.with_name("other")
    other.write_bytes(file.read_bytes()[::-1])
    other.replace(file)


def replace_by_an_equal_copy(file: Path) -> None:
    other = file.with_name("other")
    shutil.copyfile(file, other)
    other.replace(file)


def write_the_same_bytes(file: Path) -> None:
    """Nobody can tell what the file held in between."""
    file.write_bytes(file.read_bytes())


def change_a_byte_and_the_time_back(file: Path) -> None:
    """Size, inode and time of change stay."""
    times = file.stat()
    change_a_byte(file)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def touch(file: Path) -> None:
    file.touch()


def delete(file: Path) -> None:
    file.unlink()


def add(file: Path) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text("new")


WORDS: dict[Change, str] = {
    change_a_byte: "was written to",
    grow: "was changed from",
    truncate: "was changed from",
    replace: "was replaced",
    replace_by_an_equal_copy: "was replaced",
    write_the_same_bytes: "was written to",
    touch: "was written to",
    change_a_byte_and_the_time_back: "was written to, and its time was set back",
    delete: "was deleted",
    add: "appeared",
}

# ---------------------------------------------------------------- moments


def at_a_step(name: str, act: Callable[[], None], patch: pytest.MonkeyPatch) -> None:
    """Acts once, before the run's step `name`."""
    step, calls = getattr(run, name), [0]

    def acting(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == 1:
            act()
        return step(*arguments, **options)

    patch.setattr(run, name, acting)


def after_everything(act: Callable[[], None], patch: pytest.MonkeyPatch) -> None:
    """Acts once the output is written and has yet to be published."""
    finish = run.finish_output

    def acting(*arguments: Any) -> Any:
        report = finish(*arguments)
        act()
        return report

    patch.setattr(run, "finish_output", acting)


def before_a_unit(number: int, act: Callable[[], None], patch: pytest.MonkeyPatch) -> None:
    """Acts before the unit with this number of the statistics is stored."""
    put, calls = WorkDirectory.put, [0]

    def acting(self: WorkDirectory, stage: str, *rest: Any) -> None:
        if stage == STATISTICS:
            calls[0] += 1
            if calls[0] == number:
                act()
        put(self, stage, *rest)

    patch.setattr(WorkDirectory, "put", acting)


MOMENTS: dict[str, Callable[[Callable[[], None], pytest.MonkeyPatch], None]] = {
    "before the statistics": lambda act, patch: at_a_step("run_shared_stages", act, patch),
    "in the statistics": lambda act, patch: before_a_unit(2, act, patch),
    "before the factors": lambda act, patch: at_a_step("allocate", act, patch),
    "before writing": lambda act, patch: at_a_step("write_checkpoint", act, patch),
    "before measuring": lambda act, patch: at_a_step("finish_output", act, patch),
    "before publishing": after_everything,
}


def assert_refused(ended: pico.Ended, folder: Path, file: Path, change: Change) -> None:
    assert ended.code == 1, ended.err
    assert f"error: {file} {WORDS[change]}" in ended.err and "Traceback" not in ended.err
    assert "no output was written" in ended.err and "run the same command again" in ended.err
    assert not (folder / "out").exists() and not (folder / "out.partial").exists()
    assert not (folder / "out.lrc-lock").exists()


# ---------------------------------------------------------------- transformers directories


def sharded(model: Path) -> None:
    """Splits model.safetensors into two shards with an index."""
    tensors = load_file(model / "model.safetensors")
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for number, some in enumerate((names[::2], names[1::2]), start=1):
        shard = f"model-0000{number}-of-00002.safetensors"
        part = {name: tensors[name] for name in some}
        save_file(part, model / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(some, shard)
    (model / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": weight_map}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture
def job(tmp_path: Path, checkpoint: Models, text: Path) -> Path:
    """A job on files of its own: shards, side files, one text a purpose."""
    model = tmp_path / "model"
    shutil.copytree(checkpoint("llama"), model)
    sharded(model)
    (model / "LICENSE").write_text("All of it.\n")
    (model / "notes").mkdir()
    (model / "notes" / "use.txt").write_text("As you like.\n")
    for name in ("fit", "judge"):
        shutil.copyfile(text, tmp_path / f"{name}.txt")
    return pico.job(
        tmp_path,
        {
            "model.path": str(model),
            "calibration.path": str(tmp_path / "fit.txt"),
            "evaluation": [
                {"name": "judge", "path": str(tmp_path / "judge.txt"), "num_sequences": 4}
            ],
        },
    )


SHARD = "model/model-00002-of-00002.safetensors"
TABLE: list[tuple[str, Change, str]] = [
    *((SHARD, x, "before publishing") for x in WORDS if x is not add),
    *((SHARD, change_a_byte, moment) for moment in MOMENTS),
    *((SHARD, x, "in the statistics") for x in (truncate, delete, replace)),
    *(
        (file, change, "before publishing")
        for file in ("model/config.json", "model/LICENSE", "fit.txt", "judge.txt")
        for change in (change_a_byte, touch, delete)
    ),
    *(
        (file, change_a_byte_and_the_time_back, moment)
        for file in ("model/config.json", "model/LICENSE", "fit.txt", "judge.txt")
        for moment in ("before the factors", "before publishing")
    ),
    (SHARD, change_a_byte_and_the_time_back, "before the statistics"),
    ("model/model.safetensors.index.json", grow, "before factors"),
    ("model/tokenizer.json", grow, "before the statistics"),
    ("model/notes/use.txt", replace, "before writing"),
    ("model/config.json", replace, "before measuring"),
    ("model/LICENSE", grow, "before writing"),
    *(("fit.txt", x, "in the statistics") for x in (grow, truncate, replace)),
    ("judge.txt", grow, "before measuring"),
    *(("model/added.txt", add, moment) for moment in MOMENTS),
    ("model/deeper/added.txt", add, "before writing"),
]
TABLE = [(f, c, "before the factors" if m == "before factors" else m) for f, c, m in TABLE]


@pytest.mark.parametrize(
    ("name", "change", "moment"), TABLE, ids=[f"{f}-{c.__name__}-{m}" for f, c, m in TABLE]
)
def test_a_change_is_named_and_nothing_is_published(
    name: str, change: Change, moment: str, job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = job.parent
    MOMENTS[moment](lambda: change(folder / name), monkeypatch)
    ended = pico.call("compress", job, "-q")
    assert_refused(ended, folder, folder / name, change)


def other_mode(file: Path) -> None:
    file.chmod(0o600)


def second_name(file: Path) -> None:
    """A backup of hard links does this."""
    (file.parents[1] / f"backup-{file.name}").hardlink_to(file)


@pytest.mark.parametrize("change", [other_mode, second_name])
def test_another_mode_or_name_is_no_change(
    change: Change, job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (SHARD, "model/LICENSE", "model/config.json"):
        after_everything(lambda name=name: change(job.parent / name), monkeypatch)  # type: ignore[misc]
    ended = pico.call("compress", job, "-q")
    assert ended.code == 0, ended.err


@pytest.mark.parametrize("stage", ["statistics", "spectra", "factors"])
def test_weights_that_were_emptied_are_not_read_at_the_start_of_a_stage(
    stage: str, job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system kills a process that reads a mapped page which is gone."""
    shard, run_stage = job.parent / SHARD, run.run_stage

    def emptying(stage_of_run: Any, *rest: Any) -> Any:
        if stage_of_run.name == stage:
            os.truncate(shard, 0)
        return run_stage(stage_of_run, *rest)

    monkeypatch.setattr(run, "run_stage", emptying)
    ended = pico.call("compress", job, "-q")
    assert_refused(ended, job.parent, shard, truncate)


@pytest.mark.parametrize("moment", ["before the statistics", "in the statistics"])
def test_what_was_computed_on_changed_weights_is_not_used_again(
    moment: str, job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user puts the old weights back: the same command must not find units of the others."""
    folder = job.parent
    shard = folder / SHARD
    old = shard.read_bytes()

    def change() -> None:
        tensors = load_file(shard)
        data = bytearray(old)
        start = len(old) - sum(x.nbytes for x in tensors.values())
        data[start:] = bytes(len(old) - start)
        with shard.open("r+b") as handle:
            handle.write(data)

    with monkeypatch.context() as patch:
        MOMENTS[moment](change, patch)
        ended = pico.call("compress", job, "-q")
    assert_refused(ended, folder, shard, change_a_byte)
    assert len(list(folder.glob(".lrc-work/*/statistics/*"))) == (moment == "in the statistics")
    shard.write_bytes(old)
    assert pico.call("compress", job, "-q").code == 0
    found = contents(folder / "out")
    ended = pico.call("compress", job, "-q", "--force", "--restart")
    assert ended.code == 0 and contents(folder / "out") == found


def test_after_a_change_the_same_command_compresses_what_is_there_now(
    job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = job.parent
    with monkeypatch.context() as patch:
        after_everything(lambda: grow(folder / "model" / "LICENSE"), patch)
        assert pico.call("compress", job, "-q").code == 1
    ended = pico.call("compress", job, "-q")
    assert ended.code == 0, ended.err
    assert (folder / "out" / "LICENSE").read_text() == "All of it.\n\n"


def test_an_old_output_stays(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = job.parent
    assert pico.call("compress", job, "-q").code == 0
    report = (folder / "out" / "report.json").read_bytes()
    after_everything(lambda: grow(folder / "fit.txt"), monkeypatch)
    ended = pico.call("compress", job, "-q", "--force")
    assert ended.code == 1 and f"{folder / 'fit.txt'} was changed" in ended.err
    assert (folder / "out" / "report.json").read_bytes() == report
    assert not (folder / "out.partial").exists()


def test_every_size_is_checked_before_it_is_published(
    job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, calls = job.parent, [0]
    finish = run.finish_output

    def changing(*arguments: Any) -> Any:
        report = finish(*arguments)
        calls[0] += 1
        if calls[0] == 2:
            touch(folder / "fit.txt")
        return report

    monkeypatch.setattr(run, "finish_output", changing)
    ended = pico.call("compress", job, "-q", "--sizes", "0.9,0.8,0.7")
    assert ended.code == 1 and f"{folder / 'fit.txt'} was written to" in ended.err
    assert (folder / "out-0.9" / "report.json").exists()
    assert not (folder / "out-0.8").exists() and not (folder / "out-0.7").exists()


def test_a_changed_config_is_said_and_the_run_keeps_the_one_it_read(
    job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    after_everything(lambda: job.write_text("compression: {size: 0.1}\n"), monkeypatch)
    ended = pico.call("compress", job)
    assert ended.code == 0
    assert f"{job}: changed meanwhile; this run used what it said at first" in ended.err
    assert "size: 0.6" in (job.parent / "out" / "lrc.yaml").read_text()


@pytest.mark.parametrize("harmless", ["model/.hidden", "model/__pycache__/x.pyc", "beside.txt"])
def test_what_the_run_does_not_read_again_may_change(
    harmless: str, job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = job.parent
    after_everything(lambda: add(folder / harmless), monkeypatch)
    ended = pico.call("compress", job, "-q")
    assert ended.code == 0, ended.err
    assert not (folder / "out" / ".hidden").exists()


def test_a_failure_is_put_down_to_the_change_that_led_to_it(
    job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights of NaN make the network's outputs NaN, which is no fault of the network."""
    folder = job.parent
    shard = folder / SHARD

    def change() -> None:
        size = shard.stat().st_size
        with shard.open("r+b") as handle:
            handle.seek(size // 2)
            handle.write(b"\xff" * (size - size // 2))

    MOMENTS["before the statistics"](change, monkeypatch)
    ended = pico.call("compress", job, "-q")
    assert_refused(ended, folder, shard, change_a_byte)


# ---------------------------------------------------------------- factories, tensors, folders


@pytest.mark.parametrize("change", [change_a_byte, touch, replace, delete])
@pytest.mark.parametrize("name", ["mlp.safetensors", "rows.safetensors", "pico_factories.py"])
def test_files_of_a_module_of_ones_own(
    name: str,
    change: Change,
    tmp_path: Path,
    plain_folder: PlainFolder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "plain"
    shutil.copytree(plain_folder.path, folder)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "pico_factories", raising=False)
    job = pico.job(tmp_path, PlainFolder(path=folder).model("mlp"))
    after_everything(lambda: change(folder / name), monkeypatch)
    ended = pico.call("compress", job, "-q")
    assert_refused(ended, tmp_path, folder / name, change)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("0.wav", change_a_byte),
        ("0.wav", delete),
        ("0.wav", touch),
        ("added.wav", add),
        ("added.txt", add),
        ("deeper/added.wav", add),
    ],
)
def test_files_of_a_data_folder(
    name: str, change: Change, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = media_helpers.write_model(tmp_path / "model", "whisper")
    folder = media_helpers.write_recordings(tmp_path / "speech", 12, transcripts=True)
    first = sorted(folder.glob("*.wav"))[0]
    file = first if name == "0.wav" else folder / name
    changes = {
        "model.path": str(model),
        "calibration.path": str(folder),
        "calibration.num_sequences": 6,
        "evaluation": [],
    }
    after_everything(lambda: change(file), monkeypatch)
    ended = pico.call("compress", pico.job(tmp_path, changes), "-q")
    assert_refused(ended, tmp_path, file, change)


# ---------------------------------------------------------------- several processes


@pytest.mark.parametrize("name", ["fit.txt", "model/model.safetensors"])
def test_all_processes_end_and_one_of_them_names_the_file(
    name: str, tmp_path: Path, checkpoint: Models, text: Path
) -> None:
    shutil.copytree(checkpoint("llama-long"), tmp_path / "model")
    shutil.copyfile(text, tmp_path / "fit.txt")
    changes = {
        "model.path": str(tmp_path / "model"),
        "calibration.path": str(tmp_path / "fit.txt"),
        "evaluation": [],
    }
    running = start_many(["compress", pico.job(tmp_path, changes)], tmp_path, 2)
    running[0].wait_until(lambda: any(tmp_path.glob(".lrc-work/*/statistics/*.safetensors")))
    touch(tmp_path / name)
    assert [each.wait() for each in running] == [1, 1]
    said = [each.err.count(f"error: {tmp_path / name} was written to") for each in running]
    assert sum(said) == 1 and not any("Traceback" in each.err for each in running)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
