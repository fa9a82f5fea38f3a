"""Hostile outputs: what `verify`, `eval`, `inspect` and loading make of damaged directories."""

import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hostile.checkpoints import Said, Table, both, bound_socket, cut, instead, link, pipe, write
from hostile.harness import Case, Spoil

VERIFY = ("verify", "out", "-q")
AGAINST = (*VERIFY, "--against", "model")
EVALUATE = ("eval", "out", "-q", "--data", "text.txt")
MANIFEST, REPORT, CONFIG = "out/manifest.json", "out/report.json", "out/config.json"
RECIPE, WEIGHTS = "out/lrc.yaml", "out/model.safetensors"
LAYER = "model.layers.1.mlp.up_proj"


def json_file(name: str, change: Callable[[dict[str, Any]], object]) -> Spoil:
    """A JSON file of the output says something else."""

    def spoil(room: Path) -> None:
        found = json.loads((room / name).read_text())
        change(found)
        (room / name).write_text(json.dumps(found, indent=2) + "\n")

    return spoil


def put(place: str, value: Any) -> Callable[[dict[str, Any]], object]:
    """Returns what sets a value at a dotted place; the number of a list's item is a key."""

    def change(found: Any) -> None:
        *way, last = place.split(".")
        for key in way:
            found = found[int(key)] if isinstance(found, list) else found[key]
        found[int(last) if isinstance(found, list) else last] = value

    return change


def pop(key: str) -> Callable[[dict[str, Any]], object]:
    """Returns what takes a key away."""
    return lambda found: found.pop(key)


UNREADABLE: Mapping[str, Callable[[str], Spoil]] = {
    "is empty": lambda name: write(name, ""),
    "is cut short": lambda name: cut(name, 40),
    "is a list": lambda name: write(name, "[]"),
    "is a number": lambda name: write(name, "7"),
    "is null": lambda name: write(name, "null"),
    "is no UTF-8": lambda name: write(name, b'{"a": "\xff"}'),
    "is a pickle": lambda name: write(name, b"cposix\nsystem\n(S'touch ran'\ntR."),
    "has 5000 digits": lambda name: write(name, '{"a": ' + "9" * 5000 + "}"),
    "is nested deeply": lambda name: write(name, '{"a": ' + "[" * 100_000),
    "is a pipe": lambda name: instead(name, pipe),
    "is a socket": lambda name: instead(name, bound_socket),
    "is a directory": lambda name: instead(name, os.mkdir),
    "is a device": lambda name: instead(name, link("/dev/zero")),
    "is a loop of links": lambda name: instead(name, link(Path(name).name)),
}
"""What may be wrong with any JSON file."""


def unreadable() -> Iterator[Case]:
    """A case for each JSON file of an output and each way in which it cannot be read."""
    for file in (MANIFEST, REPORT, CONFIG):
        name = Path(file).name
        for words, spoil in UNREADABLE.items():
            # Without a readable manifest there is no finished output: exit code 2.
            code = 2 if file == MANIFEST else 3
            yield Case(
                name=f"the output's {name} {words}",
                said=(name,),
                spoil=spoil(file),
                command=VERIFY,
                code=code,
                is_done=True,
            )


VALUES = {"null": None, "a text": "x", "a number": -7, "a list": [None], "an object": {"x": []}}
SECTIONS = (
    *("schema_version", "model", "architecture", "method", "loss", "target", "allocation"),
    *("sequential", "size", "quality", "layers", "skipped", "fused", "certificate"),
    *("worst_case", "timing", "memory", "provenance", "gates"),
)


def wrong_reports() -> Iterator[Case]:
    """A case for each section of report.json that is missing or of another kind."""
    for section in SECTIONS:
        for words, value in VALUES.items():
            if value is None and section in ("loss", "worst_case"):
                continue  # there is none in this output
            yield Case(
                name=f"report.json has {words} as {section}",
                said=("fails",),
                spoil=json_file(REPORT, put(section, value)),
                command=VERIFY,
                code=3,
                is_done=True,
            )


