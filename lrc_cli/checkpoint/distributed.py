"""This module reads the shards of tensors that torch.distributed.checkpoint (FSDP) wrote.

torch's own reader unpickles `.metadata` without restraint, and would run any code that a foreign
checkpoint names. Here the file may name only the classes that describe tensors.
"""

import io
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_shards

from lrc_cli.checkpoint.choice import METADATA_NAME
from lrc_cli.checkpoint.headers import TensorInfo, check_name
from lrc_cli.checkpoint.wrapped import find_state
from lrc_cli.errors import InputError
from lrc_cli.reading import read_bytes
from lrc_cli.runtime.memory import give_back_freed_memory
from lrc_cli.runtime.spill import Spool
from lrc_cli.text import named

METADATA_BYTES = 64_000_000
"""The most bytes of `.metadata`."""
LARGE = 1 << 17
"""A read of more bytes than this gives freed memory back to the system."""
_METADATA = "torch.distributed.checkpoint.metadata"
_CLASSES = {
    "builtins": {"set", "frozenset"},
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath", "PurePath", "PurePosixPath"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    _METADATA: {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
}


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """A stored tensor: its name in the checkpoint, and its shape and dtype."""

    fqn: str
    info: TensorInfo

    @property
    def shape(self) -> tuple[int, ...]:
        return self.info.shape


class DistributedFiles:
    """The tensors of a directory that torch.distributed.checkpoint wrote.

    The first read of a tensor puts the shards together in a mapped temporary file. Private memory
    holds one shard of one tensor at a time.

    Args:
        path: the directory.
        state_dict: the keys that lead to the state dict, as `find_state` takes them; None: the only
            state dict.
    """

    def __init__(self, path: Path, state_dict: str | None = None) -> None:
        self.place = path / METADATA_NAME
        self._reader = _Reader(path)
        metadata = self._reader.read_metadata()
        self.files = _files(path, metadata)
        state = find_state(_tree(path, metadata), _Entry, path, chosen=state_dict)
        self.tensors = {key: entry.info for key, entry in state.items()}
        self._fqns = {key: entry.fqn for key, entry in state.items()}
        self._spool = Spool()
        self._kept: dict[str, torch.Tensor] = {}

    def read(self, key: str) -> torch.Tensor:
        """Returns the whole tensor `key` on the CPU.

        Raises:
            InputError: the tensor's shards cannot be read.
            RunError: TMPDIR has no room for the tensor.
        """
        if key not in self._kept:
            self._kept[key] = self._assembled(key)
            if self.tensors[key].num_bytes > LARGE:
                # The holes of shards took a third of the checkpoint.
                give_back_freed_memory()
        return self._kept[key]

    def _assembled(self, key: str) -> torch.Tensor:
        info = self.tensors[key]
        tensor = self._spool.empty(info.shape, info.dtype)
        try:
            with warnings.catch_warnings(action="ignore"):  # torch warns of a single process
                load_shards({self._fqns[key]: tensor}, storage_reader=self._reader, no_dist=True)
        # torch wraps the error of a damaged shard in a class that is no Exception.
        except CheckpointException as error:
            raise InputError(
                f"{info.file.parent}: tensor {key} cannot be read from its shards",
                "copy the checkpoint again, a file may be truncated",
            ) from error
        return tensor


class _Reader(FileSystemReader):
    """torch's reader with the metadata kept: torch asks for the metadata at every load."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._metadata is None:
            self._metadata = _read_metadata(Path(self.path) / METADATA_NAME)
        return self._metadata


# The unpickler in C would reserve memory for any number that the pickle gives to an object.
class _Unpickler(pickle._Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _CLASSES.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        raise pickle.UnpicklingError(f"{module}.{name}")


def _read_metadata(file: Path) -> Metadata:
    try:
        found = _Unpickler(io.BytesIO(read_bytes(file, METADATA_BYTES))).load()
    except InputError:
        raise
    except pickle.UnpicklingError as error:
        cause = f"{file}: cannot be read, or names code that lrc does not run ({error})"
        raise InputError(cause, "save the checkpoint with torch.distributed.checkpoint") from error
    # A truncated or foreign pickle fails in any way.
    except Exception as error:
        cause = f"{file}: cannot be read, or names code, which lrc does not run ({named(error)})"
        raise InputError(cause, "copy the checkpoint again, it may be truncated") from error
    if not isinstance(found, Metadata) or not isinstance(found.storage_data, dict):
        raise InputError(f"{file}: does not describe a checkpoint", "copy the checkpoint again")
    found.storage_meta = found.storage_meta or StorageMeta()
    return found


def _files(path: Path, metadata: Metadata) -> list[Path]:
    """Returns the files that hold the shards, and the file that describes the shards."""
    names = {str(entry.relative_path) for entry in metadata.storage_data.values()}
    outside = sorted(n for n in names if Path(n).is_absolute() or ".." in Path(n).parts)
    if outside:
        raise InputError(f"{path}: {METADATA_NAME} names {outside[0]}, outside it", "restore it")
    missing = sorted(name for name in names if not (path / name).is_file())
    if missing:
        raise InputError(
            f"{path}: {METADATA_NAME} names {missing[0]}, which is missing", "copy all its files"
        )
    return sorted(path / name for name in {*names, METADATA_NAME})


def _tree(path: Path, metadata: Metadata) -> dict[str, Any]:
    """Returns the saved mapping with its nesting; a leaf that is no stored tensor is None."""
    first = {index.fqn: entry.relative_path for index, entry in metadata.storage_data.items()}
    places: Mapping[str, tuple[Any, ...]] = metadata.planner_data or {}
    tree: dict[str, Any] = {}
    for fqn, saved in metadata.state_dict_metadata.items():
        *outer, name = map(str, places.get(fqn, (fqn,)))
        branch = tree
        for step in outer:
            branch = branch.setdefault(step, {})
        branch[name] = None
        if isinstance(saved, TensorStorageMetadata) and fqn in first:
            if sum(chunk.sizes.numel() for chunk in saved.chunks) < saved.size.numel():
                cause = f"{path}: {METADATA_NAME} names no shard for a part of {fqn}"
                raise InputError(cause, "save the checkpoint again")
            check_name(fqn, path / METADATA_NAME)
            info = TensorInfo(
                file=path / first[fqn], shape=tuple(saved.size), dtype=saved.properties.dtype
            )
            branch[name] = _Entry(fqn=fqn, info=info)
    return tree
