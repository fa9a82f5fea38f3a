"""A stranger's output cannot make `lrc verify` hang, take all memory or open what it may not."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import damage
import pico
import pytest
from verify_helpers import Made

from lrc_cli.data import named_by_others as data
from lrc_cli.data.named_by_others import why_not_opened

Change = Callable[[Path], object]


def replaced(name: str, put: Change) -> Change:
    """Returns a change: something else lies in a file's place."""

    def change(output: Path) -> None:
        (output / name).unlink()
        put(output / name)

    return change


def written(name: str, text: str | bytes) -> Change:
    content = text if isinstance(text, bytes) else text.encode()
    return replaced(name, lambda file: file.write_bytes(content))


def grown(file: Path) -> None:
    with file.open("wb") as handle:
        handle.truncate(10**8)


def in_config(old: str, new: str) -> Change:
    def change(output: Path) -> None:
        file = output / "lrc.yaml"
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, new))

    return change


def noted(output: Path) -> None:
    """Puts a table that is none into config.json."""
    config = json.loads((output / "config.json").read_text())
    config["quantization_config"]["layers"] = [1, 2]
    (output / "config.json").write_text(json.dumps(config))


def without_table(output: Path) -> None:
    """Takes the layer table out of config.json."""
    config = json.loads((output / "config.json").read_text())
    del config["quantization_config"]["layers"]
    (output / "config.json").write_text(json.dumps(config))


def layers(output: Path) -> None:
    config = json.loads((output / "config.json").read_text())
    (output / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**9}))


