"""Paths that hold something else than a checkpoint are told what they hold, and the way out."""

import gzip
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from command_helpers import assert_one_sentence
from safetensors.torch import load_file, save_file

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 13467254\n"
NAME = "models--org--tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"

Make = Callable[[Path, Path], Path]
"""Makes a path in an empty folder, given a whole model; returns what the user gives to lrc."""
CASES: dict[str, tuple[Make, list[str]]] = {}


def case(name: str, *words: str) -> Callable[[Make], Make]:
    """Adds a case, with the words that the error must have."""

    def add(make: Make) -> Make:
        assert name not in CASES
        CASES[name] = make, list(words)
        return make

    return add


def file_case(name: str, file: str, content: bytes, *words: str) -> None:
    """Adds a case of a single file with some content."""

    def make(folder: Path, model: Path) -> Path:
        (folder / file).write_bytes(content)
        return folder / file

    case(name, file, *words)(make)


def folder_case(name: str, files: dict[str, bytes], *words: str) -> None:
    """Adds a case of a folder with some files."""

    def make(folder: Path, model: Path) -> Path:
        for file, content in files.items():
            (folder / "given" / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / "given" / file).write_bytes(content)
        (folder / "given").mkdir(exist_ok=True)
        return folder / "given"

    case(name, *words)(make)


def copied(model: Path, place: Path, *, without: str = "") -> Path:
    """Copies a model, without the files of one name."""
    ignored = shutil.ignore_patterns(without) if without else None
    return Path(shutil.copytree(model, place, ignore=ignored, dirs_exist_ok=True))


# ---------------------------------------------------------------- files of other programs

file_case("gguf", "m.gguf", b"GGUF\x03" + bytes(60), "GGUF", "dequantise")
file_case("gguf under another name", "m.bin", b"GGUF\x03" + bytes(60), "GGUF", "dequantise")
file_case("ggml", "m.ggml", b"tjgg" + bytes(60), "quantised", "dequantise")
file_case("onnx", "m.onnx", b"\x08\x09\x12\x07pytorch", "ONNX", "exported")
file_case("tflite", "m.tflite", b"\x1c\x00\x00\x00TFL3", "graphs", "exported")
file_case("frozen graph", "m.pb", b"\n\x10", "graphs", "exported")
file_case("tensorrt", "m.engine", b"ftrt" + bytes(9), "graphs", "exported")
file_case("core ml", "m.mlmodel", b"\x08\x05", "graphs", "exported")
file_case("keras", "m.keras", b"PK\x03\x04" + bytes(60), "Keras", "from_tf=True")
file_case("hdf5", "tf_model.h5", b"\x89HDF\r\n\x1a\n" + bytes(60), "HDF5", "PyTorch")
file_case("flax", "flax_model.msgpack", b"\x81\xa4bert", "Flax", "from_flax=True")
file_case("rust", "rust_model.ot", b"PK\x03\x04" + bytes(60), "rust-bert", "PyTorch")
file_case("tensorflow 1", "m.ckpt.index", b"\x00\x01abc", "TensorFlow", "PyTorch")
file_case("tensorflow 1 data", "m.ckpt.data-00000-of-00001", b"\x07abc", "TensorFlow", "PyTorch")
file_case("paddle", "m.pdparams", b"\x80\x04abc", "Paddle", ".safetensors")
file_case("numpy", "m.npz", b"PK\x03\x04" + bytes(60), "NumPy", ".safetensors")
file_case("nemo", "m.nemo", b"./" + bytes(3) + b"model_config", "archives", "unpack")
file_case("zip", "m.zip", b"PK\x03\x04" + bytes(60), "archives", "unpack")
file_case("gzip", "m.bin", gzip.compress(b"weights"), "gzip", "unpack")
file_case("tar.gz", "m.tar.gz", gzip.compress(b"weights"), "gzip", "unpack")
file_case("7z", "m.safetensors", b"7z\xbc\xaf\x27\x1c", "7z", "unpack")
file_case("text", "m.txt", b"hello", ".txt files are not read", ".safetensors")
file_case("no suffix", "weights", b"hello", "are not read", ".safetensors")

# ---------------------------------------------------------------- downloads

