"""Hostile checkpoints: config.json, headers of safetensors, indexes, pickles, side files."""

import functools
import json
import math
import os
import socket
import struct
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pico
import torch
from safetensors.torch import save_file

from hostile.harness import MARK, Case, Spoil

Said = tuple[str, ...]
Table = Mapping[str, tuple[Spoil, Said]]
WEIGHTS = "model/model.safetensors"
UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.norm.weight"
INDEX = "model/model.safetensors.index.json"
PICKLE = "model/pytorch_model.bin"


class Runs:
    """An object whose pickle runs code when it is loaded: it makes the file `ran`."""

    def __init__(self, call: str = f"open({MARK!r}, 'w').close()") -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return eval, (self.call,)


def write(name: str, content: str | bytes) -> Spoil:
    """A file of the job has this content."""
    raw = content if isinstance(content, bytes) else content.encode()

    def spoil(room: Path) -> None:
        (room / name).parent.mkdir(parents=True, exist_ok=True)
        (room / name).write_bytes(raw)

    return spoil


def remove(*names: str) -> Spoil:
    """Files of the job are not there."""

    def spoil(room: Path) -> None:
        for name in names:
            (room / name).unlink()

    return spoil


def instead(name: str, make: Callable[[Path], None]) -> Spoil:
    """Something else is made where a file of the job was, if there was any."""

    def spoil(room: Path) -> None:
        path = room / name
        path.unlink(missing_ok=True)
        make(path)

    return spoil


def pipe(path: Path) -> None:
    """Makes a pipe."""
    os.mkfifo(path)


def bound_socket(path: Path) -> None:
    """Makes a socket."""
    # The system takes about a hundred characters for a socket's path.
    with tempfile.TemporaryDirectory() as short, socket.socket(socket.AF_UNIX) as bound:
        bound.bind(f"{short}/socket")
        Path(short, "socket").rename(path)


def link(target: str) -> Callable[[Path], None]:
    """Returns what makes a link."""
    return lambda path: path.symlink_to(target)


def both(*spoils: Spoil) -> Spoil:
    """Several things are wrong, one after the other."""

    def spoil(room: Path) -> None:
        for each in spoils:
            each(room)

    return spoil


def cut(name: str, size: int) -> Spoil:
    """A file ends early; a negative size counts from the end."""

    def spoil(room: Path) -> None:
        length = (room / name).stat().st_size
        os.truncate(room / name, size if size >= 0 else length + size)

    return spoil


# ---------------------------------------------------------------- config.json


def config(drop: str = "", **changes: Any) -> Spoil:
    """config.json of the checkpoint has other values, or lacks a key."""

    def spoil(room: Path) -> None:
        file = room / "model/config.json"
        found = json.loads(file.read_text())
        found.pop(drop, None)
        file.write_text(json.dumps(found | changes))

    return spoil


def config_text(content: str | bytes) -> Spoil:
    """config.json of the checkpoint has this content."""
    return write("model/config.json", content)


NUMBERS = {
    "null": None,
    "minus one": -1,
    "zero": 0,
    "a text": "many",
    "a list": [2],
    "not a number": math.nan,
    "30 digits": 10**30,
}
SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "vocab_size", "head_dim"),
)


def wrong_numbers() -> Iterator[Case]:
    """A case for each number that decides a shape, with each kind of wrong value."""
    for key in SIZES:
        for words, value in NUMBERS.items():
            # transformers has a meaning for some values, which then load as they should.
            if value is None and key in ("num_key_value_heads", "head_dim"):
                continue
            name = f"config.json has {words} as {key}"
            yield Case(name=name, said=("model",), spoil=config(**{key: value}))


