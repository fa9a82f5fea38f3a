"""What a path holds where it is no checkpoint that lrc reads: each kind has a way out.

People give adapters, downloads that are not complete, folders of a cache, exports of other
programs. A file is known by its first bytes where its format has some, else by its name.
"""

import os
import re
from collections.abc import Collection
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from lrc_cli.errors import InputError
from lrc_cli.reading import open_regular, read_json

DEQUANTISE = "dequantise it first, or run lrc on the checkpoint it came from"
"""The remedy for quantised weights."""
COMPLEX = "store its real and its imaginary part as two real tensors, and let the module join them"
"""The remedy for complex weights."""
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_KEY = re.compile(
    r"(^|[._])(lora_(A|B|E|down|up|mid|embedding_[AB]|magnitude_vector)|hada_[wt][12](_[ab])?"
    r"|lokr_[wt][12](_[ab])?|ia3_l|oft_[rR]|oft_blocks|boft_[RPs]|vera_(A|B|lambda_[bd])"
    r"|fourierft_spectrum|dora_scale|adaption_prompt|prompt_embeddings|trainable_tokens_delta"
    r"|base_layer|original_module|modules_to_save|adapter_(down|up)|adapters|loras|lllite)([._]|$)"
)
"""The parts that adapters put into tensor names: PEFT's, diffusers', LyCORIS', adapters'."""
UNMERGED = ("PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "ADAPTION_PROMPT", "MULTITASK_PROMPT")
"""The kinds of PEFT adapters that are no change of weights."""

_POINTER = "fetch the file itself with: git lfs pull"
_AGAIN = "download it again, to its end"
_BEGINNINGS = (
    (b"version https://git-lfs", "is a git-lfs pointer, not the file itself", _POINTER),
    (b"GGUF", "is GGUF, and GGUF files hold quantised weights", DEQUANTISE),
    (b"\x89HDF\r\n", "is an HDF5 file, such as Keras writes", "save the weights with PyTorch"),
    (b"<!doctype html", "is a web page, not the file itself", "download the file itself"),
    (b"<html", "is a web page, not the file itself", "download the file itself"),
    (b"\x1f\x8b", "is packed by gzip", "unpack it first"),
    (b"7z\xbc\xaf", "is an archive of 7z", "unpack it first"),
    (b"\xfd7zXZ", "is packed by xz", "unpack it first"),
    (b"BZh", "is packed by bzip2", "unpack it first"),
    (b"(\xb5/\xfd", "is packed by zstd", "unpack it first"),
)
_GATHER = "zero_to_fp32"
"""The script that DeepSpeed puts beside its shards."""
_CONVERT = (
    "convert it to PyTorch first, with transformers 4: from_pretrained(DIR, {}=True), then"
    " save_pretrained"
)
_EXPORT = "give the checkpoint from which it was exported: an export has no layers to replace"
_KINDS = {
    (".gguf", ".ggml"): ("GGUF files hold quantised weights", DEQUANTISE),
    (".onnx", ".onnx_data"): ("ONNX files are graphs of operations", _EXPORT),
    (".tflite", ".mlmodel", ".mlpackage", ".engine", ".plan", ".pb", ".pdmodel"): (
        "files of this kind are graphs of operations",
        _EXPORT,
    ),
    (".h5", ".keras", ".hdf5"): ("Keras wrote this file", _CONVERT.format("from_tf")),
    (".msgpack",): ("Flax wrote this file", _CONVERT.format("from_flax")),
    (".ot",): ("rust-bert wrote this file", "give the PyTorch checkpoint that it came from"),
    (".index", ".meta", "-00001"): (
        "TensorFlow wrote this file",
        _CONVERT.format("from_tf"),
    ),
    (".pdparams",): ("Paddle wrote this file", "save the tensors as .safetensors"),
    (".npz", ".npy"): ("arrays of NumPy are data here", "save the tensors as .safetensors"),
    (".nemo", ".tar", ".zip", ".tgz", ".gz", ".7z", ".xz", ".bz2", ".zst", ".rar"): (
        "archives are not read",
        "unpack it, and give the folder or the weight file in it",
    ),
    (".incomplete", ".part", ".crdownload", ".aria2", ".download"): (
        "the download is not complete",
        _AGAIN,
    ),
}


def not_dense(file: Path, key: str, dtype: str) -> InputError:
    """Returns the refusal of a tensor whose numbers are no dense weight's.

    Args:
        file: the tensor's file.
        key: the tensor's name.
        dtype: the data type, as torch or safetensors call it.
    """
    if dtype in ("C64", "C128") or dtype.startswith("complex"):
        cause = f"{file}: tensor {key} is complex ({dtype}), and lrc takes real weights"
        return InputError(cause, COMPLEX)
    cause = f"{file}: tensor {key} has dtype {dtype}, which is not a dense weight's"
    return InputError(cause, DEQUANTISE)


def explain_file(file: Path) -> InputError | None:
    """Returns the refusal of a file that is no weight file, by its beginning; None: not known."""
    try:
        with open_regular(file) as opened:
            start = opened.read(64)
    except (InputError, OSError):
        return None
    if not start:
        return InputError(f"{file} is empty", _AGAIN)
    for beginning, what, remedy in _BEGINNINGS:
        if start.lstrip()[: len(beginning)].lower() == beginning.lower():
            return InputError(f"{file} {what}", remedy)
    if not any(start):
        return InputError(f"{file} begins with zeros, so it is not whole", _AGAIN)
    return None


def explain_suffix(file: Path, read: str) -> InputError:
    """Returns the refusal of a file whose name ends in nothing that is read.

    Args:
        file: the file.
        read: the suffixes that are read, in words.
    """
    known = explain_file(file)
    if known is not None:
        return known
    for suffixes, (what, remedy) in _KINDS.items():
        if file.name.lower().endswith(suffixes):
            return InputError(f"{file}: {what}", remedy)
    folder = file.parent
    if file.suffix == ".json":
        return InputError(f"{file} is not a weight file", f"give its directory, {folder}")
    if folder.name == "blobs" and (folder.parent / "snapshots").is_dir():
        return explain_cache(folder.parent) or _no_snapshot(folder.parent)
    return InputError(
        f"{file}: {file.suffix or 'this kind of'} files are not read",
        f"give {read}, or a directory",
    )


def explain_directory(path: Path, read: str) -> InputError:
    """Returns the refusal of a directory without a weight file of a form that is read.

    Args:
        path: the directory.
        read: the suffixes that are read, in words.
    """
    names = sorted(child.name for child in path.iterdir())
    special = (
        explain_cache(path)
        or _explain_pipeline(path)
        or _explain_training(path, names)
        or _explain_unfinished(path, names)
    )
    if special is not None:
        return special
    if not names:
        return InputError(
            f"{path} is empty: it has neither a config.json nor a weight file",
            "give the directory with the weights",
        )
    for suffixes, (what, remedy) in _KINDS.items():
        found = next((name for name in names if name.lower().endswith(suffixes)), None)
        if found is not None:
            return InputError(f"{path} has no weight file but {found}: {what}", remedy)
    below = [name for name in names if _looks_like_checkpoint(path / name)]
    if below:
        return InputError(
            f"{path} has no weight file itself, but folders with some: {_few(below)}",
            f"give one of them, such as {path / below[-1]}",
        )
    return InputError(
        f"{path} has no weight file ({read})"
        if "config.json" in names
        else f"{path} has neither a config.json nor a weight file ({read})",
        "give a transformers directory, a weight file or a distributed checkpoint",
    )


def explain_missing(path: Path) -> InputError:
    """Returns the refusal of a path that does not exist, which may be a name on a hub."""
    text = str(path)
    cause = f"{path} does not exist"
    if re.match(r"(https?|s3|gs|hf|file|ftp):/", text):
        return InputError(f"{path} is an address, and lrc reads files", "download it first")
    if text.startswith("~"):
        return InputError(f"{cause}: ~ is not expanded here", "write the whole path")
    cached = _in_cache(text) if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text) else None
    if cached is not None:
        return InputError(
            f"{cause} as a directory, but the hub's cache has the model of this name",
            f"give the folder there: {cached}",
        )
    remedy = "check the path (relative to the working directory)"
    near = get_close_matches(path.name, _siblings(path), n=1)
    if near:
        remedy = f"{remedy}: {path.parent / near[0]} is there"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", text) and not text.startswith("."):
        remedy += f"; for a model of the Hugging Face hub: hf download {text} --local-dir DIR"
    return InputError(cause, remedy)