MANIFESTS: Table = {
    "has no files": (json_file(MANIFEST, pop("files")), ("manifest",)),
    "has no tensors": (json_file(MANIFEST, pop("tensors")), ("manifest",)),
    "has a list of files": (json_file(MANIFEST, put("files", [1])), ("manifest",)),
    "has null as tensors": (json_file(MANIFEST, put("tensors", None)), ("manifest",)),
    "names no files": (json_file(MANIFEST, put("files", {})), ("LICENSE",)),
    "names no tensors": (json_file(MANIFEST, put("tensors", {})), (LAYER,)),
    "has a number as hash": (json_file(MANIFEST, lambda m: m["files"].update(LICENSE=7)), ("LIC",)),
    "has null as hash": (json_file(MANIFEST, lambda m: m["files"].update(LICENSE=None)), ("LIC",)),
    "has a list as hash": (json_file(MANIFEST, lambda m: m["files"].update(LICENSE=[])), ("LIC",)),
    "has an empty hash": (json_file(MANIFEST, lambda m: m["files"].update(LICENSE="")), ("LIC",)),
    "names a file above": (
        json_file(MANIFEST, lambda m: m["files"].update({"../text.txt": "0" * 64})),
        ("../text.txt",),
    ),
    "names a device": (
        json_file(MANIFEST, lambda m: m["files"].update({"/dev/zero": "0" * 64})),
        ("/dev/zero",),
    ),
    "names an escape": (
        json_file(MANIFEST, lambda m: m["files"].update({"\x1b[2J": "0" * 64})),
        ("missing",),
    ),
    "names a NUL": (
        json_file(MANIFEST, lambda m: m["files"].update({"a\0b": "0" * 64})),
        ("missing",),
    ),
    "names a long file": (
        json_file(MANIFEST, lambda m: m["files"].update({"n" * 5000: "0" * 64})),
        ("missing",),
    ),
    "names a tensor that is missing": (
        json_file(MANIFEST, lambda m: m["tensors"].update(ghost="0" * 64)),
        ("ghost",),
    ),
}
"""What is wrong with manifest.json, and what `verify` says; the exit code is 3."""


def table(change: Callable[[dict[str, Any]], object]) -> Spoil:
    """The layer table of the output's config.json says something else."""
    return json_file(CONFIG, lambda found: change(found["quantization_config"]))


def of_layer(**changes: Any) -> Spoil:
    """The layer table says something else of one layer."""
    return table(lambda found: found["layers"][LAYER].update(changes))


LAYERS: Table = {
    "is a list": (table(put("layers", [1])), ("layers",)),
    "is null": (table(put("layers", None)), ("layers",)),
    "is empty": (table(put("layers", {})), (LAYER,)),
    "lacks a layer": (table(lambda t: t["layers"].pop(LAYER)), (LAYER,)),
    "has a ghost": (
        table(lambda t: t["layers"].update(ghost={"storage": "factors", "rank": 8})),
        ("ghost",),
    ),
    "has a number for a layer": (table(put("layers", {LAYER: 7})), ("layer",)),
    "has null for a layer": (table(put("layers", {LAYER: None})), ("layer",)),
    "has rank zero": (of_layer(rank=0), (LAYER,)),
    "has a negative rank": (of_layer(rank=-8), (LAYER,)),
    "has a text as rank": (of_layer(rank="8"), (LAYER,)),
    "has a fraction as rank": (of_layer(rank=8.5), (LAYER,)),
    "has a rank of 10^12": (of_layer(rank=10**12), (LAYER,)),
    "has a rank of 5000 digits": (of_layer(rank=10**4000), ("config.json",)),
    "has true as rank": (of_layer(rank=True), (LAYER,)),
    "has an unknown storage": (of_layer(storage="magic"), (LAYER,)),
    "has a number as storage": (of_layer(storage=7), ("layer",)),
    "has a list as storage": (of_layer(storage=["factors"]), ("layer",)),
    "has a storage with an escape": (of_layer(storage="\x1b[2J"), (LAYER,)),
    "has another storage": (of_layer(storage="factors"), (LAYER,)),
    "has a row group of zero": (of_layer(block=0), (LAYER,)),
    "has a negative row group": (of_layer(block=-8), (LAYER,)),
    "has a row group of 7": (of_layer(block=7), (LAYER,)),
    "has a text as row group": (of_layer(block="8"), (LAYER,)),
    "has version 99": (table(put("format_version", 99)), ("99",)),
    "has version zero": (table(put("format_version", 0)), ("version",)),
    "has a text as version": (table(put("format_version", "1")), ("version",)),
    "has no version": (table(pop("format_version")), ("version",)),
}
"""What is wrong with the layer table, for every command that reads an output."""