file_case("pointer", "model.safetensors", POINTER.encode(), "git-lfs pointer", "git lfs pull")
file_case("pointer in a bin", "pytorch_model.bin", POINTER.encode(), "pointer", "git lfs pull")
file_case("pointer in a ckpt", "v1.ckpt", POINTER.encode(), "pointer", "git lfs pull")
file_case("pointer in a gguf", "m.gguf", POINTER.encode(), "pointer", "git lfs pull")
file_case("empty", "model.safetensors", b"", "is empty", "download it again")
file_case("empty pt", "m.pt", b"", "is empty", "download it again")
file_case("zeros", "m.safetensors", bytes(4096), "zeros", "download it again")
file_case("web page", "m.safetensors", b"<!DOCTYPE html><title>404", "web page", "file itself")
file_case("web page in a bin", "m.bin", b"\n<html><body>", "web page", "file itself")
file_case("half", "model.safetensors.incomplete", b"\x10abc", "not complete", "download it again")
file_case("browser's half", "m.pt.crdownload", b"\x10abc", "not complete", "download it again")
CONFIG = b'{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}'
folder_case(
    "folder of pointers",
    {"config.json": CONFIG, "model.safetensors": POINTER.encode()},
    "model.safetensors",
    "git lfs pull",
)
folder_case("pointer in place of config.json", {"config.json": POINTER.encode()}, "git lfs pull")
folder_case(
    "download of the hub that stopped",
    {"config.json": CONFIG, ".cache/huggingface/download/xyz.incomplete": b"abc"},
    "not downloaded to the end",
    "same download again",
)
folder_case(
    "browser's download that stopped",
    {"config.json": CONFIG, "model.safetensors.part": b"abc"},
    "model.safetensors.part",
    "same download again",
)

# ---------------------------------------------------------------- folders

folder_case("empty folder", {}, "is empty", "give the directory")
folder_case("only a config", {"config.json": CONFIG}, "no weight file", "give a transformers")
folder_case("notes", {"a.txt": b"x"}, "neither a config.json nor a weight file", "give")
folder_case(
    "keras folder",
    {"config.json": CONFIG, "tf_model.h5": b"\x89HDF"},
    "tf_model.h5",
    "from_tf=True",
)
folder_case(
    "flax folder", {"config.json": CONFIG, "flax_model.msgpack": b"x"}, "Flax", "from_flax=True"
)
folder_case("onnx folder", {"config.json": CONFIG, "model.onnx": b"x"}, "ONNX", "exported")
folder_case("gguf folder", {"q4.gguf": b"GGUF", "q8.gguf": b"GGUF"}, "GGUF", "dequantise")
folder_case(
    "tensorflow 1 folder",
    {"bert.ckpt.index": b"x", "bert.ckpt.meta": b"x", "bert.ckpt.data-00000-of-00001": b"x"},
    "TensorFlow",
    "PyTorch",
)
folder_case(
    "trainer's folder",
    {"checkpoint-500/model.safetensors": b"x", "checkpoint-900/model.safetensors": b"x"},
    "checkpoint-500, checkpoint-900",
    "checkpoint-900",
)
folder_case(
    "deepspeed",
    {"latest": b"global_step9", "zero_to_fp32.py": b"x", "global_step9/zero_states.pt": b"x"},
    "DeepSpeed",
    "python zero_to_fp32.py",
)
folder_case("megatron", {"mp_rank_00/model_optim_rng.pt": b"x"}, "Megatron", "convert")
folder_case(
    "pipeline",
    {
        "model_index.json": b'{"unet": ["diffusers", "UNet2D"], "vae": ["diffusers", "VAE"]}',
        "unet/diffusion_pytorch_model.safetensors": b"x",
        "vae/diffusion_pytorch_model.safetensors": b"x",
    },
    "pipeline of diffusers",
    "unet, vae",
    "given/unet",
    "model.factory",
)
folder_case(
    "newer pipeline",
    {"model_index.json": b"{}", "transformer/x.safetensors": b"x", "vae/x.safetensors": b"x"},
    "pipeline of diffusers",
)
folder_case(
    "old sentence-transformers",
    {"modules.json": b"[]", "0_Transformer/pytorch_model.bin": b"x"},
    "sentence-transformers",
    "given/0_Transformer",
)


@case("folder of cached model", NAME, f"snapshots/{COMMIT}")
def _cached(folder: Path, model: Path) -> Path:
    cached = folder / NAME
    copied(model, cached / "snapshots" / COMMIT)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(COMMIT)
    return cached


@case("snapshots of a cached model", f"snapshots/{COMMIT}")
def _snapshots(folder: Path, model: Path) -> Path:
    return _cached(folder, model) / "snapshots"


@case("whole cache", "hub's cache", "1 models", f"snapshots/{COMMIT}")
def _cache(folder: Path, model: Path) -> Path:
    return _cached(folder, model).parent


