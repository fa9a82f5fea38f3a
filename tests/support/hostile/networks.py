"""Hostile networks: factories, forwards, weights, side files and variables of the environment."""

import functools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pico
import torch
from safetensors.torch import save_file

from hostile.checkpoints import (
    NORM,
    UP,
    WEIGHTS,
    Said,
    Table,
    bound_socket,
    link,
    pipe,
    write,
)
from hostile.harness import COMPRESS, Case, Spoil, write_job

HEAD = "import os, sys, torch\nfrom torch import nn\n\n"
NET = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(24, 48), nn.Linear(48, 8)
        {more}

    def forward(self, x):
        y = self.b(torch.relu(self.a(x)))
        {then}


def build():
    return Net()
"""


def plain(source: str, **changes: object) -> Spoil:
    """The checkpoint is one file, whose module a stranger's `own.py` builds."""

    def spoil(room: Path) -> None:
        torch.manual_seed(0)
        net = torch.nn.ModuleDict({"a": torch.nn.Linear(24, 48), "b": torch.nn.Linear(48, 8)})
        save_file(net.state_dict(), room / "net.safetensors")
        save_file({"x": torch.randn(64, 24)}, room / "rows.safetensors")
        (room / "own.py").write_text(HEAD + source)
        given = {
            "model__path": "net.safetensors",
            "model__factory": "own:build",
            "calibration__path": "rows.safetensors",
            "calibration__num_sequences": 40,
            "compression__method": "frobenius",
        }
        write_job(room, **(given | changes))

    return spoil


def then(last: str, more: str = "pass") -> Spoil:
    """The network's forward ends with this line."""
    return plain(NET.format(then=last, more=more))


def build(body: str) -> Spoil:
    """The factory is this one line."""
    return plain(f"def build():\n    {body}\n")


FACTORIES: Table = {
    "raises": (build("raise ValueError('no')"), ("own:build", "ValueError: no")),
    "raises with an escape": (build(r"raise ValueError('\x1b[2J')"), ("own:build",)),
    "raises with 1 MB": (build("raise ValueError('x' * 10**6)"), ("own:build", "ValueError")),
    "raises many lines": (build(r"raise ValueError('a\nb\n' * 999)"), ("own:build",)),
    "raises without words": (build("raise KeyError"), ("own:build", "KeyError")),
    "exits with 0": (build("sys.exit(0)"), ("own:build",)),
    "exits with a text": (build("sys.exit('bye')"), ("own:build",)),
    "exits without a code": (build("raise SystemExit"), ("own:build",)),
    "raises KeyboardInterrupt": (build("raise KeyboardInterrupt"), ("own:build",)),
    "raises GeneratorExit": (build("raise GeneratorExit"), ("own:build",)),
    "raises a BaseException": (build("raise BaseException('x')"), ("own:build",)),
    "never ends its recursion": (build("return build()"), ("own:build", "RecursionError")),
    "returns nothing": (build("return None"), ("own:build", "NoneType")),
    "returns a number": (build("return 7"), ("own:build", "int")),
    "returns a class": (build("return nn.Linear"), ("own:build", "type")),
    "returns a state": (build("return {'a': torch.ones(2)}"), ("own:build", "dict")),
    "returns a tuple": (build("return nn.Linear(2, 2), 7"), ("own:build", "tuple")),
    "returns itself": (build("return build"), ("own:build", "function")),
    "yields": (build("yield nn.Linear(2, 2)"), ("own:build", "generator")),
    "is a coroutine": (
        plain("async def build():\n    return nn.Linear(2, 2)\n"),
        ("own:build", "coroutine"),
    ),
    "needs an argument": (plain("def build(x):\n    return x\n"), ("own:build", "x")),
    "is a number": (plain("build = 7\n"), ("own:build", "not callable")),
    "is missing": (plain("def other():\n    return 7\n"), ("own:build", "build")),
    "returns no layers": (build("return nn.ReLU()"), ("a.weight",)),
    "returns another network": (build("return nn.Linear(24, 48)"), ("a.weight", "factory")),
    "returns other shapes": (
        build("return nn.ModuleDict({'a': nn.Linear(24, 40), 'b': nn.Linear(40, 8)})"),
        ("a.bias", "factory"),
    ),
    "has no forward": (
        build("return nn.ModuleDict({'a': nn.Linear(24, 48), 'b': nn.Linear(48, 8)})"),
        ("calibration",),
    ),
    "is no Python": (plain("def build(:\n"), ("own:build", "SyntaxError")),
    "has a NUL": (plain("def build():\n    return '\0'\n"), ("own:build",)),
    "raises when imported": (plain("raise RuntimeError('x')\n"), ("own:build", "RuntimeError")),
    "exits when imported": (plain("sys.exit(0)\n"), ("own:build",)),
    "interrupts when imported": (plain("raise KeyboardInterrupt\n"), ("own:build",)),
    "imports what is missing": (plain("import absent_module\n"), ("own:build", "absent_module")),
}
"""What a stranger's factory does, and what the message says."""


