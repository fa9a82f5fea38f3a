"""Attacks of somebody who did not write the other tables: places, data, and doctored outputs."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from damage import rewrite_manifest

from hostile.checkpoints import both, link, write
from hostile.data import job, made
from hostile.harness import COMPRESS, Case, Spoil
from hostile.outputs import AGAINST, MANIFEST, REPORT, VERIFY, json_file, put

Row = tuple[Spoil, tuple[str, ...]]


def make_link(name: str, target: str) -> Spoil:
    """The room has a link."""
    return lambda room: link(target)(room / name)


def hard_link(name: str, target: str) -> Spoil:
    """A file of the room has a second name."""
    return lambda room: os.link(room / target, room / name)


def fitting(spoil: Spoil) -> Spoil:
    """The output's manifest is written again after a change."""
    return lambda room: (spoil(room), rewrite_manifest(room / "out"))[1]


def grown(name: str, text: str) -> Spoil:
    """A file has more text at its end."""

    def spoil(room: Path) -> None:
        with (room / name).open("a") as file:
            file.write(text)

    return spoil


LOOP = both(make_link("l1", "l2"), make_link("l2", "l1"))
PLACES: Mapping[str, Row] = {
    "an output that is the model with a slash": (job(output__path="model/"), ("model",)),
    "an output by way of the parent": (job(output__path="./model/../model"), ("model",)),
    "an output that is the model and a dot": (job(output__path="model/."), ("model",)),
    "an output linked to the model": (
        both(make_link("lk", "model"), job(output__path="lk")), ("output.path",),
    ),
    "an output below a link to the model": (
        both(make_link("lk", "model"), job(output__path="lk/out")), ("output.path",),
    ),
    "an output in a loop of links": (both(LOOP, job(output__path="l1")), ("output.path",)),
    "an output below a loop of links": (both(LOOP, job(output__path="l1/x")), ("output.path",)),
    "an output that is the room": (job(output__path="."), ("output.path",)),
    "an output above the room": (job(output__path=".."), ("output.path",)),
    "an output below the text": (job(output__path="text.txt/out"), ("text.txt",)),
    "an output that is the text's other name": (
        both(hard_link("hard", "text.txt"), job(output__path="hard")), ("output.path",),
    ),
    "a work directory in /proc": (job(runtime__work_dir="/proc/x"), ("work_dir",)),
    "a work directory that is a device": (job(runtime__work_dir="/dev/null"), ("work_dir",)),
    "a work directory linked to the model": (
        both(make_link("w", "model"), job(runtime__work_dir="w")), ("work_dir",),
    ),
    "data that the system shows": (made("v.txt", link("/proc/version")), ("v.txt",)),
    "data that are the environment": (made("v.txt", link("/proc/self/environ")), ("v.txt",)),
    "data in /sys": (job(calibration__path="/sys"), ("/sys",)),
    "data in /dev": (job(calibration__path="/dev"), ("/dev",)),
    "data that are a descriptor": (job(calibration__path="/proc/self/fd/0"), ("/proc",)),
}  # fmt: skip
"""What the config names."""
JUNITS = ("weights.xml", "model/j.xml", "out", "out/j.xml", "out/../job.yaml", "/dev/full", "")


def raised(report: dict[str, Any]) -> object:
    """The report has a layer twice."""
    return report["layers"].append(report["layers"][0])


DOCTORED: Mapping[str, Spoil] = {
    "report.json has a layer twice": json_file(REPORT, raised),
    "report.json has a key more": json_file(REPORT, put("note", "provably lossless")),
    "report.json has minus zero": json_file(REPORT, put("layers.0.shape", [-0.0, 1])),
    "report.json has zero for false": json_file(REPORT, put("layers.0.fallback", 0)),
    "README.md has a line more": grown("out/README.md", "\nbest model\n"),
    "README.md has a letter without width": grown("out/README.md", "\u200b"),
}
"""What is changed in an output whose manifest is then written again."""
ADDED: Mapping[str, Row] = {
    "an output with a hidden file": (write("out/.x", "a"), ("fails",)),
    "an output with a twin of README.md": (write("out/readme.md", "a"), ("readme.md",)),
    "manifest.json names a file above, by hash": (
        json_file(MANIFEST, lambda m: m["files"].update({"../text.txt": "0" * 64})),
        ("../text.txt",),
    ),
}


def cases() -> Iterator[Case]:
    """All attacks."""
    for name, (spoil, said) in PLACES.items():
        yield Case(name=name, spoil=spoil, said=said)
    for file in JUNITS:
        yield Case(
            name=f"--junit {file!r} is no place of its own",
            spoil=hard_link("weights.xml", "model/model.safetensors"),
            said=("--junit",),
            command=(*COMPRESS, "--junit", file),
        )
    for name, spoil in DOCTORED.items():
        yield Case(
            name=name, spoil=fitting(spoil), said=("fails",), command=VERIFY, code=3, is_done=True
        )
    for name, (spoil, said) in ADDED.items():
        yield Case(name=name, spoil=spoil, said=said, command=VERIFY, code=3, is_done=True)
    yield Case(
        name="report.json has its layers in another order",
        spoil=fitting(json_file(REPORT, lambda report: report["layers"].reverse())),
        said=("fails",),
        command=AGAINST,
        code=3,
        is_done=True,
    )
    for place in ("/proc", "/proc/self"):
        yield Case(name=f"inspect {place}", said=("/proc",), command=("inspect", place))
    for place in ("/proc", "/sys"):
        command = ("verify", "out", "--against", "model", "--data", place, "-q")
        yield Case(name=f"verify --data {place}", said=(place,), command=command, is_done=True)


CASES = [*cases()]