@case("blob of a cache", f"snapshots/{COMMIT}")
def _blob(folder: Path, model: Path) -> Path:
    cached = _cached(folder, model)
    (cached / "blobs").mkdir()
    (cached / "blobs" / "4d7a2146").write_bytes(b"\x10abc")
    return cached / "blobs" / "4d7a2146"


@case("cached model without files", "without a whole download", "hf download org/tiny")
def _unfinished(folder: Path, model: Path) -> Path:
    for name in ("refs", "snapshots", "blobs"):
        (folder / NAME / name).mkdir(parents=True)
    return folder / NAME


@case("weights without their folder", "give its directory", "config.json")
def _weights(folder: Path, model: Path) -> Path:
    return model / "model.safetensors"


@case("config.json", "is not a weight file", "give its directory")
def _config(folder: Path, model: Path) -> Path:
    return model / "config.json"


@case("llama of meta", "config.json", "convert it to transformers' format")
def _meta(folder: Path, model: Path) -> Path:
    torch.save({"tok_embeddings.weight": torch.ones(3, 3)}, folder / "consolidated.00.pth")
    (folder / "params.json").write_text('{"dim": 3}')
    return folder


@case("zip of a model under a weight's name", "cannot be read")
def _zipped(folder: Path, model: Path) -> Path:
    with zipfile.ZipFile(folder / "m.pt", "w") as archive:
        archive.write(model / "config.json", "config.json")
    return folder / "m.pt"


# ---------------------------------------------------------------- paths that are not there


def missing(name: str, given: str, *words: str) -> None:
    """Adds a case of a path that does not exist."""
    case(name, *words)(lambda folder, model: Path(given))


missing("name on the hub", "org/name-7b", "does not exist", "hf download org/name-7b")
missing("page of the hub", "https://huggingface.co/org/name", "is an address", "download it first")
missing("bucket", "s3://bucket/model", "is an address", "download it first")
missing("hf address", "hf://org/name", "is an address", "download it first")
missing("home", "~/models/llama", "~ is not expanded", "whole path")


@case("typing mistake", "does not exist", "model-1 is there")
def _typed(folder: Path, model: Path) -> Path:
    (folder / "model-1").mkdir()
    return folder / "modle-1"


# ---------------------------------------------------------------- adapters


def adapter(
    config: dict[str, Any], tensors: dict[str, torch.Tensor], *, file: str = "adapter_model"
) -> Make:
    """Returns a maker of a folder with an adapter alone."""

    def make(folder: Path, model: Path) -> Path:
        (folder / "adapter_config.json").write_text(json.dumps(config))
        save_file(tensors, folder / f"{file}.safetensors")
        return folder

    return make


Q = "base_model.model.model.layers.0.self_attn.q_proj"
FACTORS = {f"{Q}.lora_A.weight": torch.ones(4, 64), f"{Q}.lora_B.weight": torch.ones(64, 4)}
LORA = {"peft_type": "LORA", "base_model_name_or_path": "org/base", "r": 4}
MERGE = "merge_and_unload"
case("lora", "LORA", "org/base", MERGE)(adapter(LORA, FACTORS))
case("dora", "LORA", MERGE)(
    adapter(LORA | {"use_dora": True}, FACTORS | {f"{Q}.lora_magnitude_vector": torch.ones(64)})
)
case("ia3", "IA3", MERGE)(adapter({"peft_type": "IA3"}, {f"{Q}.ia3_l": torch.ones(64, 1)}))
case("loha", "LOHA", MERGE)(adapter({"peft_type": "LOHA"}, {f"{Q}.hada_w1_a": torch.ones(64, 4)}))
case("pissa", "LORA", MERGE)(adapter(LORA | {"init_lora_weights": "pissa"}, FACTORS))
case("prompt tuning", "PROMPT_TUNING", "cannot be merged", "load the adapter on the output")(
    adapter({"peft_type": "PROMPT_TUNING"}, {"prompt_embeddings": torch.ones(4, 64)})
)
case("prefix tuning", "PREFIX_TUNING", "cannot be merged")(
    adapter({"peft_type": "PREFIX_TUNING"}, {"prompt_embeddings": torch.ones(4, 64)})
)
case("adapter of adapters", "library adapters", "merge_adapter")(
    adapter(
        {"model_class": "LlamaAdapterModel", "config": {"architecture": "lora"}},
        {"layers.0.self_attn.q_proj.loras.x.lora_A": torch.ones(4, 64)},
        file="pytorch_adapter",
    )
)


