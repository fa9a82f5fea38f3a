"""A table of places that lrc must not write, replace or delete: each is refused before any work.

Every case runs in a folder with a checkpoint (`model`), data (`text.txt`, `pictures/`) and a config
(`job.yaml`). The whole folder is hashed before and after.
"""

import json
import os
import shutil
import socket
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pico
import pytest
from command_helpers import Changes, assert_one_sentence, seen

from lrc_cli.checkpoint.manifest import PARTIAL_MARK

Maker = Callable[[Path], None]
LONG = "n" * 300
NEARLY_LONG = "n" * 250
"""A name that the file system takes, until lrc adds an ending."""
WEB_APP = '{"name": "app", "start_url": "/"}'
FINGERPRINT = json.dumps({"checkpoint": {}, "calibration data": "", "lrc version": "0"})
"""What shows that a work directory is lrc's."""
HASHES = {"lrc.yaml": "0" * 64, "report.json": "0" * 64}
OWN_MANIFEST = json.dumps({"manifest_version": 1, "files": HASHES, "tensors": {}})
"""What shows that an output is lrc's."""
OWN_OUTPUT: Mapping[str, str | Maker] = {
    "mine/manifest.json": OWN_MANIFEST,
    "mine/lrc.yaml": "",
    "mine/report.json": "",
}
PYTEST_XML = '<?xml version="1.0" encoding="utf-8"?>\n<testsuites><testsuite name="pytest"/>'


def link(target: str) -> Maker:
    return lambda path: path.symlink_to(target)


def hard_link(target: str) -> Maker:
    return lambda path: path.hardlink_to(path.parents[1] / target)


def moved_with_a_link(target: str) -> Maker:
    """Moves a file of the checkpoint elsewhere in the job's folder, and leaves a link."""

    def move(path: Path) -> None:
        place = path.parents[1] / target
        path.rename(place)
        path.symlink_to(place)

    return move


def pipe(path: Path) -> None:
    os.mkfifo(path)


def bound_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(os.path.relpath(path))


def folder(path: Path) -> None:
    path.mkdir()


@dataclass(frozen=True, kw_only=True)
class Case:
    """A place that is refused, and what the message must say."""

    said: str
    """The culprit, as the message names it."""
    output: str = "out"
    work: str | None = None
    junit: str | None = None
    made: Mapping[str, str | Maker] = field(default_factory=dict)
    """What lies in the folder before: the content of a file, or a function that makes something."""
    changes: Changes = field(default_factory=dict)
    options: tuple[str, ...] = ()


