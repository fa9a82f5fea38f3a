"""Open a saved checkpoint: headers at once, tensors when they are asked for, side files by name."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from lrc_cli.checkpoint.fused import MARK_DTYPE, Fused
from lrc_cli.checkpoint.headers import DEQUANTISE, FLOAT_DTYPES, TensorInfo, read_json
from lrc_cli.checkpoint.weights import SafetensorsFiles, Weights, open_weights
from lrc_cli.errors import InputError
from lrc_cli.runtime.files import hash_file

# The same weights in another form would be carried over beside the compressed ones. Folders may
# hold weights of their own (sentence-transformers' 2_Dense/model.safetensors), which are.
WEIGHT_SUFFIXES = (
    ".safetensors",
    ".safetensors.index.json",
    ".bin",
    ".bin.index.json",
    ".pt",
    ".pth",
    ".ckpt",
    ".distcp",
    ".h5",
    ".msgpack",
    ".ot",
)
EXPORT_SUFFIXES = (".gguf", ".onnx", ".onnx_data")
EXPORT_FOLDERS = frozenset({"onnx", "openvino", "original"})
OWN_FILES = frozenset(
    {"config.json", "manifest.json", "report.json", "report.html", "lrc.yaml", "README.md"}
)


@dataclass(frozen=True, kw_only=True)
class Source:
    """A checkpoint that is read, never written, and what one module sees of its tensors.

    An open source sees the tensors as the files hold them. `without_copies` and `apart` give views
    of the same files, which a module that ties tensors or keeps its experts apart needs; the source
    itself stays as it is.

    `read` gives views of memory-mapped files where the format allows: nothing is copied into
    private memory until somebody writes to a tensor or converts it.
    """

    path: Path
    """The directory, or the single file."""
    config: dict[str, Any] | None
    """Parsed config.json of a transformers directory; None for any other checkpoint."""
    weights: Weights
    """The stored tensors, in whatever format."""
    copies: Mapping[str, str] = field(default_factory=dict)
    """Tensors that the files hold a second time, with the key of the one that counts."""
    fused: Mapping[str, Fused] = field(default_factory=dict)
    """Stored tensors that are seen as the parts they hold."""

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every stored tensor by its disk key, in file order; tied ones once, fused ones apart."""
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
        """The keys of the fused tensors' parts, each with the stored tensor's key and the part's
        place in it."""
        return {
            part: (key, index)
            for key, fused in self.fused.items()
            for index, part in enumerate(fused.keys(self.weights.tensors[key].shape[0]))
        }

    @property
    def files(self) -> list[Path]:
        """The weight files, sorted by name."""
        return self.weights.files

    @property
    def num_bytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(info.num_bytes for info in self.tensors.values())

    @property
    def is_safetensors(self) -> bool:
        """Whether transformers and safetensors read the same files by themselves."""
        return isinstance(self.weights, SafetensorsFiles)

    @cached_property
    def record(self) -> dict[str, Any]:
        """What our writer noted in the files (version, layer table, factory); empty in others'."""
        return self.weights.record() if isinstance(self.weights, SafetensorsFiles) else {}

    def read(self, key: str) -> torch.Tensor:
        """The stored tensor `key` on the CPU."""
        if key not in self.parts:
            return self.weights.read(key)
        whole, index = self.parts[key]
        return self.fused[whole].take(self.weights.read(whole), index)

    def without_copies(self, copies: Mapping[str, str]) -> "Source":
        """A view that passes over copies of tied tensors.

        Args:
            copies: the copies' keys, each with the key of the tensor that counts.
        """
        return replace(self, copies={**self.copies, **copies})

    def apart(self, fused: Mapping[str, Fused]) -> "Source":
        """A view that has the matrices of fused experts as tensors, in the fused tensors' place.

        Args:
            fused: by the stored tensor's key; a tensor that is passed over stays so.

        Raises:
            InputError: a tensor holds nothing for each of several experts.
        """
        here = {key: how for key, how in fused.items() if key in self.tensors}
        for key in here:
            if len(self.tensors[key].shape) < 2:
                raise InputError(
                    f"{key} has shape {self.tensors[key].shape}, which holds no experts' matrices",
                    "restore the file",
                )
        return replace(self, fused={**self.fused, **here})

    @property
    def mark_bytes(self) -> int:
        """Bytes of the marks that are written in the place of fused tensors, at most."""
        marked = sum(self.fused[whole].has_mark for whole, _ in self.parts.values())
        return marked * MARK_DTYPE.itemsize

    def side_files(self) -> list[Path]:
        """Files that the compressed checkpoint carries over unchanged (tokenizer, licence, ...)."""
        if self.path.is_file():
            return []
        used = set(self.files)
        return sorted(
            file
            for file in self.path.rglob("*")
            if file not in used and _is_carried(file.relative_to(self.path)) and file.is_file()
        )

    @cached_property
    def hashes(self) -> dict[str, str]:
        """sha256 of all that makes the network: config.json, weights, tokenizer, code.

        By name in the directory; also of the other files that are carried over.
        """
        if self.path.is_file():
            return {self.path.name: hash_file(self.path)}
        config = [] if self.config is None else [self.path / "config.json"]
        files = [*config, *self.files, *self.side_files()]
        return {file.relative_to(self.path).as_posix(): hash_file(file) for file in files}

    def find_not_finite(self) -> str | None:
        """The first tensor that holds a NaN or an infinity, or None."""
        for key, info in self.tensors.items():
            if info.dtype in FLOAT_DTYPES and not _is_finite(self.read(key)):
                return key
        return None

    def check_finite(self) -> None:
        """Raise InputError naming the first tensor that holds a NaN or an infinity."""
        key = self.find_not_finite()
        if key is not None:
            raise InputError(
                f"{self.tensors[key].file}: tensor {key} holds NaN or infinity",
                "repair or retrain the checkpoint: no compression can be fitted to it",
            )


