"""A source is an opened checkpoint: headers are read at once, tensors when somebody asks for them.

A source also knows the side files, such as a tokenizer, that the output carries over.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from lrc_cli.checkpoint.choice import NAMED, transformers_place
from lrc_cli.checkpoint.foreign import (
    DEQUANTISE,
    adapter_keys,
    check_no_adapter,
    explain_file,
    explain_missing,
    unmerged,
)
from lrc_cli.checkpoint.fused import MARK_DTYPE, Fused
from lrc_cli.checkpoint.headers import FLOAT_DTYPES, TensorInfo, check_table_form, check_version
from lrc_cli.checkpoint.side_files import SideFiles
from lrc_cli.checkpoint.weights import (
    RenamedWeights,
    SafetensorsFiles,
    Weights,
    check_dense,
    open_weights,
)
from lrc_cli.errors import InputError
from lrc_cli.reading import check_file_name, file_size, read_json
from lrc_cli.runtime.files import hash_file
from lrc_cli.text import some_of


@dataclass(frozen=True, kw_only=True)
class Source:
    """A `Source` is a checkpoint that is read, never written, and one module's view of its tensors.

    A newly opened source shows the tensors as the files hold them. A module that ties tensors, or
    that keeps its experts apart, needs another view of the same files: `without_copies` and `apart`
    return such views and leave the source as it is.

    `read` returns views of memory-mapped files where the format allows. Private memory gets a copy
    only when somebody writes to a tensor or converts a tensor.
    """

    path: Path
    """The directory, or the single file."""
    config: dict[str, Any] | None
    """The parsed config.json of a transformers directory; None for any other checkpoint."""
    weights: Weights
    """The stored tensors, of any format."""
    copies: Mapping[str, str] = field(default_factory=dict)
    """The keys of tensors that the files hold a second time, each with the key that counts."""
    fused: Mapping[str, Fused] = field(default_factory=dict)
    """The keys of stored tensors that are taken apart, each with the way to take it apart."""
    unwrapped: Mapping[str, str | None] = field(default_factory=dict)
    """The stored names that wrappers had changed, each with the name that it has here."""
    lacking: tuple[str, ...] = ()
    """The names of the module's parameters that no file holds; they are NaN in the module."""

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every stored tensor by its disk key, in file order; tied tensors count once, and a fused
        tensor's parts stand in its place."""
        seen: dict[str, TensorInfo] = {}
        for key, whole in self.weights.tensors.items():
            if key in self.fused:
                keys = self.fused[key].keys(whole.shape[0])
                seen |= dict.fromkeys(keys, self.fused[key].info(whole))
            elif key not in self.copies:
                seen[key] = whole
        return seen

    @cached_property
    def parts(self) -> dict[str, tuple[str, int]]:
        """The keys of the fused tensors' parts, each with the stored tensor's key and the index of
        the part."""
        return {
            part: (key, index)
            for key, fused in self.fused.items()
            for index, part in enumerate(fused.keys(self.weights.tensors[key].shape[0]))
        }

    @property
    def notes(self) -> list[str]:
        """What a user should know of this view: which names lost the parts that wrappers add."""
        renamed = [(key, name) for key, name in self.unwrapped.items() if name is not None]
        notes = []
        if renamed:
            example, name = renamed[0]
            notes.append(
                f"{self.path}: the parts that wrappers add came off {len(renamed)} tensor names,"
                f" such as {example}, now {name}"
            )
        left_out = [key for key, name in self.unwrapped.items() if name is None]
        notes += [f"{self.path}: {key}, a count, is left out" for key in left_out]
        if self.lacking:
            notes.append(
                f"{self.path}: the files lack {some_of(self.lacking)}; this is fine only if no"
                " output of the network depends on it, which is checked when the network runs"
            )
        for why in sorted(set(self._beside.left_out.values())):
            names = [name for name, reason in self._beside.left_out.items() if reason == why]
            notes.append(f"{self.path}: left out of the output, {why}: {some_of(names)}")
        if self._beside.other_weights:
            others = some_of(self._beside.other_weights)
            notes.append(f"{self.path}: weights of other networks are carried over: {others}")
        return notes

    @property
    def files(self) -> list[Path]:
        """The weight files, sorted by name."""
        return self.weights.files

    @property
    def num_bytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(info.num_bytes for info in self.tensors.values())

    @property
    def is_transformers_choice(self) -> bool:
        """Whether transformers, given the directory, reads the same files under the same names."""
        named = (self.config or {}).get(NAMED)
        theirs = transformers_place(self.path, named)
        return isinstance(self.weights, SafetensorsFiles) and self.weights.place == theirs

    @property
    def layer_table(self) -> Mapping[str, Mapping[str, Any]] | None:
        """The layer table of a checkpoint that lrc wrote; None where there is none."""
        stated = self.record if self.config is None else self.config.get("quantization_config")
        return stated.get("layers") if stated else None

    @cached_property
    def record(self) -> dict[str, Any]:
        """What lrc noted in files that it wrote (version, layer table, factory); else empty."""
        return self.weights.record() if isinstance(self.weights, SafetensorsFiles) else {}

    def read(self, key: str) -> torch.Tensor:
        """Returns the stored tensor `key`, or the part `key` of a fused tensor, on the CPU."""
        if key not in self.parts:
            return self.weights.read(key)
        whole, index = self.parts[key]
        return self.fused[whole].take(self.weights.read(whole), index)

    def renamed(self, names: Mapping[str, str | None]) -> "Source":
        """Returns a view that has other names for some tensors, which wrappers had renamed.

        Args:
            names: the new names by the stored names; a tensor with the name None is left out.

        Raises:
            InputError: two tensors get one name, and their numbers differ.
        """
        if not names:
            return self
        return replace(
            self, weights=RenamedWeights(self.weights, names), unwrapped={**self.unwrapped, **names}
        )

    def without_copies(self, copies: Mapping[str, str]) -> "Source":
        """Returns a view that passes over copies of tied tensors.

        Args:
            copies: the copies' keys, each with the key of the tensor that counts.
        """
        return replace(self, copies={**self.copies, **copies})

    def apart(self, fused: Mapping[str, Fused]) -> "Source":
        """Returns a view that has every expert's matrix as a tensor, in the fused tensors' place.

        Args:
            fused: how to take each stored tensor apart, by key; a tensor that this view does not
                show is passed over.

        Raises:
            InputError: a tensor holds nothing for each of several experts.
        """
        here = {key: fused[key] for key in self.tensors if key in fused}
        for key in here:
            if len(self.tensors[key].shape) < 2:
                raise InputError(
                    f"{key} has shape {self.tensors[key].shape}, which holds no experts' matrices",
                    "restore the file",
                )
        return replace(self, fused={**self.fused, **here})

    def together(self) -> "Source":
        """Returns a view that has fused tensors as they are stored: `apart`, undone."""
        return replace(self, fused={})

    @property
    def mark_bytes(self) -> int:
        """The most bytes that the marks in the place of fused tensors take."""
        marked = sum(self.fused[whole].has_mark for whole, _ in self.parts.values())
        return marked * MARK_DTYPE.itemsize

    @cached_property
    def _beside(self) -> SideFiles:
        """The files beside the weights, sorted out by the rule of `side_files.py`."""
        if self.path.is_file():
            return SideFiles(None)
        shapes = {key: info.shape for key, info in self.weights.tensors.items()}
        return SideFiles(self.path, {*self.files, self.weights.place}, shapes)

    def side_files(self) -> list[Path]:
        """Returns the files that the output carries over unchanged (tokenizer, licence, ...).

        Raises:
            InputError: a file's name is not UTF-8.
        """
        for file in self._beside.carried:
            check_file_name(file)
        return self._beside.carried

    @property
    def left_out(self) -> Mapping[str, str]:
        """The files and folders that the output does not carry over, by name, each with why."""
        return self._beside.left_out

    @cached_property
    def decisive(self) -> list[Path]:
        """The files that decide which tensors there are: config.json, weights, their index."""
        config = [] if self.config is None else [self.path / "config.json"]
        return list(dict.fromkeys([*config, *self.files, self.weights.place]))

    @cached_property
    def hashes(self) -> dict[str, str]:
        """The sha256, by name, of all files that make the network (config.json, weights and their
        index, tokenizer, code), and of all other files that the output carries over."""
        if self.path.is_file():
            return {self.path.name: hash_file(self.path)}
        files = [*self.decisive, *self.side_files()]
        return {self.name_of(file): hash_file(file) for file in files}

    def name_of(self, file: Path) -> str:
        """Returns a file's name in the directory, or the name of the checkpoint's only file."""
        return file.name if self.path.is_file() else file.relative_to(self.path).as_posix()

    def find_not_finite(self) -> str | None:
        """Returns the key of the first tensor that holds a NaN or an infinity, or None."""
        for key, info in self.tensors.items():
            if info.dtype in FLOAT_DTYPES and not _is_finite(self.read(key)):
                return key
        return None

    def check_finite(self) -> None:
        """Raises InputError if a tensor holds a NaN or an infinity, and names the first such."""
        key = self.find_not_finite()
        if key is not None:
            raise InputError(
                f"{self.tensors[key].file}: tensor {key} holds NaN or infinity",
                "repair or retrain the checkpoint: no compression can be fitted to it",
            )