OUTPUTS = {
    "the checkpoint": Case(output="model", said="is the checkpoint itself"),
    "in the checkpoint": Case(output="model/out", said="lie in one another"),
    "around the checkpoint": Case(output=".", said="lie in one another"),
    "dots into the checkpoint": Case(output="x/../model/out", said="lie in one another"),
    "a link into the checkpoint": Case(
        output="link/out", made={"link": link("model")}, said="lie in one another"
    ),
    "a link to the checkpoint": Case(
        output="link", made={"link": link("model")}, said="is the checkpoint itself"
    ),
    "the checkpoint is the partial output": Case(
        output="copy",
        made={"copy.partial": link("model")},
        changes={"model.path": "copy.partial"},
        said="copy.partial",
    ),
    "the checkpoint is the old output": Case(
        output="net",
        made={"net.lrc-old": folder, "net.lrc-old/model.safetensors": "x"},
        changes={"model.path": "net.lrc-old"},
        said="net.lrc-old is the checkpoint itself",
    ),
    "the checkpoint is one file": Case(
        output="model/model.safetensors",
        changes={"model.path": "model/model.safetensors"},
        said="is the checkpoint itself",
    ),
    "below the checkpoint's file": Case(
        output="model/model.safetensors/out",
        changes={"model.path": "model/model.safetensors"},
        said="lie in one another",
    ),
    "the config": Case(output="job.yaml", said="is the config itself"),
    "below the config": Case(output="job.yaml/out", said="lie in one another"),
    "the data": Case(output="text.txt", said="is the data of calibration.path itself"),
    "below the data": Case(output="text.txt/out", said="the data of calibration.path"),
    "in a folder of data": Case(
        output="pictures/out",
        changes={"calibration.path": "pictures"},
        said="the data of calibration.path",
    ),
    "around the data": Case(
        output="site",
        made={"site/text.txt": "words"},
        changes={"calibration.path": "site/text.txt"},
        said="the data of calibration.path",
    ),
    "the data of an evaluation": Case(
        output="other.txt",
        made={"other.txt": "words"},
        changes={"evaluation": [{"name": "held", "path": "other.txt"}]},
        said="the data of evaluation.0.path itself",
    ),
    "the data of the certification": Case(
        output="other.txt",
        made={"other.txt": "words"},
        changes={"certification.path": "other.txt"},
        said="the data of certification.path itself",
    ),
    "data in the partial output": Case(
        made={"out.partial/text.txt": "words", f"out.partial/{PARTIAL_MARK}": ""},
        changes={"calibration.path": "out.partial/text.txt"},
        said="the data of calibration.path",
    ),
    "a web application": Case(
        output="site",
        made={"site/manifest.json": WEB_APP, "site/index.html": "hello"},
        said="site: the output exists and was not written by lrc",
    ),
    "an empty manifest": Case(
        output="site", made={"site/manifest.json": "{}"}, said="was not written by lrc"
    ),
    "a manifest that is a pipe": Case(
        output="site", made={"site": folder, "site/manifest.json": pipe}, said="not written by lrc"
    ),
    "a manifest that is a folder": Case(
        output="site", made={"site/manifest.json/x": "x"}, said="was not written by lrc"
    ),
    "a manifest that is a link": Case(
        output="site",
        made={"own": OWN_MANIFEST, "site": folder, "site/manifest.json": link("../own")},
        said="was not written by lrc",
    ),
    "a folder with nothing of lrc's": Case(
        output="mine", made={"mine/thesis.txt": "years"}, said="was not written by lrc"
    ),
    "an empty folder": Case(output="mine", made={"mine": folder}, said="was not written by lrc"),
    "an output with a user's file": Case(
        made={"out/manifest.json": OWN_MANIFEST, "out/notes/today.txt": "mine"},
        said="would delete notes/today.txt, which lrc did not write",
    ),
    "an output with a user's link": Case(
        made={"out/manifest.json": OWN_MANIFEST, "out/data": link("../text.txt")},
        said="would delete data, which lrc did not write",
    ),
    "a file": Case(output="file", made={"file": "x"}, said="exists and is a file"),
    "a pipe": Case(output="pipe", made={"pipe": pipe}, said="exists and is a pipe"),
    "a socket": Case(output="door", made={"door": bound_socket}, said="exists and is a socket"),
    "a device": Case(output="/dev/null", said="/dev/null exists and is a device"),
    "below a device": Case(output="/dev/null/out", said="is not a writable directory"),
    "a link to nothing": Case(output="gone", made={"gone": link("nowhere")}, said="to nothing"),
    "a link to itself": Case(output="loop", made={"loop": link("loop")}, said="loop"),
    "below a link to itself": Case(output="loop/out", made={"loop": link("loop")}, said="loop/out"),
    "around the file of a link of the checkpoint": Case(
        output="mine",
        made={**OWN_OUTPUT, "mine/LICENSE": "mine", "model/TERMS": link("../mine/LICENSE")},
        said="mine and the checkpoint",
    ),
    "around the only weights, to which the checkpoint has a link": Case(
        output="mine",
        made={**OWN_OUTPUT, "model/model.safetensors": moved_with_a_link("mine/weights")},
        said="mine and the checkpoint",
    ),
    "around the file of a link in the data": Case(
        output="mine",
        made={**OWN_OUTPUT, "mine/a.png": "x", "pictures/b.png": link("../mine/a.png")},
        changes={"calibration.path": "pictures"},
        said="mine and the data of calibration.path",
    ),
    "a name that is too long": Case(output=LONG, said="output.path: nnn"),
    "a name too long with an ending": Case(output=NEARLY_LONG, said="File name too long"),
    "a path that is too long": Case(output="d/" * 2500 + "out", said="File name too long"),
    "a null character": Case(output="o\0ut", said="o\\0ut cannot be used"),
    "a name that is not UTF-8": Case(output="o\udcff", said="o\\xff cannot be used"),
    "the root": Case(output="/", said="'/' is not a directory to write"),
    "a stranger's partial folder": Case(made={"out.partial/mine": "x"}, said="out.partial, and"),
    "a stranger's partial file": Case(made={"out.partial": "x"}, said="out.partial, and"),
    "a partial folder that is a link": Case(
        made={"out.partial": link("pictures")}, said="out.partial, and what lies there (a link)"
    ),
    "a partial link to nothing": Case(
        made={"out.partial": link("nowhere")}, said="out.partial, and what lies there (a link)"
    ),
    "a partial pipe": Case(made={"out.partial": pipe}, said="lies there (a pipe)"),
    "a partial name of a whole output": Case(
        made={"out.partial/manifest.json": OWN_MANIFEST}, said="out.partial, and"
    ),
    "a stranger's old folder": Case(made={"out.lrc-old/mine": "x"}, said="out.lrc-old, and"),
    "a stranger's old web application": Case(
        made={"out.lrc-old/manifest.json": WEB_APP}, said="out.lrc-old, and"
    ),
    "a stranger's old file": Case(made={"out.lrc-old": "x"}, said="out.lrc-old, and"),
    "an old output that is a link": Case(
        made={"kept/manifest.json": OWN_MANIFEST, "out.lrc-old": link("kept")},
        said="out.lrc-old, and what lies there (a link)",
    ),
    "a stranger's lock": Case(made={"out.lrc-lock": "mine"}, said="out.lrc-lock, and"),
    "a lock that is a pipe": Case(made={"out.lrc-lock": pipe}, said="out.lrc-lock is a pipe"),
    "a lock that is a link": Case(
        made={"empty": "", "out.lrc-lock": link("empty")}, said="out.lrc-lock is a link"
    ),
    "a lock that is a link to the data": Case(
        made={"out.lrc-lock": link("text.txt")}, said="is the data of calibration.path itself"
    ),
    "a lock that is a folder": Case(made={"out.lrc-lock": folder}, said="lrc-lock is a directory"),
    "two sizes in one folder": Case(
        options=("--sizes", "0.6,0.5"),
        made={"out-0.5": link("out-0.6"), "out-0.6/manifest.json": OWN_MANIFEST},
        said="out-0.6 is another output itself",
    ),
    "a second size in the first": Case(
        options=("--sizes", "0.6,0.5"),
        made={"out-0.6/x/manifest.json": OWN_MANIFEST, "out-0.5": link("out-0.6/x")},
        said="lie in one another",
    ),
    "a second size that is a stranger's": Case(
        options=("--sizes", "0.6,0.5"),
        made={"out-0.5/manifest.json": WEB_APP},
        said="out-0.5: the output exists and was not written by lrc",
    ),
    "a second size with a stranger's partial": Case(
        options=("--sizes", "0.6,0.5"),
        made={"out-0.5.partial/mine": "x"},
        said="out-0.5.partial, and",
    ),
}
"""Outputs, tried with --force and --restart, and by `lrc plan`."""

