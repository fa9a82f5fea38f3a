"""Tensor files hold named tensors whose first dimension counts the sequences."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from lrc_cli.checkpoint.headers import DTYPES
from lrc_cli.data.kinds import NO_FINDINGS, Batch, Findings
from lrc_cli.data.npz import read_npz
from lrc_cli.errors import InputError
from lrc_cli.reading import check_regular
from lrc_cli.text import named


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Model inputs by name; a sequence is a row of every tensor."""

    tensors: Batch
    findings: Findings = NO_FINDINGS

    @property
    def length(self) -> int:
        """The number of rows."""
        return len(next(iter(self.tensors.values())))

    @property
    def stretches(self) -> Sequence[tuple[int, int]]:
        """One: any rows may be drawn."""
        return [(0, self.length)]

    @property
    def one_in(self) -> None:
        """None: all rows are there."""
        return None

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
    tensors = _read_npz(path) if path.suffix.lower() == ".npz" else _read_safetensors(path)
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
    check_regular(path)
    try:
        tensors = load_file(path)
    except Exception as error:  # of dtypes that torch lacks, load_file raises others
        raise InputError(
            f"{path}: cannot be read as safetensors ({named(error)})", "write it again"
        ) from error
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES.values():
            dtype = str(tensor.dtype).removeprefix("torch.")
            cause = f"{path}: {name} holds {dtype}, with which no input is computed"
            raise InputError(cause, "write it in float32")
    return tensors


def _read_npz(path: Path) -> Batch:
    return {name: torch.from_numpy(_native(array)) for name, array in read_npz(path).items()}


def _native(array: np.ndarray) -> np.ndarray:
    """The array in the machine's byte order and in a dtype that torch computes with."""
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:
        return array.astype(np.int64)
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        return array.astype(np.float64)
    return array.astype(array.dtype.newbyteorder("="), copy=False)
