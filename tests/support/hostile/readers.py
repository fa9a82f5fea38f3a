"""Readers of bytes: each takes its input, or refuses it in a few words and within bounds.

`make fuzz` tries bytes on them for minutes, starting from the good files.
"""

import functools
import io
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pico
import pyarrow
import torch
from pyarrow import parquet

from hostile.properties import (
    FILE,
    GOOD,
    INDEX,
    MANIFEST,
    SHARDS,
    TENSORS,
    read_config,
    read_weight_file,
    refused,
    scratch,
)
from lrc_cli.checkpoint.choice import forms_of
from lrc_cli.checkpoint.manifest import find_added, find_changed, is_own_output
from lrc_cli.checkpoint.source import Source, open_source
from lrc_cli.data import npz
from lrc_cli.data.processors import open_tokenizer
from lrc_cli.data.records import read_records
from lrc_cli.data.special_tokens import token_ids


@dataclass(frozen=True)
class Reader:
    """What reads bytes, and bytes that it takes."""

    holds: Callable[[bytes], Any]
    """Returns what was read, if anything; raises an error for what the reader must not do."""
    good: Callable[[], list[bytes]]
    """Files that are taken."""


def _put(name: str, raw: bytes) -> Path:
    """Returns the only file of a folder, with these bytes."""
    folder = scratch() / name
    folder.mkdir(exist_ok=True)
    file = folder / name
    file.write_bytes(raw)
    return file


def _config(raw: bytes) -> Any:
    return read_config(raw.decode(errors="replace"))


def _index(raw: bytes) -> Any:
    file = _put("model.safetensors.index.json", raw)
    for name in SHARDS:
        (file.parent / name).touch()
    return refused(lambda: forms_of(file.parent))


def _manifest(raw: bytes) -> Any:
    """A manifest is lrc's or not, and what it says of other files is followed or passed over."""
    folder = _put("manifest.json", raw).parent
    (folder / "lrc.yaml").touch()
    if is_own_output(folder):
        return find_added(folder), find_changed(folder)
    return None


def _records(suffix: str) -> Callable[[bytes], Any]:
    return lambda raw: refused(lambda: list(read_records(_put(f"x.{suffix}", raw), "text")))


def _npz(raw: bytes) -> Any:
    return refused(lambda: npz.read_npz(_put("x.npz", raw)))


def _torch(raw: bytes) -> Any:
    file = _put("pytorch_model.bin", raw)
    return refused(lambda: open_source(file.parent))


@functools.cache
def _checkpoint() -> Source:
    folder = scratch() / "checkpoint"
    pico.write_model(folder, "llama")
    return open_source(folder)


def _tokenizer(raw: bytes) -> Any:
    """A tokenizer is opened, and makes numbers of a text."""
    source = _checkpoint()
    (source.path / "tokenizer.json").write_bytes(raw)

    def read() -> list[int]:
        return token_ids(open_tokenizer(source), "w1 w2 [PAD]", "x.txt")

    return refused(read)


def _good_npz() -> list[bytes]:
    arrays = {"input_ids": np.ones((2, 3), dtype=np.int64)}
    files = [io.BytesIO(), io.BytesIO()]
    np.savez(files[0], **arrays)
    np.savez_compressed(files[1], **arrays)
    return [file.getvalue() for file in files]


def _good_parquet() -> list[bytes]:
    table, files = pyarrow.table({"text": ["one", "two", "one"]}), []
    for is_dictionary in (True, False):
        buffer = io.BytesIO()
        parquet.write_table(
            table, buffer, use_dictionary=is_dictionary, compression="none", store_schema=False
        )
        files.append(buffer.getvalue())
    return files


def _good_torch() -> list[bytes]:
    files = []
    for is_archive in (True, False):
        buffer = io.BytesIO()
        torch.save(TENSORS, buffer, _use_new_zipfile_serialization=is_archive)
        files.append(buffer.getvalue())
    return files


def _good_tokenizers() -> list[bytes]:
    files = []
    for write in (pico.write_tokenizer, pico.write_character_tokenizer):
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder))
            files.append((Path(folder) / "tokenizer.json").read_bytes())
    return files


READERS = {
    "config": Reader(_config, lambda: [GOOD.encode()]),
    "csv": Reader(_records("csv"), lambda: [b'n,text\n1,one\n2,"t,w\n""o"\n']),
    "index": Reader(_index, lambda: [json.dumps(INDEX).encode()]),
    "jsonl": Reader(_records("jsonl"), lambda: [b'{"text": "one"}\n\n{"n": [1], "text": "two"}\n']),
    "manifest": Reader(_manifest, lambda: [json.dumps(MANIFEST).encode()]),
    "npz": Reader(_npz, _good_npz),
    "parquet": Reader(_records("parquet"), _good_parquet),
    "safetensors": Reader(read_weight_file, lambda: [FILE]),
    "tokenizer": Reader(_tokenizer, _good_tokenizers),
    "torch": Reader(_torch, _good_torch),
}
"""Every reader by the name of what it reads."""
