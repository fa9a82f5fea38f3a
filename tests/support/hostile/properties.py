"""Properties of readers that hold for every input; `make fuzz` tries them for minutes."""

import copy
import functools
import json
import struct
import tempfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from hypothesis import strategies as st
from safetensors.torch import load, save

from hostile.configs import LEAVES, pristine_tree
from hostile.configs import put as put_key
from lrc_cli.checkpoint.choice import forms_of
from lrc_cli.checkpoint.headers import DTYPES, file_headers
from lrc_cli.checkpoint.manifest import find_added, is_own_output
from lrc_cli.config import parse_config, to_yaml
from lrc_cli.errors import InputError
from lrc_cli.reading import parse_json
from lrc_cli.report.record import parse_record

LONGEST = 20_000
"""The characters of an error that quotes what was read; the terminal gets a part of them."""

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(
        [0, 1, -1, 2**31, 2**63, 2**64, 10**30, 1e308, "", "\0", "\x1b[2J", "a" * 2000]
    ),
)
JSON = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)


def refused(call: Callable[[], Any], *, says: str = "") -> Any:
    """Returns what the call returns, or None where it refuses its input in a few words."""
    try:
        return call()
    except InputError as error:
        assert says in str(error), error
        assert 0 < len(str(error)) < LONGEST
        return None


@functools.cache
def scratch() -> Path:
    """Returns a folder for the files of the properties."""
    made = tempfile.TemporaryDirectory(prefix="lrc-fuzz-")
    KEPT.append(made)
    return Path(made.name)


KEPT: list[Any] = []
"""Folders that are deleted when the process ends."""

# ---------------------------------------------------------------- configs

GOOD = yaml.safe_dump(pristine_tree(), sort_keys=False)
PIECES = [*"[]{}|>?\"'", "model:", "  ", "- ", "&a ", "*a", "!!int ", ": "]


@st.composite
def config_texts(draw: Any) -> str:
    """Texts near a good config: pieces are replaced, taken out and put in."""
    text = GOOD
    for _ in range(draw(st.integers(0, 5))):
        at, length = draw(st.integers(0, len(text))), draw(st.integers(0, 12))
        piece = draw(st.one_of(st.sampled_from(PIECES), st.text(max_size=8)))
        text = text[:at] + piece + text[at + length :]
    return text


def read_config(text: str) -> Any:
    """A text is a config, which reads back from what is written of it, or is refused by place."""
    config = refused(lambda: parse_config(text, "job.yaml"), says="job.yaml")
    if config is not None:
        assert parse_config(to_yaml(config), "again.yaml") == config
    return config


KEYS = [f"{section}.{key}" for section, keys in LEAVES.items() for key in keys]


@st.composite
def config_trees(draw: Any) -> Any:
    """Configs with any values for some keys."""
    tree = pristine_tree()
    for place in draw(st.lists(st.sampled_from(KEYS), min_size=1, max_size=4)):
        way = place.split(".", 2) if place.startswith("compression.layers.") else place.split(".")
        try:
            put_key(tree, way, draw(JSON))
        except (AttributeError, IndexError, TypeError, ValueError):
            continue  # a key above is no mapping any more
    return tree


def read_config_tree(tree: Any) -> None:
    """Values are a config or refused, and a config reads back from what is written of it."""
    try:
        text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    except (ValueError, UnicodeError):
        return  # a text that no YAML holds
    read_config(text)


# ---------------------------------------------------------------- headers

TENSORS = {"a": torch.ones(2, 3), "b.weight": torch.ones(4, dtype=torch.bfloat16)}
FILE = save(TENSORS, {"format": "pt"})
(LENGTH,) = struct.unpack("<Q", FILE[:8])
HEADER: dict[str, Any] = json.loads(FILE[8 : 8 + LENGTH])


