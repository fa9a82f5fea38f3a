"""This module reads files of torch.save without running code, mapped where the file allows."""

import pickle
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lrc_cli.checkpoint.archives import check_archive, check_old, check_storages, record_names
from lrc_cli.checkpoint.choice import check_index
from lrc_cli.checkpoint.foreign import explain_file, not_dense
from lrc_cli.checkpoint.headers import TensorInfo, check_name, differ, has_same_bytes
from lrc_cli.checkpoint.wrapped import find_state
from lrc_cli.errors import InputError

SAVE_STATE = "save the state dict instead: torch.save(model.state_dict(), FILE)"


class PickledFiles:
    """The tensors of one or more files of torch.save, each file a state dict or a shard of one.

    The tensors are views of the mapped file. Files in the format before torch 1.6 cannot be mapped,
    and their tensors lie in private memory. Tied weights, one tensor with several names in a file,
    are listed once, under the first name.

    Args:
        place: the file that readers look for: the only file, or the index.
        weight_map: the file name of each key, as an index states it; None without an index.
        state_dict: the keys that lead to the state dict, as `find_state` takes them; None: the only
            state dict.

    Raises:
        InputError: a file cannot be read or has no such state dict, two files hold other numbers
            for one key, or the index disagrees with the files.
    """

    def __init__(
        self,
        files: Sequence[Path],
        *,
        place: Path,
        weight_map: Mapping[str, str] | None = None,
        state_dict: str | None = None,
    ) -> None:
        self.files, self.place = list(files), place
        self.tensors: dict[str, TensorInfo] = {}
        self._stored: dict[str, torch.Tensor] = {}
        first: dict[str, tuple[Path, torch.Tensor]] = {}
        keys: dict[Path, Collection[str]] = {}
        for file in self.files:
            seen = set()
            state = _state(file, state_dict)
            infos = {key: _describe(file, key, tensor) for key, tensor in state.items()}
            check_storages(file, state)
            keys[file] = state.keys()
            for key, tensor in state.items():
                other, earlier = first.setdefault(key, (file, tensor))
                if other != file and not has_same_bytes(earlier, tensor):
                    raise differ(key, other, key, file)
                memory = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
                if other == file and (not tensor.numel() or memory not in seen):
                    self.tensors[key] = infos[key]
                    self._stored[key] = tensor.detach()
                seen.add(memory)
        if weight_map is not None:
            check_index(place, weight_map, keys)

    def read(self, key: str) -> torch.Tensor:
        """Returns the stored tensor `key` on the CPU."""
        return self._stored[key]


def _state(file: Path, chosen: str | None) -> dict[str, torch.Tensor]:
    def is_same(first: torch.Tensor, second: torch.Tensor) -> bool:
        if not _is_plain(first) or not _is_plain(second):
            return False
        check_storages(file, {"": first})
        check_storages(file, {"": second})
        return has_same_bytes(first, second)

    try:
        return find_state(_load(file), torch.Tensor, file, chosen=chosen, is_same=is_same)
    except RuntimeError as error:
        cause = f"{file}: holds a nested tensor, which has no shape"
        raise InputError(cause, "save it as plain tensors") from error


def _describe(file: Path, key: str, tensor: torch.Tensor) -> TensorInfo:
    check_name(key, file)
    if tensor.is_meta:
        raise InputError(
            f"{file}: {key} is a meta tensor, which has no numbers",
            "save the checkpoint again, after its offloaded weights are back in memory",
        )
    if tensor.is_complex():
        raise not_dense(file, key, str(tensor.dtype).removeprefix("torch."))
    if not _is_plain(tensor):
        kind = f"{type(tensor).__name__}, {tensor.layout}"
        raise InputError(
            f"{file}: {key} is not a plain dense tensor ({kind})",
            "save it as one with .to_dense()",
        )
    return TensorInfo(file=file, shape=tuple(tensor.shape), dtype=tensor.dtype)


def _is_plain(tensor: torch.Tensor) -> bool:
    """Returns whether a tensor is dense, with its own numbers in its own memory."""
    is_view = tensor.is_nested or tensor.is_conj() or tensor.is_neg()
    is_dense = tensor.layout == torch.strided and type(tensor.detach()) is torch.Tensor
    return is_dense and not is_view and not tensor.is_meta


def _load(file: Path) -> Mapping[Any, Any]:
    """Reads the mapping that the file holds.

    Raises:
        InputError: the file holds code, a program, or nothing that torch.save writes.
    """
    found = load_pickle(file)
    if not isinstance(found, Mapping):
        raise InputError(f"{file}: holds a {type(found).__name__}, no state dict", SAVE_STATE)
    return found


def load_pickle(file: Path) -> Any:
    """Reads what torch.save wrote into a file; the tensors are views of the mapped file.

    Raises:
        InputError: the file holds code, a program, or nothing that torch.save writes.
    """
    names = record_names(file)
    if names is not None:
        _refuse_programs(file, names)
        check_archive(file)
    try:
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=names is not None)
    except pickle.UnpicklingError as error:
        known = explain_file(file)
        if known is not None:
            raise known from error
        code = re.search(r"GLOBAL (\S+)", str(error))
        held = f"code ({code[1]})" if code else "more than tensors"
        raise InputError(f"{file}: holds {held}, which lrc does not run", SAVE_STATE) from error
    # On a file that torch.save did not write, torch's unpickler fails in any way.
    except Exception as error:
        known = explain_file(file)
        if known is not None:
            raise known from error
        cause = f"{file}: cannot be read as a file of torch.save ({type(error).__name__})"
        raise InputError(cause, "copy it again, it may be truncated") from error
    if names is None:
        check_old(file)
    return found


def _refuse_programs(file: Path, records: Sequence[str]) -> None:
    """Raises InputError for a traced program: a graph of operations has no layers to replace."""
    names = {name.partition("/")[2] for name in records}
    if "archive_format" in names or "models/model.json" in names:
        raise InputError(
            f"{file}: a torch.export program is a graph without layers, which lrc cannot compress",
            "save torch.export.load(FILE).state_dict with torch.save and set model.factory to the"
            " function that builds the module",
        )
    if any(name.startswith("code/") for name in names):
        raise InputError(
            f"{file}: a TorchScript program is a graph without layers, which lrc cannot compress",
            "save torch.jit.load(FILE).state_dict() with torch.save and set model.factory to the"
            " function that builds the module",
        )