def explain_cache(path: Path) -> InputError | None:
    """Returns the refusal of a folder of the hub's cache, with the folder to give; None: no such.

    A cached model `models--org--name` has its files in `snapshots/<commit>`.
    """
    if path.name == "snapshots" and path.parent.name.startswith("models--"):
        path = path.parent
    if (path / "snapshots").is_dir() and (path / "refs").is_dir():
        snapshot = _snapshot(path)
        if snapshot is None:
            return _no_snapshot(path)
        return InputError(
            f"{path} is a folder of the hub's cache, not the model itself", f"give {snapshot}"
        )
    models = sorted(path.glob("models--*"))
    if models:
        inside = [x for x in map(_snapshot, models) if x is not None]
        example = f", such as {inside[0]}" if inside else ""
        return InputError(
            f"{path} is the hub's cache, with {len(models)} models",
            f"give a snapshot of one of them{example}",
        )
    return None


def check_no_adapter(path: Path) -> None:
    """Raises InputError for a directory with an adapter: alone, or beside a whole model."""
    file = path / ADAPTER_CONFIG
    if not file.is_file():
        return
    config = _read_quietly(file)
    kind = str(config.get("peft_type") or (config.get("config") or {}).get("architecture") or "")
    base = config.get("base_model_name_or_path") or config.get("model_name") or "its base model"
    if not config.get("peft_type") and "model_class" in config:
        what = f"an adapter of the library adapters{f' ({kind})' if kind else ''}"
        remedy = "merge it (model.merge_adapter(NAME)), then save the whole model"
    elif kind.upper().startswith(UNMERGED):
        what = f"a PEFT adapter ({kind}), which is no change of weights and cannot be merged"
        remedy = f"compress {base}, and load the adapter on the output"
    else:
        what = f"a PEFT adapter{f' ({kind})' if kind else ''} for {base}"
        remedy = (
            "merge it first: PeftModel.from_pretrained(BASE, ADAPTER).merge_and_unload(), then"
            " save_pretrained"
        )
    if (path / "config.json").exists():
        raise InputError(
            f"{file}: beside the model lies {what}, which transformers would load with it",
            f"{remedy}; or move the adapter's files away",
        )
    raise InputError(f"{path} holds {what}, not a whole network ({ADAPTER_CONFIG})", remedy)