def bare_adapter(name: str, *keys: str) -> None:
    """Adds a case of one file with the tensors of an adapter alone."""

    def make(folder: Path, model: Path) -> Path:
        save_file({key: torch.ones(4, 4) for key in keys}, folder / "a.safetensors")
        return folder / "a.safetensors"

    case(name, keys[0], "adapter", "not a whole network", "merge")(make)


bare_adapter("file of peft", f"{Q}.lora_A.weight", f"{Q}.lora_B.weight")
bare_adapter(
    "file of diffusers", "unet.down.0.to_q.lora_A.weight", "unet.down.0.to_q.lora_B.weight"
)
bare_adapter("file of kohya", "lora_unet_q.lora_down.weight", "lora_unet_q.alpha")
bare_adapter("file of lycoris", "lora_unet_q.hada_w1_a", "lora_unet_q.hada_w2_b")
bare_adapter("file of lokr", "lora_unet_q.lokr_w1", "lora_unet_q.lokr_w2_a")
bare_adapter("light control net", "lllite_unet_q.down.0.weight", "lllite_unet_q.up.0.weight")


def beside(name: str, edit: Callable[[dict[str, torch.Tensor]], None], *words: str) -> None:
    """Adds a case of a whole model with other tensors."""

    def make(folder: Path, model: Path) -> Path:
        path = copied(model, folder / "whole")
        state = load_file(path / "model.safetensors")
        edit(state)
        save_file(state, path / "model.safetensors", {"format": "pt"})
        return path

    case(name, *words)(make)


OWN = "model.layers.0.self_attn.q_proj"


def unmerged(state: dict[str, torch.Tensor]) -> None:
    weights = {key: state.pop(key) for key in list(state)}
    for key, tensor in weights.items():
        state[f"base_model.model.{key}"] = tensor
    weight = state.pop(f"base_model.model.{OWN}.weight")
    state[f"base_model.model.{OWN}.base_layer.weight"] = weight
    state[f"base_model.model.{OWN}.lora_A.default.weight"] = torch.ones(4, 64)
    state[f"base_model.model.{OWN}.lora_B.default.weight"] = torch.ones(64, 4)


def based(state: dict[str, torch.Tensor]) -> None:
    state[f"{OWN}.base_layer.weight"] = state.pop(f"{OWN}.weight")
    state[f"{OWN}.lora_A.default.weight"] = torch.ones(4, 64)


beside("unmerged", unmerged, "never merged", "base_layer", MERGE)
beside("unmerged without the prefix", based, "never merged", "base_layer", MERGE)
for kind, end in {
    "lora": "lora_A.weight",
    "dora": "lora_magnitude_vector",
    "ia3": "ia3_l",
    "loha": "hada_w1_a",
    "oft": "oft_r",
    "vera": "vera_lambda_b",
}.items():
    beside(
        f"{kind} beside the weights",
        lambda state, end=end: state.update({f"{OWN}.{end}": torch.ones(4, 64)}),  # type: ignore
        "never merged",
        f"{OWN}.{end}",
        MERGE,
    )


@case("adapter's config beside a model", "adapter_config.json", "transformers would load", MERGE)
def _beside(folder: Path, model: Path) -> Path:
    path = copied(model, folder / "whole")
    (path / "adapter_config.json").write_text(json.dumps(LORA))
    return path


# ---------------------------------------------------------------- the table


@pytest.mark.parametrize("name", CASES)
def test_what_a_path_holds_is_said(
    name: str, tmp_path: Path, checkpoint: pico.Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, words = CASES[name]
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "no-cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    path = make(tmp_path / "here", checkpoint("llama"))
    assert_one_sentence(pico.call("inspect", path), 2, *words)


def test_a_model_of_the_hub_is_found_in_the_cache(
    tmp_path: Path, checkpoint: pico.Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    cached = _cached(tmp_path, checkpoint("llama"))
    found = cached / "snapshots" / COMMIT
    assert_one_sentence(pico.call("inspect", "org/tiny"), 2, f"give the folder there: {found}")
    assert pico.call("inspect", found).code == 0


@pytest.mark.parametrize("name", ["net.pth.tar", "net.pt.tar", "net.ckpt", "net.pth", "net.bin"])
def test_names_that_training_loops_give_are_read(
    name: str, tmp_path: Path, plain_folder: pico.PlainFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(plain_folder.path)
    state = load_file(plain_folder.path / "mlp.safetensors")
    torch.save({"epoch": 3, "state_dict": state, "best": 0.1}, tmp_path / name)
    ended = pico.call("inspect", tmp_path / name, "--factory", "pico_factories:mlp")
    assert ended.code == 0, ended.err
