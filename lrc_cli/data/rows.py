"""Tensor files hold named tensors whose first dimension counts the sequences."""

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from lrc_cli.data.kinds import NO_FINDINGS, Batch, Findings
from lrc_cli.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Model inputs by name; a sequence is a row of every tensor."""

    tensors: Batch
    findings: Findings = NO_FINDINGS

    @property
    def length(self) -> int:
        """The number of rows."""
        return len(next(iter(self.tensors.values())))

    def width(self, sequence_length: int) -> int:
        """One: a sequence is a row of any length."""
        return 1

    def take(self, starts: Sequence[int], width: int) -> Batch:
        """The rows at `starts` of every tensor."""
        return {name: tensor[list(starts)] for name, tensor in self.tensors.items()}


def read_rows(path: Path) -> Rows:
    """The tensors of a .safetensors or .npz file.

    Raises:
        InputError: the file cannot be read, its tensors have different numbers of rows, or a number
            is not finite.
    """
    tensors = _read_npz(path) if path.suffix == ".npz" else _read_safetensors(path)
    lengths = {len(tensor) if tensor.ndim else 0 for tensor in tensors.values()}
    if len(lengths) != 1 or not min(lengths):
        raise InputError(
            f"{path}: the tensors' first dimensions differ or are empty",
            "the first dimension of every tensor must count the same sequences",
        )
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InputError(f"{path}: tensor {name} holds NaN or infinity", "clean the data")
    return Rows(tensors=tensors)


def _read_safetensors(path: Path) -> Batch:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path}: cannot be read as safetensors ({error})", "write it again"
        ) from error


def _read_npz(path: Path) -> Batch:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: cannot be read as .npz ({error})", "write it again") from error
    for name, array in arrays.items():
        if array.dtype.kind not in "biuf":
            cause = f"{path}: {name} holds {array.dtype}, no numbers"
            raise InputError(cause, "leave it out, or write numbers")
    return {name: torch.from_numpy(_native(array)) for name, array in arrays.items()}


def _native(array: np.ndarray) -> np.ndarray:
    """The array in the machine's byte order and in a dtype that torch computes with."""
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:
        return array.astype(np.int64)
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        return array.astype(np.float64)
    return array.astype(array.dtype.newbyteorder("="), copy=False)