def adapter_keys(keys: Collection[str]) -> list[str]:
    """Returns the names that adapters of any library give to their tensors."""
    return [key for key in keys if ADAPTER_KEY.search(key)]


def unmerged(path: Path, key: str, *, is_whole: bool) -> InputError:
    """Returns the refusal of tensors of an adapter.

    Args:
        path: the checkpoint.
        key: the name of one of the adapter's tensors.
        is_whole: whether the network's own weights are there too.
    """
    if is_whole:
        cause = f"{path} holds an adapter (LoRA or another) that was never merged: {key}"
    else:
        cause = f"{path} holds an adapter (LoRA or another), not a whole network: {key}"
    return InputError(
        cause,
        "merge it into its base model and save the whole: merge_and_unload() of peft, fuse_lora()"
        " of diffusers, merge_adapter() of adapters",
    )


def _read_quietly(file: Path) -> dict[str, Any]:
    """Returns what a JSON file holds for a message; empty where it cannot be read."""
    try:
        return read_json(file)
    except InputError:
        return {}


def _explain_pipeline(path: Path) -> InputError | None:
    """Returns the refusal of a diffusers pipeline, or of an old sentence-transformers folder."""
    if (path / "model_index.json").is_file():
        index = _read_quietly(path / "model_index.json")
        parts = [name for name in index if _looks_like_checkpoint(path / name)]
        example = next((x for x in parts if x in ("transformer", "unet")), (parts or ["unet"])[0])
        return InputError(
            f"{path} is a pipeline of diffusers, made of several networks: {_few(parts)}",
            f"give one of them, such as {path / example}; diffusers' networks need model.factory",
        )
    if (path / "modules.json").is_file():
        inner = [x.name for x in sorted(path.iterdir()) if _looks_like_checkpoint(x)]
        if inner:
            return InputError(
                f"{path} is a sentence-transformers folder, whose network lies deeper",
                f"give {path / inner[0]}",
            )
    return None


