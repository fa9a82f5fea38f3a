"""The files that transformers reads by itself are looked at by lrc first, and refused by name."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pico
import pytest
from command_helpers import assert_one_sentence
from pico import Models
from torch import nn

from lrc_cli.checkpoint.foreign import check_no_adapter
from lrc_cli.checkpoint.read_by_others import check_read_by_others
from lrc_cli.checkpoint.source import open_source
from lrc_cli.data.processors import open_processors
from lrc_cli.errors import InputError
from lrc_cli.network.loading import load

Write = Callable[[Path], object]


def text(content: str | bytes) -> Write:
    raw = content if isinstance(content, bytes) else content.encode()
    return lambda file: file.write_bytes(raw)


def grown(file: Path) -> None:
    with file.open("wb") as handle:
        handle.truncate(10**8)


def terabytes(file: Path) -> None:
    with file.open("wb") as handle:
        handle.truncate(4 * 10**12)


JSON: dict[str, tuple[Write, str]] = {
    "a pipe": (lambda file: os.mkfifo(file), "is a pipe"),
    "a device": (lambda file: file.symlink_to("/dev/zero"), "is a device"),
    "a directory": (lambda file: file.mkdir(), "is a directory"),
    "a link to nothing": (lambda file: file.symlink_to("x"), "there is no such file"),
    "a loop of links": (lambda file: file.symlink_to(file.name), "cannot be read"),
    "100 MB": (grown, "at most 64,000,000 are read"),
    "terabytes of nothing": (terabytes, "are holes"),
    "empty": (text(""), ""),
    "a pointer of git": (text("version https://git-lfs.github.com/spec/v1\n"), "git-lfs"),
    "a page": (text("<!DOCTYPE html><html>"), "is a web page"),
    "a list": (text("[]"), "is not a JSON object"),
    "deep": (text('{"a": ' + "[" * 100_000), "nested deeper"),
    "deep and closed": (text('{"a": ' + "[" * 200 + "]" * 200 + "}"), "nested deeper"),
    "digits": (text('{"a": ' + "9" * 5000 + "}"), "5,000 digits"),
    "half a character": (text('{"a": "\\ud800"}'), "half of a character"),
    "twice": (text('{"a": 1, "a": 2}'), "has a twice"),
    "not UTF-8": (text(b'{"a": "\xff"}'), "not UTF-8"),
    "UTF-16": (text('{"a": 1}'.encode("utf-16")), "not UTF-8"),
}
"""What lies in a file's place, and what the refusal says."""
OF_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
OF_MODELS = ("generation_config.json",)
OF_PROCESSORS = ("preprocessor_config.json", "processor_config.json")


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory, checkpoint: Models) -> Path:
    """Returns a copy of a checkpoint, which every case puts in order again."""
    return shutil.copytree(checkpoint("llama"), tmp_path_factory.mktemp("processors") / "model")


def refusal(file: Path, write: Write, act: Callable[[], object]) -> InputError:
    """Puts something in a file's place, and returns what acting on it raises."""
    kept = file.with_name("kept")
    if file.exists():
        file.rename(kept)
    file.parent.mkdir(exist_ok=True)
    try:
        write(file)
        with pytest.raises(InputError) as caught:
            act()
        return caught.value
    finally:
        shutil.rmtree(file) if file.is_dir() else file.unlink(missing_ok=True)
        if kept.exists():
            kept.rename(file)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("kind", JSON)
@pytest.mark.parametrize("name", [*OF_TOKENIZERS, *OF_MODELS, *OF_PROCESSORS])
def test_json_that_transformers_would_read(name: str, kind: str, room: Path) -> None:
    write, piece = JSON[kind]

    def act() -> None:
        if name in OF_MODELS:
            load(room)
        else:
            processors = open_processors(open_source(room), nn.Linear(2, 2))
            assert name in OF_PROCESSORS
            processors.images()

    error = refusal(room / name, write, act)
    assert f"{room / name}" in str(error) and piece in str(error), str(error)
    assert "\n" not in str(error) and error.remedy


OTHERS: dict[str, tuple[str, Write, str]] = {
    "a template, a pipe": ("chat_template.jinja", lambda file: os.mkfifo(file), "is a pipe"),
    "a template of 100 MB": ("chat_template.jinja", grown, "at most 1,000,000"),
    "a template that is no text": ("chat_template.jinja", text(b"\xff"), "not UTF-8"),
    "another template, a pipe": (
        "additional_chat_templates/rag.jinja",
        lambda file: os.mkfifo(file),
        "is a pipe",
    ),
    "a vocabulary, a device": ("vocab.txt", lambda file: file.symlink_to("/dev/zero"), "a device"),
    "a vocabulary of 100 MB": ("vocab.txt", grown, "at most 64,000,000"),
    "merges, a pipe": ("merges.txt", lambda file: os.mkfifo(file), "is a pipe"),
    "sentencepiece, a pipe": ("spiece.model", lambda file: os.mkfifo(file), "is a pipe"),
    "sentencepiece of terabytes": ("tokenizer.model", terabytes, "are holes"),
}


@pytest.mark.timeout(30)
@pytest.mark.parametrize("kind", OTHERS)
def test_other_files_that_a_tokenizer_reads(kind: str, room: Path) -> None:
    name, write, piece = OTHERS[kind]
    error = refusal(room / name, write, lambda: open_processors(open_source(room), nn.Linear(2, 2)))
    assert str(room / name) in str(error) and piece in str(error), str(error)


def test_files_that_are_right_are_let_through(room: Path) -> None:
    check_read_by_others(room, ["*.json", "*.txt"])
    check_no_adapter(room)
    assert open_processors(open_source(room), nn.Linear(2, 2)).tokenizer is not None


@pytest.mark.timeout(60)
def test_commands_name_the_file(tmp_path: Path, checkpoint: Models, text: Path) -> None:
    model = shutil.copytree(checkpoint("llama"), tmp_path / "model")
    job = pico.job(tmp_path, {"model.path": str(model), "calibration.path": str(text)})
    for name in ("tokenizer_config.json", "generation_config.json"):
        kept = (model / name).read_text() if (model / name).exists() else None
        (model / name).write_text(json.dumps({"a": 1})[:-1])
        for command in ("compress", "plan"):
            ended = pico.call(command, job, "-q")
            assert_one_sentence(ended, 2, str(model / name), "is not JSON")
        if kept is not None:
            (model / name).write_text(kept)