CONFIG: Table = {
    "is missing": (remove("model/config.json"), ("model", "factory")),
    "is empty": (config_text(""), ("model/config.json", "JSON")),
    "is a list": (config_text("[]"), ("model/config.json", "object")),
    "is a number": (config_text("7"), ("model/config.json", "object")),
    "is null": (config_text("null"), ("model/config.json", "object")),
    "is an empty object": (config_text("{}"), ("model",)),
    "is cut short": (config_text('{"model_type": "lla'), ("model/config.json", "JSON")),
    "is UTF-16": (config_text('{"a": 1}'.encode("utf-16")), ("model/config.json",)),
    "is latin-1": (config_text(b'{"a": "\xe9"}'), ("model/config.json",)),
    "has a byte order mark": (config_text(b"\xef\xbb\xbf{"), ("model/config.json",)),
    "has 5000 digits": (config_text('{"a": ' + "9" * 5000 + "}"), ("model/config.json",)),
    "is nested deeply": (config_text('{"a": ' + "[" * 100_000), ("model/config.json",)),
    "is a pickle": (config_text(b"\x80\x04\x95\x00\x00\x00\x00"), ("model/config.json",)),
    "has comments": (config_text("{} // nothing"), ("model/config.json", "JSON")),
    "has a key twice": (
        config_text('{"model_type": "llama", "model_type": "opt"}'),
        ("model/config.json", "model_type"),
    ),
    "is a directory": (instead("model/config.json", os.mkdir), ("model/config.json",)),
    "is a pipe": (instead("model/config.json", pipe), ("model/config.json",)),
    "is a socket": (instead("model/config.json", bound_socket), ("model/config.json",)),
    "is a device": (instead("model/config.json", link("/dev/zero")), ("model/config.json",)),
    "is a loop of links": (instead("model/config.json", link("config.json")), ("model",)),
    "has a lone surrogate": (config(note="\ud800"), ("model/config.json",)),
    "has a number in architectures": (config(architectures=[7]), ("architectures",)),
    "has a list in architectures": (config(architectures=[["a"]]), ("architectures",)),
    "has an object as architectures": (config(architectures={"a": 1}), ("architectures",)),
    "has an empty architecture": (config(architectures=[""]), ("model",)),
    "has a function as architecture": (config(architectures=["logging"]), ("logging",)),
    "has a dotted architecture": (config(architectures=["os.system"]), ("os.system",)),
    "has an escape as architecture": (config(architectures=["\x1b[2J"]), ("class",)),
    "has a dunder as architecture": (config(architectures=["__name__"]), ("__name__",)),
    "has a config class as architecture": (
        config(architectures=["LlamaConfig"]),
        ("model",),
    ),
    "has a tokenizer as architecture": (
        config(architectures=["LlamaTokenizer"]),
        ("LlamaTokenizer",),
    ),
    "has another family's architecture": (
        config(architectures=["BertForMaskedLM"]),
        ("model",),
    ),
    "has code of its own": (
        both(
            config(
                architectures=["Own"],
                auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"},
            ),
            write("model/own.py", f"open({MARK!r}, 'w').close()\n"),
        ),
        ("trust_remote_code",),
    ),
    "has a wrong dtype": (config(dtype="float99"), ("float99",)),
    "has a name of torch as dtype": (config(dtype="nn"), ("model",)),
    "has an unknown activation": (config(hidden_act="tanhh"), ("tanhh",)),
    "has a number as activation": (config(hidden_act=3), ("model",)),
    "has a list of activations": (config(hidden_act=["silu"]), ("model",)),
    "has a text as rope": (config(rope_parameters="default"), ("model",)),
    "has an unknown rope": (config(rope_parameters={"rope_type": "twist"}), ("twist",)),
    "has a text as rope's theta": (
        config(rope_parameters={"rope_type": "default", "rope_theta": "x"}),
        ("model",),
    ),
    "has a text as epsilon": (config(rms_norm_eps="small"), ("model", "rms_norm_eps")),
    "has a list as quantization_config": (config(quantization_config=[1]), ("quantization",)),
    "has a text as quantization_config": (config(quantization_config="int4"), ("quantization",)),
    "is quantised by awq": (config(quantization_config={"quant_method": "awq"}), ("awq",)),
    "is quantised by a list": (
        config(quantization_config={"quant_method": ["gptq"]}),
        ("quantised",),
    ),
    "is quantised by an escape": (
        config(quantization_config={"quant_method": "\x1b[2J"}),
        ("quantised",),
    ),
    "says that lrc wrote it": (config(quantization_config={"quant_method": "lrc"}), ("lrc",)),
    "names weights that are missing": (
        config(transformers_weights="other.safetensors"),
        ("transformers_weights", "missing"),
    ),
    "names weights outside": (
        config(transformers_weights="../x.safetensors"),
        ("model/config.json", "outside"),
    ),
    "names weights by a number": (config(transformers_weights=3), ("transformers_weights",)),
    "names weights that are a text": (
        config(transformers_weights="LICENSE"),
        ("transformers_weights",),
    ),
}
"""What is wrong with config.json, and what the message says."""

