"""One rule says which files beside the weights the output carries over, and why not the others.

A file is carried over unless it is

- hidden, a cache, or replaced by a file of lrc's own (these pass without a word);
- a weight file at the top: the network itself, or another form of it;
- an export of the network (GGUF, ONNX, TensorFlow, Flax, OpenVINO, ...);
- a training state: optimizer, scheduler, random numbers, arguments;
- another copy of the network, in a folder; a folder with a copy and a config is left out whole.

Files with weights in folders are looked into. Weights of other networks are carried over, because
sentence-transformers keeps a part of the model in `2_Dense/model.safetensors`. Tensors tell a copy,
whatever the folder is called: half of the names and shapes are the network's, or nearly all of the
network's shapes are there.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from lrc_cli.checkpoint.archives import record_names
from lrc_cli.checkpoint.headers import file_headers
from lrc_cli.checkpoint.pickles import load_pickle
from lrc_cli.checkpoint.wrapped import bare
from lrc_cli.errors import InputError
from lrc_cli.reading import files_below

Shapes = Mapping[str, tuple[int, ...]]
NO_SHAPES: Shapes = {}

OWN_FILES = frozenset(
    {"config.json", "manifest.json", "report.json", "report.html", "lrc.yaml", "README.md"}
)
TENSOR_SUFFIX = ".safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
OTHER_WEIGHT_SUFFIXES = (".safetensors.index.json", ".bin.index.json", ".distcp")
EXPORT_SUFFIXES = (
    ".gguf", ".ggml", ".onnx", ".onnx_data", ".onnx.data", ".h5", ".keras", ".msgpack", ".ot",
    ".tflite", ".mlmodel", ".pb", ".engine", ".trt", ".pte", ".llamafile",
)  # fmt: skip
EXPORT_FILE = re.compile(r"openvino_.*\.(xml|bin)|model\.mil|weight\.bin")
EXPORT_FOLDER = re.compile(r"onnx|openvino|original|coreml|.*\.(mlpackage|mlmodelc)")
TRAINING_FOLDER = re.compile(r"(checkpoint|global_step|step|epoch)[-_]?\d+")
"""The folders that training loops save the network and the optimizer to, again and again."""
TRAINING_FILE = re.compile(
    r"(optimizer|scheduler|scaler|sampler)(_\d+)?\.(pt|bin)|rng_state(_\d+)?\.pth"
    r"|random_states_\d+\.pkl|training_args\.bin|.*_optim_states\.pt|.*mp_rank_\d+_model_states\.pt"
    r"|zero_to_fp32\.py"
)
TRAINING_KEYS = frozenset(
    {"optimizer", "optimizers", "optimizer_state_dict", "optimizer_states", "optim", "lr_scheduler",
     "lr_schedulers", "param_groups", "scheduler", "scheduler_state_dict"}
)  # fmt: skip
"""Keys that tell a training state among the files of torch.save."""

MOST_SIDE_FILES = 100_000
"""The most files in a checkpoint's directory and below."""
LARGE = 1 << 28
"""Bytes from which on a file that cannot be mapped is not looked into."""

COPY = "another copy of the network"
WEIGHTS = "weights that are not the network's files"
EXPORT = "an export of the network"
TRAINING = "a training state"
UNREAD = "a file of torch.save that holds more than tensors, or cannot be read"