WORK_DIRECTORIES = {
    "the checkpoint": Case(work="model", said="is the checkpoint itself"),
    "in the checkpoint": Case(work="model/work", said="lie in one another"),
    "dots into the checkpoint": Case(work="x/../model/work", said="lie in one another"),
    "a link to the checkpoint": Case(
        work="link", made={"link": link("model")}, said="is the checkpoint itself"
    ),
    "a link into the checkpoint": Case(
        work="link/a/b", made={"link": link("model")}, said="lie in one another"
    ),
    "a hidden one that is a link": Case(
        made={".lrc-work": link("model")}, said="is the checkpoint itself"
    ),
    "a hidden one that is a file": Case(made={".lrc-work": "x"}, said="not a writable directory"),
    "a hidden one that is the output": Case(output=".lrc-work", said="is the output itself"),
    "the output": Case(work="out", said="is the output itself"),
    "in the output": Case(work="out/work", said="lie in one another"),
    "the partial output": Case(work="out.partial", said="is the output itself"),
    "in the partial output": Case(work="out.partial/work", said="lie in one another"),
    "the old output": Case(work="out.lrc-old", said="is the output itself"),
    "the output's lock": Case(work="out.lrc-lock", said="is the output itself"),
    "the output in a stage": Case(work="work", output="work/statistics", said="the output"),
    "the output below a stage": Case(work="work", output="work/factors/a", said="the output"),
    "the output as its log": Case(work="work", output="work/run.log", said="the output"),
    "the data in a stage": Case(
        work="work",
        made={"work/fingerprint.json": FINGERPRINT, "work/inputs/text.txt": "words"},
        changes={"calibration.path": "work/inputs/text.txt"},
        said="the data of calibration.path",
    ),
    "the checkpoint in a stage": Case(
        work="work",
        made={"work/fingerprint.json": FINGERPRINT, "work/parts/config.json": "{}"},
        changes={"model.path": "work/parts"},
        said="the checkpoint",
    ),
    "in a second output": Case(
        work="out-0.5/work", options=("--sizes", "0.6,0.5"), said="lie in one another"
    ),
    "the config": Case(work="job.yaml", said="is the config itself"),
    "below the config": Case(work="job.yaml/work", said="lie in one another"),
    "the data": Case(work="text.txt", said="is the data of calibration.path itself"),
    "in a folder of data": Case(
        work="pictures/work",
        changes={"calibration.path": "pictures"},
        said="the data of calibration.path",
    ),
    "a stranger's statistics": Case(
        work="mine", made={"mine/statistics/a.csv": "1,2"}, said="mine/statistics was not made"
    ),
    "a stranger's factors": Case(
        work="mine", made={"mine/factors/a.csv": "1,2"}, said="mine/factors was not made by lrc"
    ),
    "a stranger's inputs": Case(
        work="mine", made={"mine/inputs/a.csv": "1,2"}, said="mine/inputs was not made by lrc"
    ),
    "a stranger's fingerprint": Case(
        work="mine", made={"mine/fingerprint.json": '{"thumb": 1}'}, said="mine/fingerprint.json"
    ),
    "a fingerprint that is no JSON": Case(
        work="mine", made={"mine/fingerprint.json": "thumb"}, said="mine/fingerprint.json"
    ),
    "a fingerprint that is a list": Case(
        work="mine", made={"mine/fingerprint.json": "[]"}, said="mine/fingerprint.json"
    ),
    "a fingerprint with a number of 5000 digits": Case(
        work="mine", made={"mine/fingerprint.json": "1" * 5000}, said="mine/fingerprint.json"
    ),
    "statistics with a stranger's fingerprint": Case(
        work="mine",
        made={"mine/fingerprint.json": '{"thumb": 1}', "mine/statistics/a.csv": "1,2"},
        said="was not made by lrc",
    ),
    "a fingerprint that is a pipe": Case(
        work="mine", made={"mine": folder, "mine/fingerprint.json": pipe}, said="is a pipe"
    ),
    "a fingerprint that is a link": Case(
        work="mine",
        made={"own": FINGERPRINT, "mine": folder, "mine/fingerprint.json": link("../own")},
        said="mine/fingerprint.json is a link",
    ),
    "a stranger's log": Case(work="mine", made={"mine/run.log": "hi"}, said="run.log was not made"),
    "a log that is a pipe": Case(
        work="work",
        made={"work/fingerprint.json": FINGERPRINT, "work/run.log": pipe},
        said="work/run.log is a pipe",
    ),
    "a log that is a link": Case(
        work="work",
        made={"work/fingerprint.json": FINGERPRINT, "work/run.log": link("../model/LICENSE")},
        said="work/run.log is a link",
    ),
    "a log that is a hard link": Case(
        work="work",
        made={"work/fingerprint.json": FINGERPRINT, "work/run.log": hard_link("model/LICENSE")},
        said="work/run.log is a hard link",
    ),
    "a lock that is a pipe": Case(
        work="mine", made={"mine": folder, "mine/lock": pipe}, said="mine/lock is a pipe"
    ),
    "a lock that is a link": Case(
        work="mine",
        made={"empty": "", "mine": folder, "mine/lock": link("../empty")},
        said="mine/lock is a link",
    ),
    "a lock that is a folder": Case(
        work="mine", made={"mine/lock/x": "x"}, said="mine/lock is a directory"
    ),
    "a stage that is a link": Case(
        work="work",
        made={"work/fingerprint.json": FINGERPRINT, "work/statistics": link("../pictures")},
        said="work/statistics is a link",
    ),
    "factors that are a link": Case(
        work="work",
        made={
            "work/fingerprint.json": FINGERPRINT,
            "work/factors": folder,
            "work/factors/0123456789abcdef": link("../../pictures"),
        },
        said="factors/0123456789abcdef is a link",
    ),
    "a file": Case(work="file", made={"file": "x"}, said="file is not a writable directory"),
    "a pipe": Case(work="pipe", made={"pipe": pipe}, said="pipe is not a writable directory"),
    "a socket": Case(work="door", made={"door": bound_socket}, said="not a writable directory"),
    "a device": Case(work="/dev/null", said="/dev/null is not a writable directory"),
    "a link to nothing": Case(work="gone", made={"gone": link("nowhere")}, said="work_dir: "),
    "a link to itself": Case(work="loop", made={"loop": link("loop")}, said="work_dir: "),
    "a name that is too long": Case(work=LONG, said="File name too long"),
}
"""Work directories, tried as the outputs are."""

