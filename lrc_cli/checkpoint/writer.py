"""This module writes a checkpoint's weights tensor by tensor, in shards.

A shard's header holds only names, dtypes, shapes and offsets, so the header is written first and
the data follow tensor by tensor. No shard is ever held in memory, while safetensors' own
`save_file` needs all tensors of a file at once.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from lrc_cli.checkpoint.headers import DTYPES, INDEX_NAME, SINGLE_NAME
from lrc_cli.runtime.files import canonical_json, tensor_bytes, write_json, writing

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A tensor to be written: its key, shape and dtype, and a function that reads the data."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor's data."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_weights(
    directory: Path, entries: Iterable[Entry], *, shard_bytes: int, metadata: dict[str, Any]
) -> None:
    """Writes safetensors shards of at most `shard_bytes` of data each.

    A tensor with more bytes gets a shard alone.

    Args:
        directory: an existing directory.
        entries: the tensors; every shard is filled in this order.
        shard_bytes: the most bytes of data in a shard.
        metadata: stored as canonical JSON under the key `lrc`, beside `format: pt`. There are no
            other keys, because more keys would need a fixed order.
    """
    shards = _split(entries, shard_bytes)
    names = (
        [SINGLE_NAME]
        if len(shards) == 1
        else [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    )
    for name, shard in zip(names, shards, strict=True):
        with writing(directory / name) as handle:
            _write_shard(handle, shard, metadata)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(entry.num_bytes for shard in shards for entry in shard)},
            "weight_map": {
                entry.key: name
                for name, shard in zip(names, shards, strict=True)
                for entry in shard
            },
        }
        write_json(directory / INDEX_NAME, index)


def _split(entries: Iterable[Entry], shard_bytes: int) -> list[list[Entry]]:
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.num_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.num_bytes
    return shards


def _write_shard(handle: BinaryIO, entries: list[Entry], metadata: dict[str, Any]) -> None:
    # With the widest dtype first, every tensor is aligned to its item size.
    ordered = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "lrc": canonical_json(metadata)}}
    offset = 0
    for entry in ordered:
        header[entry.key] = {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.num_bytes],
        }
        offset += entry.num_bytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    handle.write(len(text).to_bytes(8, "little") + text)
    for entry in ordered:
        tensor = entry.read()
        assert tuple(tensor.shape) == entry.shape and tensor.dtype == entry.dtype, entry.key
        handle.write(tensor_bytes(tensor.cpu()))