def factory_name(name: str) -> Spoil:
    """The config names this factory."""
    return plain(NET.format(then="return y", more="pass"), model__factory=name)


NAMES: Table = {
    "of the interpreter's end": (factory_name("sys:exit"), ("sys:exit",)),
    "of a process's end": (factory_name("posix:abc"), ("posix:abc",)),
    "of a module that is missing": (factory_name("absent:build"), ("absent:build",)),
    "of no function": (factory_name("own:absent"), ("own:absent",)),
    "of a module": (factory_name("os:path"), ("os:path", "not callable")),
    "of a constant": (factory_name("math:pi"), ("math:pi", "not callable")),
    "of a function that wants more": (factory_name("os:kill"), ("os:kill",)),
    "of 5000 letters": (factory_name(f"{'m' * 5000}:build"), ("mmm",)),
    "with 1000 dots": (factory_name(f"{'a.' * 1000}a:build"), ("a.a.a",)),
    "with two colons": (factory_name("a:b:c"), ("model.factory",)),
    "with a slash": (factory_name("a/b:c"), ("model.factory",)),
    "with a space": (factory_name("own: build"), ("model.factory",)),
}
"""The name of a factory, and what the message says."""

FORWARDS: Table = {
    "raises": (then("raise ValueError('no')"), ("calibration", "ValueError: no")),
    "raises with an escape": (then(r"raise ValueError('\x1b[2J')"), ("calibration",)),
    "raises with 1 MB": (then("raise ValueError('x' * 10**6)"), ("calibration",)),
    "exits": (then("sys.exit(0)"), ("network",)),
    "interrupts": (then("raise KeyboardInterrupt"), ("network",)),
    "returns nothing": (then("return None"), ("network",)),
    "returns a number": (then("return 7"), ("network",)),
    "returns a text": (then("return 'y'"), ("network",)),
    "returns an empty list": (then("return []"), ("network",)),
    "returns an empty mapping": (then("return {}"), ("network",)),
    "returns NaN": (then("return y * float('nan')"), ("NaN",)),
    "returns infinity": (then("return y / 0 * 0 + float('inf')"), ("inf",)),
    "never ends its recursion": (then("return self(x)"), ("RecursionError",)),
}
"""The last line of a network's forward, and what the message says."""

# ---------------------------------------------------------------- weights


def weight(value: Any, key: str = UP, **changes: object) -> Spoil:
    """One tensor of the checkpoint has another value in every entry, or in the first."""

    def spoil(room: Path) -> None:
        state = pico.read_state(room / WEIGHTS)
        state[key] = value(state[key].clone())
        save_file(state, room / WEIGHTS, {"format": "pt"})
        write_job(room, **changes)

    return spoil


