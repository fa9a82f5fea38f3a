"""Open a saved checkpoint: headers at once, tensors when they are asked for, side files by name."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lrc_cli.errors import InputError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
# What the writer makes anew, or what belongs to weights that it replaces: never carried over.
NOT_CARRIED_SUFFIXES = (
    ".safetensors",
    ".safetensors.index.json",
    ".bin",
    ".bin.index.json",
    ".pt",
    ".pth",
    ".gguf",
    ".onnx",
    ".h5",
    ".msgpack",
)
OWN_FILES = frozenset({"config.json", "manifest.json", "report.json", "report.html", "lrc.yaml", "README.md"})

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
FLOAT_DTYPES = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Where one stored tensor lies, as its file's header says."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_elements(self) -> int:
        """Number of entries."""
        return torch.Size(self.shape).numel()

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor's data."""
        return self.num_elements * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class Source:
    """A checkpoint that is read, never written.

    `read` gives views of the memory-mapped files: nothing is copied into private memory until
    somebody writes to a tensor or converts it.
    """

    path: Path
    """The directory, or the single .safetensors file."""
    config: dict[str, Any] | None
    """Parsed config.json of a transformers directory; None for any other checkpoint."""
    tensors: dict[str, TensorInfo]
    """Every stored tensor by its disk key, in file order."""

    @property
    def files(self) -> list[Path]:
        """The weight files, sorted by name."""
        return sorted({info.file for info in self.tensors.values()})

    @property
    def num_bytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(info.num_bytes for info in self.tensors.values())

    @cached_property
    def _handles(self) -> dict[Path, Any]:
        return {file: safe_open(file, framework="pt") for file in self.files}

    def read(self, key: str) -> torch.Tensor:
        """The stored tensor `key`, as a view of the mapped file on the CPU."""
        tensor: torch.Tensor = self._handles[self.tensors[key].file].get_tensor(key)
        return tensor

    def side_files(self) -> list[Path]:
        """Files that the compressed checkpoint carries over unchanged (tokenizer, licence, ...)."""
        if self.path.is_file():
            return []
        return sorted(
            file
            for file in self.path.rglob("*")
            if file.is_file()
            and file.name not in OWN_FILES
            and not file.name.endswith(NOT_CARRIED_SUFFIXES)
            and not any(part.startswith(".") for part in file.relative_to(self.path).parts)
        )

    @cached_property
    def hashes(self) -> dict[str, str]:
        """sha256 of config.json and of every weight file, by file name."""
        files = self.files
        if self.config is not None:
            files = [self.path / "config.json", *files]
        return {file.name: hash_file(file) for file in files}

    def check_finite(self) -> None:
        """Raise InputError naming the first tensor that holds a NaN or an infinity."""
        for key, info in self.tensors.items():
            if info.dtype in FLOAT_DTYPES and not _is_finite(self.read(key)):
                raise InputError(
                    f"{info.file}: tensor {key} holds NaN or infinity",
                    "repair or retrain the checkpoint: no compression can be fitted to it",
                )


def _is_finite(tensor: torch.Tensor, chunk: int = 1 << 24) -> bool:
    # In chunks, so that the mask of a large tensor never takes much private memory.
    flat = tensor.reshape(-1)
    return all(bool(torch.isfinite(part).all()) for part in flat.split(chunk))


def hash_file(path: Path) -> str:
    """sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def open_source(path: Path, *, factorised: bool = False) -> Source:
    """Open a transformers directory, a directory of .safetensors files or a single one.

    Args:
        factorised: accept a checkpoint that lrc wrote.

    Raises:
        InputError: the path is missing, is no checkpoint this version reads, is damaged, or is
            already quantised or factorised.
    """
    if not path.exists():
        raise InputError(f"{path}: no such checkpoint", "check model.path (relative to the working directory)")
    if path.is_file():
        if path.suffix != ".safetensors":
            raise InputError(
                f"{path}: {path.suffix or 'this kind of'} files are not in this version",
                "convert it with safetensors.torch.save_file",
            )
        return Source(path=path, config=None, tensors=dict(_headers([path])))
    config = _read_config(path, factorised=factorised)
    tensors = dict(_headers(_weight_files(path)))
    if not tensors:
        raise InputError(f"{path}: the weight files hold no tensor", "save the checkpoint again")
    return Source(path=path, config=config, tensors=tensors)


def _read_config(path: Path, *, factorised: bool) -> dict[str, Any] | None:
    file = path / "config.json"
    if not file.exists():
        return None
    config = read_json(file)
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "an unknown method")
        if method == "lrc" and factorised:
            return config
        remedy = (
            "run lrc on the dense checkpoint it came from"
            if method == "lrc"
            else "dequantise it first, or run lrc on the checkpoint it came from"
        )
        raise InputError(f"{path}: the checkpoint is already quantised or compressed ({method})", remedy)
    return config


def read_json(file: Path) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        InputError: the file is not UTF-8 JSON, or not an object.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{file}: not valid JSON ({error})", "restore the file") from error
    if not isinstance(value, dict):
        raise InputError(f"{file}: not a JSON object", "restore the file")
    return value


def _weight_files(path: Path) -> list[Path]:
    index = path / INDEX_NAME
    if index.exists():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
        files = [path / name for name in names]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise InputError(f"{path}: {INDEX_NAME} names {missing[0]}, which is missing", "copy all shards")
        return files
    if (path / SINGLE_NAME).is_file():
        return [path / SINGLE_NAME]
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1:
        return files
    if files:
        raise InputError(f"{path}: several .safetensors files and no {INDEX_NAME}", "add the index")
    other = sorted(file.name for file in path.iterdir() if file.suffix in {".bin", ".pt", ".pth", ".gguf"})
    if other:
        raise InputError(
            f"{path}: weights in {other[0]} are not in this version",
            "load the model and save it again with save_pretrained, which writes safetensors",
        )
    raise InputError(f"{path}: no .safetensors file", "give a transformers directory or a .safetensors file")


def _headers(files: list[Path]) -> Iterator[tuple[str, TensorInfo]]:
    for file in files:
        try:
            handle = safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file}: cannot be read as safetensors ({error})", "copy it again") from error
        for key in handle.offset_keys():
            entry = handle.get_slice(key)
            name = entry.get_dtype()
            if name not in DTYPES:
                raise InputError(f"{file}: tensor {key} has dtype {name}", "dequantise the checkpoint first")
            yield key, TensorInfo(file=file, shape=tuple(entry.get_shape()), dtype=DTYPES[name])