def _is_finite(tensor: torch.Tensor) -> bool:
    # Both extremes are NaN if any entry is. A mask of all entries takes ten times as long.
    return not tensor.numel() or all(bool(torch.isfinite(end)) for end in tensor.aminmax())


def open_source(path: Path, *, state_dict: str | None = None, factorised: bool = False) -> Source:
    """Opens a transformers directory, a weight file, a directory of weight files or of shards.

    Args:
        path: the file or the directory.
        state_dict: the keys that lead to the state dict in a file that holds several, with dots
            between; None: the only state dict.
        factorised: accept a checkpoint that lrc wrote.

    Raises:
        InputError: the path is missing, holds no checkpoint that this version reads, is damaged, or
            is already quantised or factorised.
    """
    if not os.path.exists(path):  # unlike Path.exists, this takes names that no file can have
        raise explain_missing(path)
    if os.path.isdir(path):
        check_no_adapter(path)
    else:
        file_size(path)
    config = _read_config(path, factorised=factorised) if path.is_dir() else None
    weights = open_weights(path, (config or {}).get(NAMED), state_dict)
    source = Source(path=path, config=config, weights=weights)
    _check_no_bare_adapter(source)
    # Some of lrc's forms are whole numbers. What others wrote is dense, whatever its metadata says.
    if not (factorised and (source.record or (config or {}).get("quantization_config"))):
        check_dense(source.weights)
    return source