DEEP, DIGITS = "[" * 100_000, '{"files": ' + "9" * 5000 + "}"
HALF = '{"files": {"\\ud800": "a"}, "tensors": {}}'
CASES: dict[str, tuple[Change, int, str]] = {
    "report.json a pipe": (replaced("report.json", os.mkfifo), 3, "is a pipe"),
    "report.json a device": (
        replaced("report.json", lambda f: f.symlink_to("/dev/zero")),
        3,
        "is a device",
    ),
    "report.json a directory": (replaced("report.json", Path.mkdir), 3, "is a directory"),
    "report.json deep": (written("report.json", DEEP), 3, "nested deeper"),
    "report.json of 100 MB": (replaced("report.json", grown), 3, "at most 64,000,000"),
    "report.json of digits": (written("report.json", DIGITS), 3, "5,000 digits"),
    "report.json in half": (written("report.json", HALF), 3, "half of a character"),
    "report.json twice": (written("report.json", '{"a": 1, "a": 2}'), 3, "has a twice"),
    "manifest.json of digits": (written("manifest.json", DIGITS), 2, "5,000 digits"),
    "manifest.json in half": (written("manifest.json", HALF), 2, "half of a character"),
    "manifest.json deep": (written("manifest.json", DEEP), 2, "nested deeper"),
    "manifest.json of 100 MB": (replaced("manifest.json", grown), 2, "at most 64,000,000"),
    "manifest.json a pipe": (replaced("manifest.json", os.mkfifo), 2, "manifest.json"),
    "lrc.yaml of 100 MB": (replaced("lrc.yaml", grown), 3, "at most 500,000"),
    "lrc.yaml a pipe": (replaced("lrc.yaml", os.mkfifo), 3, "is a pipe"),
    "lrc.yaml a device": (
        replaced("lrc.yaml", lambda f: f.symlink_to("/dev/zero")),
        3,
        "is a device",
    ),
    "lrc.yaml that laughs": (
        written("lrc.yaml", "a: &a [x]\nb: &b [*a, *a]\nmodel: {<<: *b}\n"),
        3,
        "unknown key",
    ),
    "a pattern that backtracks": (
        in_config("  include:\n  - '*'\n", "  include:\n  - 're:(([a-z.0-9_]*)*)*!'\n"),
        3,
        "config",
    ),
    "a pattern that looks around": (
        in_config("  include:\n  - '*'\n", "  include:\n  - 're:(?=a)b'\n"),
        3,
        "look-around",
    ),
    "README.md a pipe": (replaced("README.md", os.mkfifo), 3, "is a pipe"),
    "report.html a device": (
        replaced("report.html", lambda f: f.symlink_to("/dev/zero")),
        3,
        "is a device",
    ),
    "config.json a pipe": (replaced("config.json", os.mkfifo), 3, "is a pipe"),
    "config.json of digits": (written("config.json", DIGITS), 3, "5,000 digits"),
    "a table that is none": (noted, 3, "no layer table"),
    "no table": (without_table, 3, "fails"),
    "an index of 100 MB": (replaced("model.safetensors.index.json", grown), 3, "at most"),
    "an index a pipe": (replaced("model.safetensors.index.json", os.mkfifo), 3, "index.json"),
    "a name that is not UTF-8": (
        lambda output: Path(os.fsdecode(os.fsencode(output) + b"/\xff")).touch(),
        3,
        "files.known",
    ),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", CASES)
def test_every_case_ends_with_a_statement(kind: str, made: Made, tmp_path: Path) -> None:
    change, code, piece = CASES[kind]
    output = damage.copied(made.output, tmp_path)
    change(output)
    ended = pico.call("verify", output, "-q")
    assert ended.code == code, ended.err
    assert piece in ended.out + ended.err, ended.out + ended.err
    (ended.out + ended.err).encode()


@pytest.mark.timeout(120)
def test_a_billion_layers_are_not_built(made: Made, tmp_path: Path) -> None:
    output = damage.copied(made.output, tmp_path)
    layers(output)
    damage.rewrite_manifest(output)
    ended = pico.call("verify", output, "--against", made.original, "-q")
    assert ended.code == 3 and "num_hidden_layers is 1000000000" in ended.out


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "place", ["/dev/zero", "/usr", "{}/pipe.txt", "{}/zero.txt", "/etc/passwd"]
)
def test_data_that_only_a_stranger_names_is_not_opened(
    place: str, made: Made, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    output, path = damage.copied(made.output, tmp_path), place.format(tmp_path)
    report = damage.read_report(output)
    (name,) = report["provenance"]["data_files_sha256"]
    for file in ("lrc.yaml", "report.json"):
        text = (output / file).read_text()
        (output / file).write_text(text.replace(name, path))
    damage.rewrite_manifest(output)
    ended = pico.call("verify", output, "--against", made.original, "-q")
    lines = [line for line in ended.out.splitlines() if "data.hash" in line]
    assert lines and all(line.startswith("not checked") for line in lines), ended.out + ended.err
    assert all("give it with --data" in line for line in lines)


def make_large(file: Path) -> Path:
    with file.open("wb") as handle:
        handle.truncate(data.MOST_BYTES + 1)  # takes no room on the disk
    return file


def many(folder: Path) -> Path:
    for i in range(3):
        (folder / str(i)).mkdir(parents=True)
        for j in range(10):
            (folder / str(i) / f"{j}.png").touch()
    return folder


def linked(file: Path) -> Path:
    file.symlink_to("/dev/zero")
    return file


def piped(file: Path) -> Path:
    os.mkfifo(file)
    return file


PLACES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "nothing": (lambda p: p / "x.txt", "not there"),
    "a name too long": (lambda p: p / ("x" * 300), "not there"),
    "a name with a null": (lambda p: p / "a\0.txt", "not there"),
    "a large text": (lambda p: make_large(p / "x.txt"), "more than"),
    "large tensors": (lambda p: make_large(p / "x.npz"), "more than"),
    "many files": (lambda p: many(p / "x"), "more than"),
    "a folder with a large file": (lambda p: make_large(p / "x.png").parent, "more than"),
    "a device": (lambda p: Path("/dev/zero"), "no kind of data"),
    "a linked device": (lambda p: linked(p / "x.txt"), "is a device"),
    "a pipe": (lambda p: piped(p / "pipe"), "no kind of data"),
    "a pipe with the name of a text": (lambda p: piped(p / "x.txt"), "is a pipe"),
    "a folder with the name of a text": (lambda p: (p / "x.txt").mkdir() or p / "x.txt", "is a"),
    "secrets": (lambda p: Path("/etc/passwd"), "no kind of data"),
}


@pytest.mark.timeout(30)
@pytest.mark.parametrize("kind", PLACES)
def test_places_that_are_not_opened(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "MOST_FILES", 20)
    make, piece = PLACES[kind]
    reason = why_not_opened(make(tmp_path))
    assert reason is not None and piece in reason


def test_plain_data_is_opened(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("a")
    (tmp_path / "y.txt").symlink_to("x.txt")
    (tmp_path / "x.png").touch()
    assert [why_not_opened(tmp_path / name) for name in ("x.txt", "y.txt", "")] == [None] * 3


@pytest.mark.timeout(30)
@pytest.mark.parametrize("place", ["pipe.txt", "zero.txt", "pipe"])
def test_data_of_the_user_is_a_regular_file_too(place: str, made: Made, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    ended = pico.call(
        "verify", made.output, "--against", made.original, "--data", tmp_path / place, "-q"
    )
    assert ended.code == 2 and place in ended.err and " is a " in ended.err
