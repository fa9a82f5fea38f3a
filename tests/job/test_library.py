"""Programs call `lrc_cli.load` and `lrc_cli.compress`: whatever fails is an error of lrc's own."""

import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from pico import Models
from torch import nn

import lrc_cli
from lrc_cli.config import Config, load_config
from lrc_cli.errors import InputError, LrcError, RunError


def linked(name: str, target: str) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        (folder / name).symlink_to(target)
        return name

    return make


def piped(name: str) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        (folder / name).parent.mkdir(exist_ok=True)
        os.mkfifo(folder / name)
        return name

    return make


def within(make: Callable[[Path], str]) -> Callable[[Path], str]:
    def inside(folder: Path) -> str:
        (folder / "model").mkdir()
        make(folder / "model")
        return "model"

    return inside


def without_rights(folder: Path) -> str:
    (folder / "closed").mkdir(mode=0)
    return "closed"


def holding(name: str, content: bytes) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        (folder / "model").mkdir()
        (folder / "model" / name).write_bytes(content)
        return "model"

    return make


PLACES: dict[str, Callable[[Path], Any]] = {
    "a name too long": lambda _: "n" * 300,
    "a path too long": lambda _: "d/" * 3000,
    "a megabyte": lambda _: "n" * 1_000_000,
    "a null character": lambda _: "a\0b",
    "a null character at the end": lambda _: "a\0",
    "half a character": lambda _: "a\udcff",
    "a null character in a Path": lambda _: Path("a\0b"),
    "empty": lambda _: "",
    "nothing there": lambda _: "absent",
    "a link to itself": linked("loop", "loop"),
    "a loop of links": lambda x: linked("a", "b")(x) and linked("b", "a")(x),
    "below a loop": lambda x: linked("loop", "loop")(x) + "/model",
    "a link to nothing": linked("dangling", "absent"),
    "a pipe": piped("pipe"),
    "a pipe with a weight file's name": piped("pipe.safetensors"),
    "below a pipe": lambda x: piped("pipe")(x) + "/model",
    "an endless device": lambda _: "/dev/zero",
    "an endless weight file": linked("zero.pt", "/dev/zero"),
    "an empty device": lambda _: "/dev/null",
    "memory": lambda _: "/proc/self/mem",
    "an empty directory": lambda x: str(x),
    "a directory without rights": without_rights,
    "a config that is a pipe": within(piped("config.json")),
    "a config that is a loop": within(linked("config.json", "config.json")),
    "a config that is no UTF-8": holding("config.json", b"\xff\xfe"),
    "a deep config": holding("config.json", b"[" * 100_000),
    "a config of digits": holding("config.json", b'{"model_type": ' + b"9" * 5000 + b"}"),
    "weights that are a pipe": within(piped("model.safetensors")),
    "weights that are a loop": within(linked("model.safetensors", "model.safetensors")),
    "weights that are empty": holding("model.safetensors", b""),
    "weights that are noise": holding("model.safetensors", b"\xff" * 100),
    "a pickle that is noise": holding("pytorch_model.bin", b"\xff" * 100),
    "None": lambda _: None,
    "a number": lambda _: 7,
    "a huge number": lambda _: 10**400,
    "bytes": lambda _: b"model",
    "a list": lambda _: ["model"],
}


@pytest.mark.parametrize("make", PLACES.values(), ids=PLACES)
def test_load_refuses_what_is_no_checkpoint(
    make: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        lrc_cli.load(make(tmp_path))
    assert caught.value.remedy and len(str(caught.value)) < 2000
    for closed in tmp_path.glob("closed"):
        closed.chmod(0o700)


def forever() -> Any:
    return forever()


def undecoded() -> Any:
    return b"\xff".decode()


FACTORIES: dict[str, Any] = {
    "exits": lambda: sys.exit(0),
    "never ends": forever,
    "cannot decode": undecoded,
    "finds no file": lambda: Path("/absent/file").read_text(),
    "returns nothing": lambda: None,
    "no function": 7,
    "a name of a megabyte": "n" * 1_000_000,
    "a null character": "a\0:b",
    "no module": "absent_module:build",
    "exits by its name": "sys:exit",
}


@pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)
def test_load_names_a_factory_that_fails(factory: Any, plain_folder: pico.PlainFolder) -> None:
    with pytest.raises(InputError) as caught:
        lrc_cli.load(plain_folder.path / "mlp.safetensors", factory=factory)
    assert caught.value.remedy