def _check_no_bare_adapter(source: Source) -> None:
    """Raises InputError for a file with the tensors of an adapter and no others."""
    keys = [key for key in source.tensors if not key.endswith(".alpha")]
    found = adapter_keys(keys)
    if found and len(found) == len(keys) and not any(".base_layer." in key for key in keys):
        raise unmerged(source.path, found[0], is_whole=False)


def _read_config(path: Path, *, factorised: bool) -> dict[str, Any] | None:
    file = path / "config.json"
    if not file.exists():
        return None
    try:
        config = read_json(file)
    except InputError as error:
        known = explain_file(file) if file_size(file) else None  # an empty file is no JSON
        raise known or error from error
    quantization = config.get("quantization_config")
    if quantization and not isinstance(quantization, dict):
        raise InputError(f"{file}: quantization_config is not an object", "restore the file")
    if quantization:
        method = quantization.get("quant_method", "an unknown method")
        if method == "lrc" and factorised:
            where = f"{file}: quantization_config"
            check_version(quantization.get("format_version"), where)
            check_table_form(quantization.get("layers", {}), where)
            return config
        remedy = "run lrc on the dense checkpoint it came from" if method == "lrc" else DEQUANTISE
        raise InputError(
            f"{path}: the checkpoint is already quantised or compressed ({method})", remedy
        )
    return config
