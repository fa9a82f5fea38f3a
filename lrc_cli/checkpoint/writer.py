"""Write a checkpoint tensor by tensor, in shards, and put it in place with one rename.

A shard's header holds names, dtypes, shapes and offsets only, so it is written first and the data
streamed behind it: no shard is ever held in memory (safetensors' own `save_file` takes all tensors
of a file at once).
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from lrc_cli.checkpoint.headers import DTYPES, INDEX_NAME, SINGLE_NAME
from lrc_cli.errors import InputError, RunError
from lrc_cli.runtime.files import _writing, canonical_json, sync_directory, tensor_bytes, write_json
from lrc_cli.runtime.lock import lock_file

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
PARTIAL_SUFFIX = ".partial"
OLD_SUFFIX = ".lrc-old"
LOCK_SUFFIX = ".lrc-lock"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor to be written: its header fields now, its data when its turn comes."""

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
    """Write safetensors shards of at most `shard_bytes` of data each (a larger tensor has its own).

    Args:
        directory: an existing directory.
        entries: the tensors; every shard is filled in this order.
        shard_bytes: data bytes a shard may take.
        metadata: stored as canonical JSON under the key `lrc` beside `format: pt`; the only two
            keys, because more would need an order of their own.
    """
    shards = _split(entries, shard_bytes)
    names = (
        [SINGLE_NAME]
        if len(shards) == 1
        else [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    )
    for name, shard in zip(names, shards, strict=True):
        with _writing(directory / name) as handle:
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
    # Widest dtype first keeps every tensor aligned to its own item size.
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


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's bytes, making its directory, and flush them to the disk."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as reader, _writing(target) as writer:
        shutil.copyfileobj(reader, writer, 1 << 20)


# ---------------------------------------------------------------- the rename at the end

_locks: dict[Path, BinaryIO] = {}
"""What keeps other processes from an output, from `begin` to `publish` or `discard`."""


def begin(output: Path) -> Path:
    """An empty `OUT.partial/` beside the output, in place of whatever a crash left there.

    Raises:
        RunError: another run is writing the output.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    _lock(output)
    _finish(output)
    partial = output.with_name(output.name + PARTIAL_SUFFIX)
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir()
    return partial


def discard(output: Path) -> None:
    """Remove `OUT.partial/`, so that a failed run leaves nothing that looks like an output."""
    partial = output.with_name(output.name + PARTIAL_SUFFIX)
    if partial.exists():
        shutil.rmtree(partial)
    _unlock(output)


def publish(output: Path, *, force: bool) -> None:
    """Rename `OUT.partial/` to the output; with `force`, an old output is replaced.

    The old output is renamed aside first and deleted last, so one whole copy exists at any moment.
    Ends what `begin` began.

    Raises:
        RunError: the output exists and `force` is False.
    """
    partial = output.with_name(output.name + PARTIAL_SUFFIX)
    old = output.with_name(output.name + OLD_SUFFIX)
    if output.exists():
        if not force:
            raise RunError(
                f"{output}: appeared while the run went on", "give --force to replace it"
            )
        output.rename(old)
    for directory in (*(path for path in partial.rglob("*") if path.is_dir()), partial):
        sync_directory(directory)
    partial.rename(output)
    sync_directory(output.parent)
    if old.exists():
        shutil.rmtree(old)
    _unlock(output)


def tidy(output: Path) -> None:
    """Finish what a crash inside `publish` left: exactly one whole output, and no old copy.

    Raises:
        RunError: another run is writing the output.
    """
    if not output.with_name(output.name + OLD_SUFFIX).exists():
        return
    is_ours = output in _locks
    _lock(output)
    _finish(output)
    if not is_ours:
        _unlock(output)


def _finish(output: Path) -> None:
    old = output.with_name(output.name + OLD_SUFFIX)
    if not old.exists():
        return
    if output.exists():
        shutil.rmtree(old)
    else:
        old.rename(output)


def _lock(output: Path) -> None:
    if output in _locks:
        return
    handle = lock_file(output.with_name(output.name + LOCK_SUFFIX))
    if handle is None:
        raise RunError(f"{output}: another lrc run is writing it", "wait for it to end")
    _locks[output] = handle


def _unlock(output: Path) -> None:
    if output in _locks:
        output.with_name(output.name + LOCK_SUFFIX).unlink(missing_ok=True)
        _locks.pop(output).close()


def resolve_output(path: str) -> Path:
    """The absolute path of the output directory; a link stands for the directory it leads to.

    Raises:
        InputError: the path has no name, or is a link to nothing.
    """
    if Path(path).is_symlink() and not Path(path).exists():
        raise InputError(f"output.path: {path} is a link to nothing", "remove it")
    output = Path(path).resolve()
    if not output.name:
        raise InputError(f"output.path: {path!r} is not a directory to write", "choose another one")
    return output


def check_writable(directory: Path, key: str) -> None:
    """Raise InputError, naming the config's key, if nothing can be made in the directory, or in the
    nearest one on the way to it that is there."""
    place = directory.absolute()
    while not os.path.lexists(place):
        place = place.parent
    problem = why_not_writable(place)
    if problem is not None:
        raise InputError(
            f"{key}: {place} is not a writable directory ({problem})", f"choose another {key}"
        )


def why_not_writable(directory: Path) -> str | None:
    """What the system says if nothing can be made in a directory; None: something can.

    It is tried: asked by os.access, root may write everywhere, in /proc and on read-only disks too.
    """
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".lrc-", dir=directory))
    except OSError as error:
        return error.strerror
    return None