@st.composite
def changed(draw: Any, value: Any) -> Any:
    """A JSON value with one or two of its parts replaced, taken out or put in."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 2))):
        here = value
        while True:
            keys = list(here) if isinstance(here, dict) else list(range(len(here)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            below = here[key]
            if isinstance(below, dict | list) and below and draw(st.booleans()):
                here = below
                continue
            if draw(st.integers(0, 3)) == 0:
                del here[key]
            else:
                here[key] = draw(JSON)
            break
    return value


@st.composite
def weight_files(draw: Any) -> bytes:
    """Files near a good one: another header, another length, other bytes."""
    kind = draw(st.sampled_from(["header", "bytes", "length", "text"]))
    if kind == "bytes":
        raw = bytearray(FILE)
        for _ in range(draw(st.integers(1, 4))):
            raw[draw(st.integers(0, len(raw) - 1))] = draw(st.integers(0, 255))
        return bytes(raw[: draw(st.integers(0, len(raw)))]) if draw(st.booleans()) else bytes(raw)
    if kind == "length":
        return struct.pack("<Q", draw(st.integers(0, 2**64 - 1))) + FILE[8:]
    if kind == "text":
        head = draw(st.binary(max_size=200))
        return struct.pack("<Q", len(head)) + head + FILE[8 + LENGTH :]
    head = json.dumps(draw(changed(HEADER))).encode()
    return struct.pack("<Q", len(head)) + head + FILE[8 + LENGTH :]


def library_reads(raw: bytes) -> Mapping[str, torch.Tensor] | None:
    """Returns what safetensors itself reads; None where it refuses the file."""
    try:
        return load(raw)
    except Exception:  # whatever the library raises is a refusal
        return None


def read_weight_file(raw: bytes) -> Any:
    """lrc reads no file that safetensors refuses, and sees the same names, shapes and dtypes."""
    file = scratch() / "x.safetensors"
    file.write_bytes(raw)
    headers = refused(lambda: file_headers(file), says="x.safetensors")
    theirs = library_reads(raw)
    if headers is not None:
        assert theirs is not None, "safetensors refuses what lrc reads"
        found = {key: (info.shape, info.dtype) for key, info in headers.items()}
        assert found == {key: (tuple(t.shape), t.dtype) for key, t in theirs.items()}
    elif theirs is not None:
        known = all(t.dtype in DTYPES.values() for t in theirs.values())
        plain = all(key.isprintable() and 0 < len(key) <= 1000 for key in theirs)
        assert not (known and plain and theirs), "lrc refuses what safetensors reads"
    return headers


# ---------------------------------------------------------------- indexes

SHARDS = ("a-00001-of-00002.safetensors", "a-00002-of-00002.safetensors")
INDEX: dict[str, Any] = {
    "metadata": {"total_size": 1},
    "weight_map": {f"layer.{i}": SHARDS[i % 2] for i in range(4)},
}
NAMES = st.one_of(
    st.sampled_from([*SHARDS, "../x.safetensors", "/etc/passwd", "C:\\x", ".", "", "b.bin", "a/b"]),
    st.text(max_size=12),
)


@st.composite
def indexes(draw: Any) -> Any:
    """Indexes near a good one: other names of files, or other values anywhere."""
    found = copy.deepcopy(INDEX)
    if draw(st.booleans()):
        return draw(changed(found))
    found["weight_map"] |= draw(st.dictionaries(st.text(max_size=6), NAMES, max_size=3))
    return found


def read_index(index: Any) -> None:
    """An index is followed exactly where every name is a shard that lies beside it."""
    folder = scratch() / "index"
    folder.mkdir(exist_ok=True)
    for name in SHARDS:
        (folder / name).write_bytes(b"")
    try:
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    except UnicodeError:
        return
    forms = refused(lambda: forms_of(folder))
    weight_map = index.get("weight_map")
    is_good = isinstance(weight_map, dict) and bool(weight_map)
    is_good = is_good and all(name in SHARDS for name in weight_map.values())
    if forms is None:
        return
    for form in forms:
        assert all(file.resolve().parent == folder.resolve() for file in form.files)
        if form.weight_map is not None:
            assert is_good and dict(form.weight_map) == weight_map


# ---------------------------------------------------------------- reports and manifests


def read_report(value: Any) -> None:
    """A report is read, and written again as it was, or refused with the place."""
    text = json.dumps(value)
    record = refused(lambda: parse_record(parse_json(text, "report.json")), says="report.json")
    if record is not None:
        assert parse_record(json.loads(json.dumps(record.to_json()))) == record


def read_manifest(value: Any) -> None:
    """A manifest makes a folder an output of lrc's, or does not; no other file is touched."""
    folder = scratch() / "manifest"
    folder.mkdir(exist_ok=True)
    (folder / "manifest.json").write_text(json.dumps(value))
    if is_own_output(folder):
        assert isinstance(value["files"], dict)
        find_added(folder)
    assert [path.name for path in folder.iterdir()] == ["manifest.json"]


MANIFEST = {
    "manifest_version": 1,
    "files": {"lrc.yaml": "0" * 64, "report.json": "0" * 64},
    "tensors": {"a": "0" * 64},
}


def read_json_text(text: str) -> None:
    """A text is JSON that Python reads too, or refused by name."""
    value = refused(lambda: parse_json(text, "x.json"), says="x.json")
    if value is not None:
        assert zlib.crc32(repr(value).encode("utf-8", "surrogatepass")) == zlib.crc32(
            repr(json.loads(text)).encode("utf-8", "surrogatepass")
        )


def properties(report: Any) -> dict[str, tuple[st.SearchStrategy[Any], Callable[[Any], None]]]:
    """Returns every property by name: the inputs, and what must hold for each.

    Args:
        report: a report of a finished output, as parsed JSON.
    """
    return {
        "configs as texts": (config_texts(), read_config),
        "configs as values": (config_trees(), read_config_tree),
        "headers of weight files": (weight_files(), read_weight_file),
        "indexes": (indexes(), read_index),
        "reports": (changed(report), read_report),
        "manifests": (changed(MANIFEST), read_manifest),
        "JSON": (st.text(max_size=60) | JSON.map(json.dumps), read_json_text),
    }
