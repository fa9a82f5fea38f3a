"""This module opens the tensors of weight files: one interface, and one class for each format."""

import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch

from lrc_cli.checkpoint import pickles
from lrc_cli.checkpoint.headers import (
    DEQUANTISE,
    DTYPES,
    INDEX_NAME,
    SINGLE_NAME,
    TensorInfo,
    check_version,
    open_tensors,
    read_headers,
    weight_files,
)
from lrc_cli.checkpoint.pickles import PickledFiles
from lrc_cli.errors import InputError

METADATA_NAME = ".metadata"
"""The file that a directory of torch.distributed.checkpoint has beside its shards."""
OLD_SINGLE, OLD_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
PROGRAM = ".pt2"
"""The suffix of torch.export's programs: `PickledFiles` refuses them with other programs."""
READ = ".safetensors, .bin, .pt, .pth or .ckpt"
WEIGHT = re.compile(r"(^|_)q?weight(_|$)")
"""The last part of a weight's key (`weight`, `qweight`, `weight_packed`, `weight_int8`,
`in_proj_weight`, `weight_ih_l0`): such a matrix of whole numbers is quantised, unless it is a
mask."""


class Weights(Protocol):
    """The interface of stored tensors that are read one by one."""

    files: list[Path]
    """All files that hold the tensors, sorted."""
    tensors: dict[str, TensorInfo]
    """Every stored tensor by its disk key, in file order; tied tensors count once."""

    def read(self, key: str) -> torch.Tensor:
        """Returns the tensor `key` on the CPU: a view of a mapped file where the format allows."""


class SafetensorsFiles:
    """The tensors of one or more mapped .safetensors files."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = sorted(files)
        self.tensors = read_headers(self.files)

    @cached_property
    def _handles(self) -> dict[Path, Any]:
        return {file: open_tensors(file) for file in self.files}

    def read(self, key: str) -> torch.Tensor:
        """Returns the stored tensor `key`, as a view of the mapped file on the CPU."""
        tensor: torch.Tensor = self._handles[self.tensors[key].file].get_tensor(key)
        return tensor

    def record(self) -> dict[str, Any]:
        """Reads what lrc noted in files that it wrote (version, layer table, factory); else empty.

        Raises:
            InputError: this version does not read the noted format version.
        """
        metadata = self._handles[self.files[0]].metadata() or {}
        record: dict[str, Any] = json.loads(metadata.get("lrc", "{}"))
        if record:
            check_version(record.get("format_version"), str(self.files[0]))
        return record


def open_weights(path: Path) -> Weights:
    """Opens a file or a directory of safetensors, of torch.distributed.checkpoint or of torch.save.

    The first format of this list that a directory holds is opened.

    Raises:
        InputError: there are no tensors that this version reads.
    """
    weights = _open_file(path) if path.is_file() else _open_directory(path)
    if not weights.tensors:
        raise InputError(f"{path}: the weight files hold no tensor", "save the checkpoint again")
    return weights


def check_dense(weights: Weights) -> None:
    """Raises InputError where another tool than lrc has quantised a weight."""
    for key, info in weights.tensors.items():
        _check_dense(key, info)


def _open_file(file: Path) -> Weights:
    if file.suffix == ".safetensors":
        return SafetensorsFiles([file])
    if file.suffix in pickles.SUFFIXES or file.suffix == PROGRAM:
        return PickledFiles([file])
    if file.suffix == ".gguf":
        _refuse_gguf(file)
    raise InputError(
        f"{file}: {file.suffix or 'this kind of'} files are not read",
        f"give {READ}, or a directory",
    )


def _open_directory(path: Path) -> Weights:
    files = weight_files(path, single=SINGLE_NAME, index=INDEX_NAME, suffixes=(".safetensors",))
    if files:
        return SafetensorsFiles(files)
    if (path / METADATA_NAME).is_file():
        # This import takes a while, and most checkpoints do not need the module.
        from lrc_cli.checkpoint.distributed import DistributedFiles

        return DistributedFiles(path)
    files = weight_files(path, single=OLD_SINGLE, index=OLD_INDEX, suffixes=pickles.SUFFIXES)
    if files:
        return PickledFiles(files)
    programs = sorted(path.glob(f"*{PROGRAM}"))
    if programs:
        return _open_file(programs[0])
    gguf = sorted(path.glob("*.gguf"))
    if gguf:
        _refuse_gguf(gguf[0])
    has_config = (path / "config.json").exists()
    raise InputError(
        f"{path} has no weight file ({READ})"
        if has_config
        else f"{path} has neither a config.json nor a weight file ({READ})",
        "give a transformers directory, a weight file or a distributed checkpoint",
    )


def _refuse_gguf(file: Path) -> NoReturn:
    raise InputError(f"{file}: GGUF files hold quantised weights", DEQUANTISE)


def _check_dense(key: str, info: TensorInfo) -> None:
    """Raises InputError for numbers of which a quantised weight is made."""
    name = str(info.dtype).removeprefix("torch.")
    if info.dtype not in DTYPES.values():
        cause = f"{info.file}: tensor {key} has dtype {name}, which is not a dense weight's"
        raise InputError(cause, DEQUANTISE)
    # Masks and tables of positions are whole numbers too; a dense matrix of weights never is.
    # Packed weights have names such as `weight_packed` (compressed-tensors) or `qweight` (GPTQ).
    last = key.rpartition(".")[2]
    is_weight = WEIGHT.search(last) and "mask" not in last and len(info.shape) > 1
    if is_weight and not info.dtype.is_floating_point:
        raise InputError(f"{info.file}: {key} is quantised: it holds {name} numbers", DEQUANTISE)