JUNIT_FILES = {
    "a weight file": Case(junit="model/model.safetensors", said="the checkpoint"),
    "a new file in the checkpoint": Case(junit="model/lrc.xml", said="the checkpoint"),
    "in the checkpoint by a link": Case(
        junit="link/lrc.xml", made={"link": link("model")}, said="the checkpoint"
    ),
    "dots into the checkpoint": Case(junit="pictures/../model/lrc.xml", said="the checkpoint"),
    "the checkpoint's only file": Case(
        junit="model/model.safetensors",
        changes={"model.path": "model/model.safetensors"},
        said="is the checkpoint itself",
    ),
    "a hard link to a weight file": Case(
        junit="x/lrc.xml",
        made={"x": folder, "x/lrc.xml": hard_link("model/model.safetensors")},
        said="exists and is not a JUnit file of lrc's",
    ),
    "the config": Case(junit="job.yaml", said="is the config itself"),
    "a hard link to the config": Case(
        junit="x/lrc.xml",
        made={"x": folder, "x/lrc.xml": hard_link("job.yaml")},
        said="is the config itself",
    ),
    "the data": Case(junit="text.txt", said="is the data of calibration.path itself"),
    "in a folder of data": Case(
        junit="pictures/lrc.xml",
        changes={"calibration.path": "pictures"},
        said="the data of calibration.path",
    ),
    "in the output": Case(
        junit="out/lrc.xml",
        made={"out/manifest.json": OWN_MANIFEST},
        said="lies in the output directory",
    ),
    "the output": Case(junit="out", said="lies in the output directory"),
    "in the partial output": Case(
        junit="out.partial/lrc.xml", made={"out.partial": folder}, said="lies in the output"
    ),
    "the old output": Case(junit="out.lrc-old", said="lies in the output directory"),
    "the lock": Case(junit="out.lrc-lock", made={"out.lrc-lock": ""}, said="lies in the output"),
    "in a second output": Case(
        junit="out-0.5/lrc.xml",
        options=("--sizes", "0.6,0.5"),
        made={"out-0.5/manifest.json": OWN_MANIFEST},
        said="lies in the output directory",
    ),
    "in the hidden work directory": Case(
        junit=".lrc-work/lrc.xml", made={".lrc-work": folder}, said="the work directory"
    ),
    "the work directory's log": Case(
        junit="work/run.log",
        work="work",
        made={"work/fingerprint.json": FINGERPRINT, "work/run.log": "said"},
        said="the work directory",
    ),
    "a name that the work directory needs": Case(
        junit="work", work="work", said="is the work directory itself"
    ),
    "a user's file": Case(junit="notes.txt", made={"notes.txt": "mine"}, said="notes.txt exists"),
    "another tool's JUnit file": Case(
        junit="lrc.xml", made={"lrc.xml": PYTEST_XML}, said="is not a JUnit file of lrc's"
    ),
    "a link to a file": Case(
        junit="lrc.xml", made={"real": "", "lrc.xml": link("real")}, said="lrc.xml is a link"
    ),
    "a link to the config": Case(
        junit="lrc.xml", made={"lrc.xml": link("job.yaml")}, said="lrc.xml is a link"
    ),
    "a link to nothing": Case(
        junit="lrc.xml", made={"lrc.xml": link("nowhere")}, said="lrc.xml is a link"
    ),
    "a pipe": Case(junit="lrc.xml", made={"lrc.xml": pipe}, said="lrc.xml is a pipe"),
    "a socket": Case(junit="lrc.xml", made={"lrc.xml": bound_socket}, said="lrc.xml is a socket"),
    "a device": Case(junit="/dev/null", said="/dev/null is a device"),
    "a full device": Case(junit="/dev/full", said="/dev/full is a device"),
    "a folder": Case(junit="pictures", said="pictures is a directory"),
    "below a file": Case(junit="text.txt/lrc.xml", said="the data of calibration.path"),
    "in no folder": Case(junit="absent/lrc.xml", said="absent is not a writable directory"),
    "a name that is too long": Case(junit=LONG, said="File name too long"),
    "a name that is not UTF-8": Case(junit="l\udcff.xml", said="l\\xff.xml cannot be used"),
}