def first(number: float) -> Any:
    """Returns what changes the first entry."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[0] = number
        return tensor

    return change


def full(number: float) -> Any:
    """Returns what makes all entries equal."""
    return functools.partial(torch.full_like, fill_value=number)


EMBEDDING = "model.embed_tokens.weight"
WEIGHT_VALUES: Table = {
    f"{words} in {name}": (weight(first(number), key), (key, "NaN or infinity"))
    for words, number in {
        "a NaN": math.nan,
        "infinity": math.inf,
        "minus infinity": -math.inf,
    }.items()
    for name, key in {"a layer": UP, "a norm": NORM, "the embedding": EMBEDDING}.items()
} | {
    "1e38 in float16": (
        weight(first(1e38), NORM, output__dtype="float16"),
        ("output.dtype", NORM),
    ),
}
"""What is wrong with weights, and what the message says."""

FINE_WEIGHTS: Mapping[str, Spoil] = {
    "zeros": weight(full(0.0)),
    "a constant": weight(full(0.25)),
    "tiny numbers": weight(full(1e-30)),
    "subnormal numbers": weight(full(1e-39)),
    "one number": weight(lambda t: first(1.0)(torch.zeros_like(t))),
    "minus zero": weight(full(-0.0)),
}
"""Weights that are odd, and right: the output is written."""

# ---------------------------------------------------------------- side files and surroundings

SIDE: Table = {
    "a pipe": (lambda room: pipe(room / "model/notes.txt"), ()),
    "a socket": (lambda room: bound_socket(room / "model/notes.txt"), ()),
    "a link to nothing": (lambda room: link("nowhere")(room / "model/notes.txt"), ()),
    "a link to itself": (lambda room: link("notes.txt")(room / "model/notes.txt"), ()),
    "a link to the folder": (lambda room: link("..")(room / "model/notes"), ()),
    "an empty file": (write("model/notes.txt", ""), ()),
    "an empty folder": (lambda room: (room / "model/notes").mkdir(), ()),
    "a name of spaces": (write("model/ .txt", "x"), ()),
    "a name in Cyrillic": (write("model/\u0444.txt", "x"), ()),
    "a name with an escape": (write("model/\x1b[2J.txt", "x"), ()),
    "a name with a line's end": (write("model/a\nb.txt", "x"), ()),
}
"""What lies beside the weights: the output is written, and nothing hangs."""

ENVIRONMENT: Mapping[str, Mapping[str, str | None]] = {
    "no HOME": {"HOME": None},
    "a HOME that is missing": {"HOME": "/nowhere/at/all"},
    "an empty HOME": {"HOME": ""},
    "no PATH": {"PATH": None},
    "a TMPDIR that is missing": {"TMPDIR": "/nowhere/at/all"},
    "a TMPDIR that is a file": {"TMPDIR": "text.txt"},
    "an empty TMPDIR": {"TMPDIR": ""},
    "a plain locale": {"LANG": "C", "LC_ALL": "C"},
    "an unknown locale": {"LANG": "xx_XX", "LC_ALL": "xx_XX.UTF-99"},
    "a terminal without columns": {"COLUMNS": "0", "TERM": "dumb"},
    "columns that are no number": {"COLUMNS": "many", "LINES": "-1"},
    "a cache that is a file": {"HF_HOME": "text.txt", "XDG_CACHE_HOME": "text.txt"},
    "no network": {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"},
    "a proxy that is missing": {"HTTPS_PROXY": "http://127.0.0.1:1", "HTTP_PROXY": "x:y:z"},
    "hash seeds": {"PYTHONHASHSEED": "99"},
    "a pager of its own": {"PAGER": "touch ran", "EDITOR": "touch ran", "SHELL": "touch ran"},
}
"""Variables under which the output is written as ever."""

DEVICES: Mapping[str, tuple[tuple[str, str], Said]] = {
    "a GPU that is not there": (("--set", "runtime.device=cuda:99"), ("cuda:99",)),
    "a device of Apple": (("--set", "runtime.device=mps"), ("mps",)),
    "a device that nobody knows": (("--set", "runtime.device=tpu"), ("runtime.device",)),
    "a device with an escape": (("--set", 'runtime.device="\\e[2J"'), ("runtime.device",)),
    "a limit of one byte": (("--set", "runtime.memory_limit=1kb"), ("runtime.memory_limit",)),
}
"""What the machine lacks, and what the message says."""


def _of_tables() -> Iterator[Case]:
    tables: dict[str, Table] = {
        "a factory that": FACTORIES,
        "a factory's name": NAMES,
        "a forward that": FORWARDS,
        "weights with": WEIGHT_VALUES,
    }
    for what, table in tables.items():
        for name, (spoil, said) in table.items():
            code = 1 if name == "1e38 in float16" else 2
            made = frozenset({"__pycache__"})
            yield Case(name=f"{what} {name}", said=said, spoil=spoil, code=code, made=made)
    for name, (options, said) in DEVICES.items():
        yield Case(name=f"a machine without {name}", said=said, command=(*COMPRESS, *options))


def _fine() -> Iterator[Case]:
    for name, spoil in FINE_WEIGHTS.items():
        yield Case(name=f"weights of {name}", said=("out",), spoil=spoil, code=0)
    for name, (spoil, said) in SIDE.items():
        yield Case(name=f"beside the weights {name}", said=("out", *said), spoil=spoil, code=0)
    for name, variables in ENVIRONMENT.items():
        yield Case(name=f"a surrounding of {name}", said=("out",), environment=variables, code=0)


CASES = [*_of_tables(), *_fine()]