HARMLESS = {"is null", "is empty", "has a ghost", "has no version"}
"""Layer tables with which the network loads as it should: the tensors' names tell the forms."""


def header_of(change: Callable[[dict[str, Any]], object]) -> Spoil:
    """The header of the output's weight file says something else."""

    def spoil(room: Path) -> None:
        raw = (room / WEIGHTS).read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        found = json.loads(raw[8 : 8 + length])
        change(found)
        head = json.dumps(found).encode()
        (room / WEIGHTS).write_bytes(struct.pack("<Q", len(head)) + head + raw[8 + length :])

    return spoil


def metadata(value: Any) -> Spoil:
    """What lrc notes in the weight file is something else."""
    return header_of(lambda found: found["__metadata__"].update(lrc=value))


def flip(name: str, at: int) -> Spoil:
    """One bit of a file is another; a negative place counts from the end."""

    def spoil(room: Path) -> None:
        raw = bytearray((room / name).read_bytes())
        raw[at] ^= 1
        (room / name).write_bytes(raw)

    return spoil


PERM, UPPER = f"{LAYER}.perm", f"{LAYER}.up.weight"
FILES: Table = {
    "weights cut by a byte": (cut(WEIGHTS, -1), ("model.safetensors",)),
    "weights cut to a header": (cut(WEIGHTS, 100), ("model.safetensors",)),
    "no weights": (cut(WEIGHTS, 0), ("model.safetensors",)),
    "weights that are a pipe": (instead(WEIGHTS, pipe), ("model.safetensors",)),
    "weights that are a device": (instead(WEIGHTS, link("/dev/zero")), ("model.safetensors",)),
    "weights that are a directory": (instead(WEIGHTS, os.mkdir), ("model.safetensors",)),
    "weights that are gone": (lambda room: (room / WEIGHTS).unlink(), ("model.safetensors",)),
    "a bit of the weights": (flip(WEIGHTS, -1), ("model.safetensors",)),
    "a tensor that is gone": (header_of(pop(UPPER)), ("model.safetensors",)),
    "a tensor of another name": (
        header_of(lambda h: h.__setitem__("ghost", h.pop(UPPER))),
        ("ghost",),
    ),
    "a permutation of another dtype": (
        header_of(lambda h: h[PERM].update(dtype="F32")),
        ("model.safetensors",),
    ),
    "a report without a line": (write("out/README.md", "# lossless\n"), ("README.md",)),
    "a page of a stranger": (write("out/report.html", "<script>"), ("report.html",)),
    "a licence of a stranger": (write("out/LICENSE", "mine"), ("LICENSE",)),
    "code beside the weights": (write("out/modeling.py", "x = 1\n"), ("modeling.py",)),
    "a pipe beside the weights": (lambda room: pipe(room / "out/notes"), ("notes",)),
    "a link to nothing": (lambda room: link("nowhere")(room / "out/notes"), ("notes",)),
    "a link to the folder": (lambda room: link(".")(room / "out/notes"), ("notes",)),
    "a recipe that is gone": (lambda room: (room / RECIPE).unlink(), ("lrc.yaml",)),
    "an empty recipe": (write(RECIPE, ""), ("lrc.yaml",)),
    "a recipe that is no YAML": (write(RECIPE, "a: ["), ("lrc.yaml",)),
    "a recipe with a tag": (
        write(RECIPE, "!!python/object/apply:os.system ['touch ran']"),
        ("lrc.yaml",),
    ),
    "a recipe that is a pipe": (instead(RECIPE, pipe), ("lrc.yaml",)),
    "a recipe that is a device": (instead(RECIPE, link("/dev/zero")), ("lrc.yaml",)),
    "a recipe of another job": (write(RECIPE, "model: {path: other}\n"), ("lrc.yaml",)),
}
"""What is damaged in an output, and what `verify` says; the exit code is 3."""