def _is_carried(name: Path) -> bool:
    """Whether the writer carries over a file of this name, relative to the checkpoint."""
    if any(part.startswith(".") for part in name.parts) or name.parts[0] in EXPORT_FOLDERS:
        return False
    if name.name.endswith(EXPORT_SUFFIXES):
        return False
    is_at_top = len(name.parts) == 1
    return not is_at_top or not (name.name in OWN_FILES or name.name.endswith(WEIGHT_SUFFIXES))


def _is_finite(tensor: torch.Tensor) -> bool:
    # Both extremes are NaN if any entry is. A mask of all entries takes ten times as long.
    return not tensor.numel() or all(bool(torch.isfinite(end)) for end in tensor.aminmax())


def open_source(path: Path, *, factorised: bool = False) -> Source:
    """Open a transformers directory, a weight file, a directory of them or of a distributed save.

    Args:
        factorised: accept a checkpoint that lrc wrote.

    Raises:
        InputError: the path is missing, is no checkpoint this version reads, is damaged, or is
            already quantised or factorised.
    """
    if not path.exists():
        raise InputError(
            f"{path} does not exist", "check the path (relative to the working directory)"
        )
    config = _read_config(path, factorised=factorised) if path.is_dir() else None
    return Source(path=path, config=config, weights=open_weights(path))


def _read_config(path: Path, *, factorised: bool) -> dict[str, Any] | None:
    file = path / "config.json"
    if not file.exists():
        return None
    config = read_json(file)
    quantization = config.get("quantization_config")
    if quantization and not isinstance(quantization, dict):
        raise InputError(f"{file}: quantization_config is not an object", "restore the file")
    if quantization:
        method = quantization.get("quant_method", "an unknown method")
        if method == "lrc" and factorised:
            return config
        remedy = "run lrc on the dense checkpoint it came from" if method == "lrc" else DEQUANTISE
        raise InputError(
            f"{path}: the checkpoint is already quantised or compressed ({method})", remedy
        )
    return config