class SideFiles:
    """The files beside the weights of a checkpoint's directory.

    Args:
        path: the directory; None: there is none, because the checkpoint is a file.
        used: the files that make the network.
        shapes: the shapes of the network's tensors, by stored name.
    """

    def __init__(
        self, path: Path | None, used: Collection[Path] = (), shapes: Shapes = NO_SHAPES
    ) -> None:
        self.carried: list[Path] = []
        """The files that the output carries over, sorted."""
        self.left_out: dict[str, str] = {}
        """Each folder or file that is not carried over, by its name in the directory, with why."""
        self.other_weights: list[str] = []
        """The names of carried files with weights of other networks."""
        self._shapes = shapes
        names = {} if path is None else _files_below(path, used)
        seen = {file: name for file, name in names.items() if not _is_passed_over(name)}
        reasons = {file: self._reason(file, name) for file, name in seen.items()}
        folders = _folders({seen[f]: why for f, why in reasons.items() if why}, set(names.values()))
        for file, name in seen.items():
            outer = [folder for folder in name.parents if folder in folders]
            why = reasons[file]
            if outer:
                # The outermost folder stands for all files in it.
                self.left_out[outer[-1].as_posix()] = folders[outer[-1]]
            elif why is not None:
                self.left_out[name.as_posix()] = why
            else:
                self.carried.append(file)
                if name.suffix.lower() in (TENSOR_SUFFIX, *PICKLE_SUFFIXES):
                    self.other_weights.append(name.as_posix())

    def _reason(self, file: Path, name: Path) -> str | None:
        """Returns why a file is not carried over, as far as the file itself tells; None: it is."""
        if any(EXPORT_FOLDER.fullmatch(part) for part in name.parts[:-1]):
            return EXPORT
        folded = name.name.lower()
        if TRAINING_FILE.fullmatch(folded):
            return TRAINING
        if folded.endswith(EXPORT_SUFFIXES) or EXPORT_FILE.fullmatch(folded):
            return EXPORT
        is_weights = folded.endswith((TENSOR_SUFFIX, *PICKLE_SUFFIXES, *OTHER_WEIGHT_SUFFIXES))
        if is_weights and any(TRAINING_FOLDER.fullmatch(part) for part in name.parts[:-1]):
            return TRAINING
        if is_weights and len(name.parts) == 1:
            return WEIGHTS
        if folded.endswith(".distcp"):
            return COPY
        return self._reason_inside(file) if is_weights else None

    def _reason_inside(self, file: Path) -> str | None:
        """Returns why a file with weights, in a folder, is not carried over, by its tensors."""
        folded = file.name.lower()
        if folded.endswith(".index.json"):
            return self._reason_of_shards(file)
        if folded.endswith(TENSOR_SUFFIX):
            try:
                headers = file_headers(file)
            except InputError:  # packed numbers, or no safetensors at all: no copy of the network
                return None
            return COPY if self._is_copy({key: x.shape for key, x in headers.items()}) else None
        try:
            if file.stat().st_size > LARGE and record_names(file) is None:
                return UNREAD  # files from before torch 1.6 are read into memory
            tree = load_pickle(file)
        except InputError:
            return UNREAD
        if not isinstance(tree, Mapping):
            return None
        if TRAINING_KEYS & {str(key) for key in tree}:
            return TRAINING
        return COPY if self._is_copy(dict(_shapes_in(tree))) else None

    def _reason_of_shards(self, index: Path) -> str | None:
        """Returns why an index is not carried over: its shards are not."""
        suffix = f".{index.name.lower().split('.')[-3]}"
        files = (x for x in sorted(index.parent.iterdir()) if x.is_file())
        shards = (x for x in files if x.suffix.lower() == suffix)
        return next((why for shard in shards if (why := self._reason_inside(shard))), None)

    def _is_copy(self, shapes: Shapes) -> bool:
        own = {(bare(key), tuple(shape)) for key, shape in self._shapes.items()}
        same = sum((bare(key), tuple(shape)) in own for key, shape in shapes.items())
        if shapes and 2 * same >= len(shapes):
            return True
        wanted, there = _matrices(self._shapes), _matrices(shapes)
        return wanted.total() >= 8 and (wanted & there).total() >= 0.9 * wanted.total()


def _files_below(path: Path, used: Collection[Path]) -> dict[Path, Path]:
    """Returns the other files in a directory and the folders in it, sorted, with their names.

    Raises:
        InputError: there are more than `MOST_SIDE_FILES`.
    """
    below = sorted(files_below(path, MOST_SIDE_FILES))
    files = (file for file in below if file not in used and file.is_file())
    return {file: file.relative_to(path) for file in files}


def _is_passed_over(name: Path) -> bool:
    """Returns whether nothing is said of a file: it is hidden, a cache, or lrc writes its own."""
    if any(part.startswith(".") or part == "__pycache__" for part in name.parts):
        return True
    return len(name.parts) == 1 and name.name in OWN_FILES


def _folders(reasons: Mapping[Path, str], names: Collection[Path]) -> dict[Path, str]:
    """Returns the folders of which nothing is carried over, with why.

    Args:
        reasons: why files are not carried over, by their names.
        names: the names of all files.
    """
    folders: dict[Path, str] = {}
    for name, why in reasons.items():
        for folder in (part for part in name.parents if part.name):
            is_export = why == EXPORT and EXPORT_FOLDER.fullmatch(folder.name)
            is_training = why in (COPY, TRAINING) and TRAINING_FOLDER.fullmatch(folder.name)
            # A folder with a copy of the network and a config is a checkpoint of its own.
            is_checkpoint = why == COPY and folder / "config.json" in names
            if is_export or is_training or is_checkpoint:
                folders[folder] = why
    return folders


def _shapes_in(tree: Mapping[Any, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields the name and shape of every tensor in what was saved, under the innermost names."""
    for key, value in tree.items():
        if isinstance(value, torch.Tensor):
            yield str(key), tuple(value.shape)
        elif isinstance(value, Mapping):
            yield from _shapes_in(value)


def _matrices(shapes: Shapes) -> "Counter[tuple[int, ...]]":
    return Counter(tuple(sorted(shape)) for shape in shapes.values() if len(shape) > 1)