def arrange(root: Path, case: Case) -> list[object]:
    """Makes what the case needs; returns the arguments of `lrc compress`."""
    pictures = root / "pictures"
    pictures.mkdir()
    (pictures / "a.png").write_bytes(b"a picture")
    changes: Changes = {"model.path": "model", "calibration.path": "text.txt"}
    if case.work is not None:
        changes["runtime.work_dir"] = case.work
    output = [] if case.output == "out" else ["--output", case.output]
    changes |= {"output.path": "out"} | dict(case.changes)
    job = pico.job(root, changes)
    for name, content in case.made.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            path.write_text(content)
        else:
            content(path)
    return [job.name, "-q", *output, *case.options]


@pytest.fixture
def place(
    tmp_path: Path, checkpoint: pico.Models, text: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The working directory of a case, with a checkpoint and data that may be damaged."""
    shutil.copytree(checkpoint("llama"), tmp_path / "model")
    shutil.copy(text, tmp_path / "text.txt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def assert_refused(place: Path, said: str, *command: object) -> None:
    before, nulls = seen(place), os.stat("/dev/null").st_rdev
    ended = pico.call(*command)
    assert_one_sentence(ended, 2, said)
    assert len(ended.err) < 1000 and "Traceback" not in ended.err
    assert seen(place) == before
    assert os.stat("/dev/null").st_rdev == nulls


@pytest.mark.parametrize("name", list(OUTPUTS))
def test_an_output_that_is_refused(name: str, place: Path) -> None:
    case = OUTPUTS[name]
    arguments = arrange(place, case)
    assert_refused(place, case.said, "compress", *arguments, "--force", "--restart")
    assert_refused(place, case.said, "plan", *arguments)


@pytest.mark.parametrize("name", list(WORK_DIRECTORIES))
def test_a_work_directory_that_is_refused(name: str, place: Path) -> None:
    case = WORK_DIRECTORIES[name]
    arguments = arrange(place, case)
    assert_refused(place, case.said, "compress", *arguments, "--force", "--restart")
    assert_refused(place, case.said, "plan", *arguments)


@pytest.mark.parametrize("name", list(JUNIT_FILES))
def test_a_junit_file_that_is_refused(name: str, place: Path) -> None:
    case = JUNIT_FILES[name]
    assert case.junit is not None
    arguments = [*arrange(place, case), "--junit", case.junit]
    assert_refused(place, case.said, "compress", *arguments, "--force", "--restart")


def test_what_lies_beside_the_places_of_a_job_stays(place: Path) -> None:
    """A run writes its output and its JUnit file, and a second run replaces both."""
    neighbours = {
        "lrc.xml.partial": "mine",
        "work/thesis.txt": "mine",
        "work/fingerprint.partial": "mine",
        "out.partial.txt": "mine",
        "out-old/manifest.json": WEB_APP,
    }
    arguments = arrange(place, Case(said="", work="work", output="work/out", made=neighbours))
    before = seen(place)
    for size in ("0.6", "0.5"):
        changed = ["--set", f"compression.size={size}", "--set", "evaluation=[]"]
        options = ["--junit", "lrc.xml", "--force", "--restart", *changed]
        ended = pico.call("compress", *arguments, *options)
        assert ended.code == 0, ended.err
        after = seen(place)
        assert {name: after.get(name) for name in before} == before
        assert f"size {size}" in (place / "lrc.xml").read_text()
    new = {name.split("/")[0] for name in after.keys() - before.keys()}
    assert new == {"work", "lrc.xml"}
    assert {x.name for x in (place / "work").iterdir()} >= {"out", "thesis.txt", "run.log"}
    assert not list((place / "work").glob(".lrc-*"))
    assert stat.S_IMODE((place / "lrc.xml").stat().st_mode) == 0o666 & ~os.umask(os.umask(0o22))


def edit(file: Path) -> None:
    with file.open("ab") as handle:
        handle.write(b"years of notes")


def retrain(file: Path) -> None:
    """What `save_pretrained` into the output leaves; the old time is what `cp -p` keeps."""
    times = file.stat()
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def touch_and_copy(file: Path) -> None:
    """The bytes stay."""
    file.touch()
    file.chmod(0o600)


@pytest.mark.parametrize(
    ("name", "change", "code"),
    [
        ("README.md", edit, 2),
        ("lrc.yaml", edit, 2),
        ("LICENSE", edit, 2),
        ("config.json", edit, 2),
        ("model.safetensors", retrain, 2),
        ("model.safetensors", Path.unlink, 0),
        ("README.md", touch_and_copy, 0),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_force_spares_files_that_the_user_changed(
    name: str, change: Maker, code: int, place: Path
) -> None:
    arguments = [*arrange(place, Case(said="")), "--set", "evaluation=[]"]
    assert pico.call("compress", *arguments).code == 0
    change(place / "out" / name)
    smaller = ["compress", *arguments, "--set", "compression.size=0.5", "--force"]
    if code:
        said = f"--force would delete {name}, which was changed after lrc wrote it"
        assert_refused(place, said, *smaller)
    else:
        assert pico.call(*smaller).code == 0


def test_an_old_output_that_a_crash_left_is_kept_with_what_the_user_put_there(place: Path) -> None:
    arguments = [*arrange(place, Case(said="")), "--set", "evaluation=[]"]
    assert pico.call("compress", *arguments).code == 0
    shutil.copytree(place / "out", place / "out.lrc-old")
    (place / "out.lrc-old" / "thesis.txt").write_text("mine")
    assert_refused(place, "out.lrc-old, and what lies there", "compress", *arguments, "--force")


def test_restart_deletes_units_and_nothing_else(place: Path) -> None:
    arguments = [*arrange(place, Case(said="", work="work")), "--set", "evaluation=[]"]
    assert pico.call("compress", *arguments).code == 0
    (place / "work" / "statistics" / "figures").mkdir()
    (factors,) = (place / "work" / "factors").iterdir()
    mine = [place / "work" / "statistics" / x for x in ("thesis.txt", "figures/one.png")]
    mine += [place / "work" / "spectra" / "notes.md", factors / "notes.md"]
    for file in mine:
        file.write_text("mine")
    old = {x: x.stat().st_ino for x in (place / "work").rglob("*.safetensors")}
    ended = pico.call("compress", *arguments, "--force", "--restart", "--set", "output.path=new")
    assert ended.code == 0, ended.err
    assert [file.read_text() for file in mine] == ["mine"] * 4
    assert old and all(x.exists() for x in old)


def test_an_output_is_made_again_from_its_own_config(place: Path) -> None:
    arguments = arrange(place, Case(said=""))
    assert pico.call("compress", *arguments, "--set", "evaluation=[]").code == 0
    before = seen(place / "model")
    assert pico.call("compress", "out/lrc.yaml", "-q").code == 0
    ended = pico.call("compress", "out/lrc.yaml", "-q", "--force")
    assert ended.code == 0, ended.err
    assert seen(place / "model") == before and not (place / "out" / PARTIAL_MARK).exists()


def test_the_tables_are_large() -> None:
    assert len(OUTPUTS) + len(WORK_DIRECTORIES) + len(JUNIT_FILES) >= 120