# ---------------------------------------------------------------- headers of safetensors

Header = dict[str, Any]


def parts(room: Path) -> tuple[Header, bytes]:
    """Returns the header and the data of the checkpoint's weight file."""
    raw = (room / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def raw_header(content: str | bytes, length: int | None = None) -> Spoil:
    """The header has this content, and says that it has this length."""
    raw = content if isinstance(content, bytes) else content.encode()

    def spoil(room: Path) -> None:
        _, data = parts(room)
        stated = struct.pack("<Q", len(raw) if length is None else length)
        (room / WEIGHTS).write_bytes(stated + raw + data)

    return spoil


def header(edit: Callable[[Header], object]) -> Spoil:
    """The header says something else of the same data."""

    def spoil(room: Path) -> None:
        found, _ = parts(room)
        edit(found)
        raw_header(json.dumps(found))(room)

    return spoil


def entry(**changes: Any) -> Spoil:
    """The header says something else of one tensor."""
    return header(lambda found: found[UP].update(changes))


def without(field: str) -> Spoil:
    """The header leaves something out of one tensor's entry."""
    return header(lambda found: found[UP].pop(field))


def named(name: str) -> Spoil:
    """One tensor has another name."""
    return header(lambda found: found.__setitem__(name, found.pop(UP)))


def twice(room: Path) -> None:
    """One tensor's name stands twice in the header, with the places of two tensors."""
    found, _ = parts(room)
    text = json.dumps(found)
    other = json.dumps({UP: found["model.layers.0.mlp.up_proj.weight"]})
    raw_header(f"{text[:-1]}, {other[1:]}")(room)


def moved(by: int, end: int = 0) -> Spoil:
    """One tensor's data are said to begin and end elsewhere."""

    def edit(found: Header) -> None:
        a, b = found[UP]["data_offsets"]
        found[UP]["data_offsets"] = [a + by, b + by + end]

    return header(edit)


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 137864\n"
PAGE = "<!DOCTYPE html><html><head><title>404</title></head><body>Not found</body></html>"
FILE = "model.safetensors"

HEADERS: Table = {
    "a length of zero": (raw_header("{}", 0), (FILE,)),
    "a length of one": (raw_header("{}", 1), (FILE,)),
    "a length beyond the file": (raw_header("{}", 10**7), (FILE,)),
    "a length of 2^40": (raw_header("{}", 2**40), (FILE,)),
    "a length of 2^63": (raw_header("{}", 2**63), (FILE,)),
    "a length of 2^64 - 1": (raw_header("{}", 2**64 - 1), (FILE,)),
    "no tensors": (raw_header("{}"), (FILE,)),
    "only metadata": (raw_header('{"__metadata__": {"format": "pt"}}'), (FILE,)),
    "a list": (raw_header("[]"), (FILE,)),
    "a number": (raw_header("7"), (FILE,)),
    "null": (raw_header("null"), (FILE,)),
    "white space": (raw_header("        "), (FILE,)),
    "no JSON": (raw_header("{tensor}"), (FILE,)),
    "UTF-16": (raw_header('{"a": 1}'.encode("utf-16-le")), (FILE,)),
    "bytes that are no UTF-8": (raw_header(b'{"\xff\xfe": 1}'), (FILE,)),
    "5000 digits": (raw_header('{"a": ' + "9" * 5000 + "}"), (FILE,)),
    "lists in lists": (raw_header('{"a": ' + "[" * 50_000 + "]" * 50_000 + "}"), (FILE,)),
    "a key twice": (twice, (FILE,)),
    "an entry that is a list": (header(lambda h: h.update({UP: [1]})), (FILE,)),
    "an entry that is a text": (header(lambda h: h.update({UP: "x"})), (FILE,)),
    "an entry that is null": (header(lambda h: h.update({UP: None})), (FILE,)),
    "an empty entry": (header(lambda h: h.update({UP: {}})), (FILE,)),
    "metadata that are a list": (header(lambda h: h.update(__metadata__=[])), (FILE,)),
    "metadata that are no texts": (header(lambda h: h.update(__metadata__={"a": 1})), (FILE,)),
    "metadata of a list": (header(lambda h: h.update(__metadata__={"a": ["b"]})), (FILE,)),
    "no dtype": (without("dtype"), (FILE,)),
    "no shape": (without("shape"), (FILE,)),
    "no offsets": (without("data_offsets"), (FILE,)),
    "dtype null": (entry(dtype=None), (FILE,)),
    "dtype 16": (entry(dtype=16), (FILE,)),
    "an unknown dtype": (entry(dtype="F13"), (FILE,)),
    "a dtype in small letters": (entry(dtype="bf16"), (FILE,)),
    "a dtype twice as wide": (entry(dtype="F32"), (FILE,)),
    "a dtype half as wide": (entry(dtype="I8"), (FILE,)),
    "an empty dtype": (entry(dtype=""), (FILE,)),
    "8-bit floats": (entry(dtype="F8_E4M3", shape=[96, 128]), (FILE, UP)),
    "whole numbers": (entry(dtype="I16"), (UP,)),
    "unsigned numbers": (entry(dtype="U16"), (UP,)),
    "shape null": (entry(shape=None), (FILE,)),
    "shape a number": (entry(shape=6144), (FILE,)),
    "shape a text": (entry(shape="96x64"), (FILE,)),
    "a shape of texts": (entry(shape=["96", "64"]), (FILE,)),
    "a shape of fractions": (entry(shape=[96.5, 64]), (FILE,)),
    "a negative shape": (entry(shape=[-96, -64]), (FILE,)),
    "a shape of lists": (entry(shape=[[96, 64]]), (FILE,)),
    "an empty shape": (entry(shape=[]), (FILE,)),
    "a shape with zero": (entry(shape=[0, 64]), (FILE,)),
    "a shape of 2^32 squared": (entry(shape=[2**32, 2**32]), (FILE,)),
    "a shape that overflows to the size": (entry(shape=[96, 64, 1, 2**64 + 1]), (FILE,)),
    "a shape of 10^30": (entry(shape=[10**30]), (FILE,)),
    "a shape with a bool": (entry(shape=[True, 6144]), (FILE,)),
    "a shape turned round": (entry(shape=[64, 96]), (UP,)),
    "a flat shape": (entry(shape=[6144]), (UP,)),
    "a shape of four sides": (entry(shape=[96, 8, 8, 1]), (UP,)),
    "offsets null": (entry(data_offsets=None), (FILE,)),
    "offsets of texts": (entry(data_offsets=["0", "1"]), (FILE,)),
    "offsets of fractions": (entry(data_offsets=[0.0, 12288.0]), (FILE,)),
    "negative offsets": (entry(data_offsets=[-12288, 0]), (FILE,)),
    "offsets turned round": (entry(data_offsets=[12288, 0]), (FILE,)),
    "one offset": (entry(data_offsets=[0]), (FILE,)),
    "three offsets": (entry(data_offsets=[0, 12288, 12288]), (FILE,)),
    "offsets of 2^64": (entry(data_offsets=[2**64, 2**64 + 12288]), (FILE,)),
    "offsets beyond the file": (moved(10**6), (FILE,)),
    "offsets one further": (moved(1), (FILE,)),
    "offsets into another tensor": (moved(-12288), (FILE,)),
    "an end one too far": (moved(0, 1), (FILE,)),
    "an end one too early": (moved(0, -1), (FILE,)),
    "a tensor left out": (header(lambda h: h.pop(UP)), (FILE,)),
    "an empty name": (named(""), (UP,)),
    "a name with a NUL": (named("a\0b"), (FILE,)),
    "a name with an escape": (named("\x1b[2J"), (FILE,)),
    "a name that writes leftwards": (named("\u202egpj"), (UP,)),
    "a name of 100000 letters": (named("n" * 100_000), (FILE,)),
    "a name with dots": (named("..."), (UP,)),
    "a name of another letter": (named(UP.replace("up", "\u0443p")), (UP,)),
    "data cut by one byte": (cut(WEIGHTS, -1), (FILE,)),
    "data cut by half": (cut(WEIGHTS, 70_000), (FILE,)),
    "a header cut short": (cut(WEIGHTS, 500), (FILE,)),
    "seven bytes": (cut(WEIGHTS, 7), (FILE,)),
    "eight bytes": (cut(WEIGHTS, 8), (FILE,)),
    "no bytes": (cut(WEIGHTS, 0), (FILE,)),
    "more bytes at the end": (
        lambda room: (room / WEIGHTS).write_bytes((room / WEIGHTS).read_bytes() + b"\0"),  # type: ignore[func-returns-value]
        (FILE,),
    ),
    "zeros": (write(WEIGHTS, bytes(100_000)), (FILE,)),
    "a pointer of git": (write(WEIGHTS, LFS), (FILE,)),
    "a page of a web site": (write(WEIGHTS, PAGE), (FILE,)),
    "a pickle": (
        lambda room: torch.save({UP: torch.ones(2)}, room / WEIGHTS),
        (FILE,),
    ),
    "a gzip": (write(WEIGHTS, b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03"), (FILE,)),
    "a directory's name": (instead(WEIGHTS, os.mkdir), ("model",)),
    "a pipe's name": (instead(WEIGHTS, pipe), ("model",)),
    "a socket's name": (instead(WEIGHTS, bound_socket), ("model",)),
    "a device's name": (instead(WEIGHTS, link("/dev/zero")), ("model",)),
    "a link to nothing": (instead(WEIGHTS, link("nowhere.safetensors")), ("model",)),
    "a link to itself": (instead(WEIGHTS, link("model.safetensors")), ("model",)),
}
"""What is wrong with model.safetensors, and what the message says."""

# ---------------------------------------------------------------- indexes


def sharded(room: Path, change: Callable[[Header], object] = len) -> None:
    """The weights lie in two shards with an index, which is then changed."""
    state = pico.read_state(room / WEIGHTS)
    (room / WEIGHTS).unlink()
    names = list(state)
    places = {name: f"model-0000{1 + (i > 4)}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(places.values()):
        held = {name: state[name] for name in names if places[name] == file}
        save_file(held, room / "model" / file, {"format": "pt"})
    index: Header = {"metadata": {"total_size": 1}, "weight_map": places}
    change(index)
    (room / INDEX).write_text(json.dumps(index))


def index(change: Callable[[Header], object]) -> Spoil:
    """The index of two shards says something else."""
    return functools.partial(sharded, change=change)


def mapped(value: Any, key: str = UP) -> Spoil:
    """The index names something else for a tensor."""
    return index(lambda found: found["weight_map"].update({key: value}))


def index_text(content: str | bytes) -> Spoil:
    """The index of two shards has this content."""
    return both(sharded, write(INDEX, content))


JSON = "model.safetensors.index.json"
SECOND = "model/model-00002-of-00002.safetensors"

INDEXES: Table = {
    "is empty": (index_text(""), (JSON,)),
    "is cut short": (index_text('{"weight_map": {'), (JSON,)),
    "is a list": (index_text("[]"), (JSON,)),
    "is an empty object": (index_text("{}"), (JSON, "weight_map")),
    "is UTF-16": (index_text("{}".encode("utf-16")), (JSON,)),
    "has 5000 digits": (index_text('{"weight_map": ' + "9" * 5000 + "}"), (JSON,)),
    "is nested deeply": (index_text('{"weight_map": ' + "[" * 100_000), (JSON,)),
    "is a pipe": (both(sharded, instead(INDEX, pipe)), (JSON,)),
    "is a directory": (both(sharded, instead(INDEX, os.mkdir)), (JSON,)),
    "is a device": (both(sharded, instead(INDEX, link("/dev/zero"))), (JSON,)),
    "is a loop of links": (both(sharded, instead(INDEX, link(JSON))), ("model",)),
    "is missing": (both(sharded, remove(INDEX)), ("model", "index")),
    "has an empty map": (index(lambda x: x.update(weight_map={})), (JSON, "weight_map")),
    "has a list as map": (index(lambda x: x.update(weight_map=[1])), (JSON, "weight_map")),
    "has null as map": (index(lambda x: x.update(weight_map=None)), (JSON, "weight_map")),
    "has no map": (index(lambda x: x.pop("weight_map")), (JSON, "weight_map")),
    "names a number": (mapped(7), (JSON, "weight_map")),
    "names null": (mapped(None), (JSON, "weight_map")),
    "names a list": (mapped(["a"]), (JSON, "weight_map")),
    "names nothing": (mapped(""), (JSON,)),
    "names a dot": (mapped("."), (JSON,)),
    "names dots": (mapped(".."), (JSON, "outside")),
    "names the folder above": (mapped("../text.txt"), (JSON, "outside")),
    "names a file above": (mapped("../model/model.safetensors"), (JSON, "outside")),
    "names an absolute path": (mapped("/etc/passwd"), (JSON, "outside")),
    "names a path of Windows": (mapped("C:\\x.safetensors"), (JSON, "outside")),
    "names a path above of Windows": (mapped("..\\x.safetensors"), (JSON, "outside")),
    "names a way round": (mapped("a/../../x.safetensors"), (JSON, "outside")),
    "names a NUL": (mapped("a\0b.safetensors"), (JSON,)),
    "names an escape": (mapped("\x1b[2J.safetensors"), (JSON, "missing")),
    "names a lone surrogate": (mapped("\ud800.safetensors"), (JSON,)),
    "names a long file": (mapped("n" * 5000 + ".safetensors"), (JSON,)),
    "names a missing shard": (mapped("model-00003-of-00003.safetensors"), (JSON, "missing")),
    "names the licence": (mapped("LICENSE"), (JSON,)),
    "names config.json": (mapped("config.json"), (JSON,)),
    "names itself": (mapped(JSON), (JSON,)),
    "names the other shard": (mapped("model-00001-of-00002.safetensors"), (JSON, UP)),
    "names a tensor that no shard has": (
        mapped("model-00001-of-00002.safetensors", "model.ghost"),
        (JSON, "model.ghost"),
    ),
    "leaves a tensor out": (index(lambda x: x["weight_map"].pop(UP)), (JSON, UP)),
    "has a key twice": (
        index_text('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}'),
        (JSON, "twice"),
    ),
    "has a shard that is gone": (both(sharded, remove(SECOND)), ("model-00002", "missing")),
    "has a shard that is empty": (both(sharded, write(SECOND, "")), ("model-00002",)),
    "has a shard that is cut": (both(sharded, cut(SECOND, -10)), ("model-00002",)),
    "has a shard that is a pipe": (both(sharded, instead(SECOND, pipe)), ("model-00002",)),
    "has a shard that is a directory": (
        both(sharded, instead(SECOND, os.mkdir)),
        ("model-00002",),
    ),
    "has a shard that is a pickle": (
        both(sharded, lambda room: torch.save(Runs(), room / SECOND)),
        ("model-00002",),
    ),
}
"""What is wrong with the index of two shards, and what the message says."""

# ---------------------------------------------------------------- pickles


def pickled(make: Callable[[Mapping[str, torch.Tensor]], Any], **options: Any) -> Spoil:
    """The weights lie in a file of torch.save, which holds what `make` returns."""

    def spoil(room: Path) -> None:
        state = pico.read_state(room / WEIGHTS)
        (room / WEIGHTS).unlink()
        torch.save(make(state), room / PICKLE, **options)

    return spoil


def bin_file(content: bytes) -> Spoil:
    """A file of torch.save has this content."""
    return both(remove(WEIGHTS), write(PICKLE, content))


def zipped(members: Mapping[str, bytes]) -> Spoil:
    """A file of torch.save is a zip with these members."""

    def spoil(room: Path) -> None:
        (room / WEIGHTS).unlink()
        with zipfile.ZipFile(room / PICKLE, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in members.items():
                archive.writestr(name, content)

    return spoil


def changed(value: Callable[[torch.Tensor], Any], key: str = UP) -> Callable[[Any], Any]:
    """Returns a state with another value for one tensor."""
    return lambda state: {**state, key: value(state[key])}


OLD = {"_use_new_zipfile_serialization": False}
BIN = "pytorch_model.bin"
SYSTEM = b"cposix\nsystem\n(S'touch ran'\ntR."

PICKLES: Table = {
    "runs code": (pickled(lambda _: Runs()), (BIN, "code")),
    "runs code in the old format": (pickled(lambda _: Runs(), **OLD), (BIN,)),
    "runs code beside the weights": (pickled(lambda s: {**s, "x": Runs()}), (BIN, "code")),
    "runs code as a key": (pickled(lambda s: {**s, Runs(): 1}), (BIN, "code")),
    "runs code in a list": (pickled(lambda s: {**s, "x": [[Runs()]]}), (BIN, "code")),
    "runs a command": (bin_file(SYSTEM), (BIN,)),
    "runs a command in a zip": (
        zipped({"a/data.pkl": SYSTEM, "a/version": b"3"}),
        (BIN,),
    ),
    "calls a function of torch": (
        bin_file(b"ctorch.hub\nload\n(S'a/b'\nS'c'\ntR."),
        (BIN,),
    ),
    "is empty": (bin_file(b""), (BIN,)),
    "is a text": (bin_file(b"hello"), (BIN,)),
    "is a pointer of git": (bin_file(LFS.encode()), (BIN,)),
    "is zeros": (bin_file(bytes(1000)), (BIN,)),
    "is half a pickle": (both(pickled(dict, **OLD), cut(PICKLE, 5000)), (BIN,)),
    "is half a zip": (both(pickled(dict), cut(PICKLE, 5000)), (BIN,)),
    "lacks its last bytes": (both(pickled(dict), cut(PICKLE, -30)), (BIN,)),
    "is a zip of nothing": (zipped({}), (BIN,)),
    "is a zip of a text": (zipped({"a.txt": b"hello"}), (BIN,)),
    "is a zip without its pickle": (zipped({"a/version": b"3"}), (BIN,)),
    "is a zip with names above": (zipped({"../ran": b"x", "a/data.pkl": b"N."}), (BIN,)),
    "is a script": (zipped({"a/data.pkl": b"N.", "a/code/x.py": b"pass"}), (BIN, "TorchScript")),
    "is a program": (zipped({"a/archive_format": b"pt2"}), (BIN, "torch.export")),
    "is deflated": (zipped({"a/data.pkl": b"}.", "a/version": b"3"}), (BIN,)),
    "holds null": (pickled(lambda _: None), (BIN, "NoneType")),
    "holds a list": (pickled(lambda s: list(s.values())), (BIN, "list")),
    "holds a number": (pickled(lambda _: 7), (BIN, "int")),
    "holds a text": (pickled(lambda _: "weights"), (BIN, "str")),
    "holds a tensor": (pickled(lambda s: s[UP]), (BIN, "Tensor")),
    "holds an empty state": (pickled(lambda _: {}), (BIN,)),
    "holds no tensors": (pickled(lambda _: {"lr": 0.1}), (BIN,)),
    "holds a module": (pickled(lambda _: torch.nn.Linear(2, 2)), (BIN, "code")),
    "has numbers as names": (pickled(lambda s: dict(enumerate(s.values()))), ("model",)),
    "has a tuple as a name": (pickled(lambda s: {**s, (1, 2): s[UP]}), ("model",)),
    "has a sparse tensor": (pickled(changed(torch.Tensor.to_sparse)), (BIN, UP)),
    "has a meta tensor": (pickled(changed(lambda t: t.to("meta"))), (BIN, UP)),
    "has a quantised tensor": (
        pickled(
            changed(lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8)),
        ),
        (UP,),
    ),
    "has complex numbers": (pickled(changed(lambda t: t.to(torch.complex64))), (UP,)),
    "has whole numbers": (pickled(changed(lambda t: t.to(torch.int32))), (UP,)),
    "has an empty tensor": (pickled(changed(lambda t: t[:0])), (UP,)),
    "has a tensor without sides": (pickled(changed(lambda t: t[0, 0])), (UP,)),
    "has a broadcast tensor of NaN": (
        pickled(changed(lambda t: torch.full((1, 1), math.nan).expand(t.shape))),
        (UP, "NaN"),
    ),
    "has a number for a tensor": (pickled(changed(lambda t: 3)), (UP,)),
    "has a list for a tensor": (pickled(changed(lambda t: [1, 2])), (UP,)),
    "has a missing tensor": (pickled(lambda s: {k: t for k, t in s.items() if k != UP}), (UP,)),
    "is two states": (
        pickled(lambda s: {"generator": dict(s), "critic": {k: -t for k, t in s.items()}}),
        (BIN, "state dict"),
    ),
    "is a pipe": (both(remove(WEIGHTS), instead(PICKLE, pipe)), ("model",)),
    "is a device": (both(remove(WEIGHTS), instead(PICKLE, link("/dev/zero"))), ("model",)),
    "is a directory": (both(remove(WEIGHTS), instead(PICKLE, os.mkdir)), ("model",)),
}
"""What is wrong with pytorch_model.bin, and what the message says."""

# ---------------------------------------------------------------- tokenizers and side files


def tokenizer(**changes: Any) -> Spoil:
    """tokenizer.json has other values."""

    def spoil(room: Path) -> None:
        file = room / "model/tokenizer.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return spoil


def tokenizer_config(**changes: Any) -> Spoil:
    """tokenizer_config.json has other values."""

    def spoil(room: Path) -> None:
        file = room / "model/tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return spoil


def vocabulary(words: Mapping[str, Any]) -> Spoil:
    """tokenizer.json knows these words only."""
    return tokenizer(model={"type": "WordLevel", "vocab": words, "unk_token": "[UNK]"})


TOKENIZER = "model/tokenizer.json"
SETTINGS = "model/tokenizer_config.json"

TOKENIZERS: Table = {
    "is missing": (remove(TOKENIZER), ("tokenizer",)),
    "is empty": (write(TOKENIZER, ""), ("tokenizer",)),
    "is a list": (write(TOKENIZER, "[]"), ("tokenizer",)),
    "is an empty object": (write(TOKENIZER, "{}"), ("tokenizer",)),
    "is cut short": (cut(TOKENIZER, 1000), ("tokenizer",)),
    "is no UTF-8": (write(TOKENIZER, b"\xff\xfe\x00"), ("tokenizer",)),
    "is a pipe": (instead(TOKENIZER, pipe), ("tokenizer",)),
    "is a directory": (instead(TOKENIZER, os.mkdir), ("tokenizer",)),
    "has no model": (tokenizer(model=None), ("tokenizer",)),
    "has an unknown model": (tokenizer(model={"type": "Telepathy"}), ("tokenizer",)),
    "has an empty vocabulary": (vocabulary({}), ("tokenizer",)),
    "has a negative id": (vocabulary({"w1": -1}), ("tokenizer",)),
    "has a text as id": (vocabulary({"w1": "x"}), ("tokenizer",)),
    "has large ids": (vocabulary({"[UNK]": 10**6, "w1": 10**6 + 1}), ("token",)),
    "has ids of 30 digits": (vocabulary({"[UNK]": 10**30}), ("tokenizer",)),
    "has a list as settings": (write(SETTINGS, "[]"), ("tokenizer",)),
    "has a number as settings": (write(SETTINGS, "7"), ("tokenizer",)),
    "has settings cut short": (write(SETTINGS, '{"a": '), ("tokenizer",)),
    "has a number as class": (tokenizer_config(tokenizer_class=7), ("tokenizer",)),
    "has code of its own": (
        both(
            tokenizer_config(
                tokenizer_class="Own", auto_map={"AutoTokenizer": ["own.Own", "own.Own"]}
            ),
            write("model/own.py", f"open({MARK!r}, 'w').close()\n"),
        ),
        ("tokenizer",),
    ),
}
"""What is wrong with the tokenizer, and what the message says."""


def _of_tables() -> Iterator[Case]:
    tables: dict[str, Table] = {
        "config.json": CONFIG,
        "the weight file has": HEADERS,
        "the index": INDEXES,
        "pytorch_model.bin": PICKLES,
        "the tokenizer": TOKENIZERS,
    }
    for what, table in tables.items():
        for name, (spoil, said) in table.items():
            yield Case(name=f"{what} {name}", said=said, spoil=spoil)


CASES = [*_of_tables(), *wrong_numbers()]