def recipe(old: str, new: str) -> Spoil:
    """lrc.yaml of the output says something else."""

    def spoil(room: Path) -> None:
        found = (room / RECIPE).read_text()
        assert old in found
        (room / RECIPE).write_text(found.replace(old, new, 1))

    return spoil


RECIPES: Table = {
    "the device of zeros as data": (recipe("path: text.txt", "path: /dev/zero"), ("lrc.yaml",)),
    "a folder of the system as data": (recipe("path: text.txt", "path: /usr"), ("lrc.yaml",)),
    "a pipe as data": (
        both(lambda room: pipe(room / "words.txt"), recipe("path: text.txt", "path: words.txt")),
        ("lrc.yaml",),
    ),
    "a pattern that backtracks": (
        recipe("include:\n  - '*'", "include:\n  - 're:(a|a|m)*(.|.)*$$x'"),
        ("lrc.yaml",),
    ),
    "another target": (recipe("size: 0.6", "size: 0.2"), ("lrc.yaml",)),
    "infinity": (recipe("ridge: 0.01", "ridge: .inf"), ("lrc.yaml",)),
}
"""What lrc.yaml of an output says, and what `verify --against` says; the exit code is 3."""


def _case(name: str, said: Said, spoil: Spoil, command: tuple[str, ...], code: int) -> Case:
    return Case(name=name, said=said, spoil=spoil, command=command, code=code, is_done=True)


def _of_tables() -> Iterator[Case]:
    for name, (spoil, said) in MANIFESTS.items():
        yield _case(f"manifest.json {name}", said, spoil, VERIFY, 3)
    for name, (spoil, said) in FILES.items():
        yield _case(f"verify finds {name}", said, spoil, VERIFY, 3)
    for name, (spoil, said) in RECIPES.items():
        yield _case(f"verify --against reads {name}", said, spoil, AGAINST, 3)
    for name, (spoil, said) in LAYERS.items():
        yield _case(f"verify finds a layer table that {name}", said, spoil, VERIFY, 3)
        if name not in HARMLESS:
            yield _case(f"eval of a layer table that {name}", said, spoil, EVALUATE, 2)


NOTES = {
    "no JSON": "{",
    "a list": "[]",
    "a number": "7",
    "null": "null",
    "an escape": "\x1b[2J",
    "version 99": '{"format_version": 99}',
    "5000 digits": "9" * 5000,
    "layers that are a list": '{"format_version": 1, "layers": []}',
}


def notes() -> Iterator[Case]:
    """A case for everything that lrc's own note in the weight file may hold."""
    for words, value in NOTES.items():
        yield _case(
            f"verify of a note of {words}", ("model.safetensors",), metadata(value), VERIFY, 3
        )


# ---------------------------------------------------------------- damaged work directories


def units(room: Path, kind: str) -> list[Path]:
    """Returns the files of a stage in the work directory."""
    return sorted((room / ".lrc-work").glob(f"*/{kind}/**/*.safetensors"))


def damage(kind: str, change: Callable[[Path], object]) -> Spoil:
    """The first unit of a stage is damaged."""
    return lambda room: change(units(room, kind)[0])  # type: ignore[return-value]


def flipped(at: int) -> Callable[[Path], object]:
    """Returns what flips a bit of a file."""
    return lambda path: flip(path.name, at)(path.parent)


DAMAGES: Mapping[str, Callable[[Path], object]] = {
    "emptied": lambda path: os.truncate(path, 0),
    "cut": lambda path: os.truncate(path, path.stat().st_size - 1),
    "with another last bit": flipped(-1),
    "with another header": flipped(20),
    "of zeros": lambda path: path.write_bytes(bytes(1000)),
    "that is a pickle": lambda path: path.write_bytes(b"cposix\nsystem\n(S'touch ran'\ntR."),
}


def work_directories() -> Iterator[Case]:
    """A case for each stage and damage: the unit is named, and computed again."""
    for kind in ("statistics", "spectra", "factors"):
        for words, change in DAMAGES.items():
            yield _case(
                f"a unit of {kind} {words}",
                ("safetensors",),
                damage(kind, change),
                ("compress", "job.yaml", "--force"),
                0,
            )


CASES = [
    *_of_tables(),
    *unreadable(),
    *wrong_reports(),
    *notes(),
]
WORK = [*work_directories()]