def _explain_training(path: Path, names: Collection[str]) -> InputError | None:
    """Returns the refusal of what DeepSpeed or Megatron saved; None for anything else."""
    if f"{_GATHER}.py" in names:
        return InputError(
            f"{path} has DeepSpeed's shards of a training state, and no weights",
            f"gather them first, there: python {_GATHER}.py . gathered --safe_serialization",
        )
    states = [name for name in names if name.startswith("global_step")]
    if states or any(name.startswith("mp_rank_") for name in names):
        return InputError(
            f"{path} has the training state of DeepSpeed or Megatron, and no weights",
            "convert it to a transformers directory with the tools of the training code",
        )
    return None


def _explain_unfinished(path: Path, names: Collection[str]) -> InputError | None:
    """Returns the refusal of a download that has not come to its end; None for anything else."""
    unfinished = [name for name in names if name.lower().endswith(_UNFINISHED)]
    unfinished += [
        str(x.relative_to(path)) for x in path.glob(".cache/huggingface/**/*.incomplete")
    ]
    if not unfinished:
        return None
    return InputError(
        f"{path} is not downloaded to the end: {_few(unfinished)}",
        "run the same download again, it goes on where it stopped",
    )


_UNFINISHED = (".incomplete", ".part", ".crdownload", ".aria2")


def _looks_like_checkpoint(folder: Path) -> bool:
    if not folder.is_dir() or folder.name.startswith("."):
        return False
    endings = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.distcp")
    return any(next(folder.glob(ending), None) is not None for ending in endings)


def _snapshot(model: Path) -> Path | None:
    """Returns the folder of a cached model with its files: main's commit, else the newest."""
    main = model / "refs" / "main"
    try:
        named = model / "snapshots" / main.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        named = model
    found = [x for x in (model / "snapshots").glob("*") if x.is_dir() and any(x.iterdir())]
    if named in found:
        return named
    return max(found, key=lambda x: x.stat().st_mtime, default=None)


def _no_snapshot(model: Path) -> InputError:
    name = model.name.removeprefix("models--").replace("--", "/")
    return InputError(
        f"{model} is a folder of the hub's cache without a whole download",
        f"download the model: hf download {name} --local-dir DIR",
    )


def _in_cache(name: str) -> Path | None:
    """Returns the files of a model in the local cache of the hub, or None."""
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    cache = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")
    model = cache / f"models--{name.replace('/', '--')}"
    return _snapshot(model) if (model / "snapshots").is_dir() else None


def _siblings(path: Path) -> list[str]:
    try:
        return [child.name for child in path.parent.iterdir()]
    except OSError:
        return []


def _few(names: Collection[str]) -> str:
    shown = list(names)[:4]
    return ", ".join(shown) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