@pytest.mark.parametrize(
    "options",
    [
        {"device": "moon"},
        {"device": "cuda:" + "9" * 400},
        {"device": []},
        {"device": ""},
        {"dtype": "int8"},
        {"dtype": "load"},
        {"dtype": torch.int64},
        {"dtype": 7},
        {"dtype": "x" * 1_000_000},
    ],
    ids=lambda options: str(options)[:40],
)
def test_load_refuses_options(options: dict[str, Any], checkpoint: Models) -> None:
    with pytest.raises(InputError) as caught:
        lrc_cli.load(checkpoint("llama"), **options)
    assert len(str(caught.value)) < 2000


@pytest.fixture
def config(tmp_path: Path, plain_folder: pico.PlainFolder, monkeypatch: Any) -> Config:
    monkeypatch.syspath_prepend(plain_folder.path)
    return load_config(pico.job(tmp_path, plain_folder.model("mlp")))


def changed(config: Config, section: str, **values: Any) -> Config:
    part = dataclasses.replace(getattr(config, section), **values)
    return dataclasses.replace(config, **{section: part})


JOBS: dict[str, tuple[str, dict[str, Any]]] = {
    "a null character in the output": ("output", {"path": "a\0b"}),
    "an output too long": ("output", {"path": "n" * 300}),
    "an output that is the root": ("output", {"path": "/"}),
    "an output that is a device": ("output", {"path": "/dev/null"}),
    "a work directory too long": ("runtime", {"work_dir": "d/" * 3000}),
    "a work directory that is a file": ("runtime", {"work_dir": "/dev/null"}),
    "a checkpoint with a null character": ("model", {"path": "\0"}),
    "a checkpoint of a megabyte": ("model", {"path": "n" * 1_000_000}),
    "data too long": ("calibration", {"path": "n" * 300}),
    "data with half a character": ("calibration", {"path": "a\udcff.txt"}),
    "a factory that exits": ("model", {"factory": "sys:exit"}),
}


@pytest.mark.parametrize("kind", JOBS)
def test_compress_refuses_what_cannot_be(kind: str, config: Config) -> None:
    section, values = JOBS[kind]
    with pytest.raises(InputError):
        lrc_cli.compress(changed(config, section, **values))


def test_compress_writes_nothing_into_its_inputs(config: Config) -> None:
    inside = changed(config, "output", path=config.model.path)
    with pytest.raises(InputError, match=r"output\.path"):
        lrc_cli.compress(inside, force=True)


class Failing(nn.Module):
    """Runs well at first."""

    calls, raises = 0, staticmethod(forever)

    def __init__(self) -> None:
        super().__init__()
        for place, (n, m) in {"0": (24, 48), "2": (48, 32), "4": (32, 8)}.items():
            self.add_module(place, nn.Linear(n, m))

    def forward(self, x: torch.Tensor) -> Any:
        Failing.calls += 1
        if Failing.calls > 5:
            Failing.raises()
        for part in self.children():
            x = part(x).relu()
        return x


def full() -> Any:
    raise OSError(28, "No space left on device")


RAISES: dict[str, Callable[[], Any]] = {
    "SystemExit": lambda: sys.exit(0),
    "RecursionError": forever,
    "UnicodeError": undecoded,
    "OSError": full,
}


@pytest.mark.parametrize("raises", RAISES.values(), ids=RAISES)
def test_compress_raises_its_own_error_for_a_network_that_fails(
    raises: Callable[[], Any], config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Failing, "calls", 0)
    monkeypatch.setattr(Failing, "raises", staticmethod(raises))
    with pytest.raises(LrcError) as caught:
        lrc_cli.compress(changed(config, "model", factory=f"{__name__}:Failing"))
    assert isinstance(caught.value, RunError) and caught.value.__cause__ is not None
    assert not Path(config.output.path).exists()
