"""What belongs to the model is carried over, and what else lies beside the weights is said."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from pico import Models
from safetensors.torch import save_file

from lrc_cli.checkpoint.side_files import COPY, EXPORT, TRAINING, UNREAD, WEIGHTS
from lrc_cli.checkpoint.source import open_source

STATE = {f"layers.{i}.weight": torch.ones(4 + i, 3) for i in range(9)} | {"norm": torch.ones(3)}
OTHER = {"linear.weight": torch.ones(5, 7), "linear.bias": torch.ones(5)}
OPTIMIZER = {"state": {0: {"exp_avg": torch.ones(4, 3)}}, "param_groups": [{"lr": 0.1}]}


class Arguments:
    """What a trainer pickles: an object of a class."""


def tensors(state: dict[str, torch.Tensor]) -> Callable[[Path], None]:
    return lambda file: save_file(state, file)


def saved(value: Any, *, old: bool = False) -> Callable[[Path], None]:
    return lambda file: torch.save(value, file, _use_new_zipfile_serialization=not old)


def words(file: Path) -> None:
    file.write_text("{}")


def renamed(prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + key: x for key, x in STATE.items()}


METAS = {f"blk{i}.w": x.clone() for i, x in enumerate(STATE.values())}
TURNED = {f"blk{i}.w": x.t().contiguous() for i, x in enumerate(STATE.values()) if x.ndim > 1}

LEFT: dict[str, tuple[dict[str, Callable[[Path], None]], str, str]] = {
    "pytorch_model.bin": ({"pytorch_model.bin": saved(STATE)}, "pytorch_model.bin", WEIGHTS),
    "large letters": ({"MODEL.PT": saved(STATE)}, "MODEL.PT", WEIGHTS),
    "an index in large letters": (
        {"M.BIN.INDEX.JSON": words}, "M.BIN.INDEX.JSON", WEIGHTS,
    ),
    "an export in large letters": ({"TF_MODEL.H5": words}, "TF_MODEL.H5", EXPORT),
    "an optimizer in large letters": ({"Optimizer.PT": saved(OPTIMIZER)}, "Optimizer.PT", TRAINING),
    "a copy in large letters": ({"w/M.SafeTensors": tensors(STATE)}, "w/M.SafeTensors", COPY),
    "tf_model.h5": ({"tf_model.h5": words}, "tf_model.h5", EXPORT),
    "flax_model.msgpack": ({"flax_model.msgpack": words}, "flax_model.msgpack", EXPORT),
    "rust_model.ot": ({"rust_model.ot": words}, "rust_model.ot", EXPORT),
    "gguf": ({"m-q4.gguf": words}, "m-q4.gguf", EXPORT),
    "gguf in a folder": ({"gguf/m.gguf": words}, "gguf/m.gguf", EXPORT),
    "onnx": ({"onnx/model.onnx": words, "onnx/config.json": words}, "onnx", EXPORT),
    "openvino": ({"openvino_model.bin": words}, "openvino_model.bin", EXPORT),
    "openvino in a folder": ({"openvino/openvino_model.xml": words}, "openvino", EXPORT),
    "openvino elsewhere": ({"ov/openvino_model.bin": words}, "ov/openvino_model.bin", EXPORT),
    "Core ML": ({"m.mlpackage/Data/weights": words}, "m.mlpackage", EXPORT),
    "Meta's own": ({"original/consolidated.00.pth": saved(METAS)}, "original", EXPORT),
    "Meta's own in another folder": (
        {"meta/consolidated.00.pth": saved(METAS), "meta/params.json": words},
        "meta/consolidated.00.pth", COPY,
    ),
    "turned matrices": ({"tf/w.safetensors": tensors(TURNED)}, "tf/w.safetensors", COPY),
    "training_args.bin": ({"training_args.bin": saved({"a": 1})}, "training_args.bin", TRAINING),
    "optimizer.pt": ({"optimizer.pt": saved(OPTIMIZER)}, "optimizer.pt", TRAINING),
    "rng_state.pth": ({"rng_state_3.pth": saved({})}, "rng_state_3.pth", TRAINING),
    "accelerate": ({"random_states_0.pkl": words}, "random_states_0.pkl", TRAINING),
    "a trainer's folder": (
        {"checkpoint-500/model.safetensors": tensors(STATE), "checkpoint-500/vocab.txt": words},
        "checkpoint-500", TRAINING,
    ),
    "a trainer's folder of other weights": (
        {"checkpoint-500/adapter_model.safetensors": tensors(OTHER)}, "checkpoint-500", TRAINING,
    ),
    "DeepSpeed": (
        {"global_step10/zero_pp_rank_0_mp_rank_00_optim_states.pt": saved({})},
        "global_step10", TRAINING,
    ),
    "a trainer's folder in a folder": (
        {"run/checkpoint-5/optimizer.pt": saved({})}, "run/checkpoint-5", TRAINING,
    ),
    "an optimizer of another name": ({"run/opt.pt": saved(OPTIMIZER)}, "run/opt.pt", TRAINING),
    "Lightning": (
        {"run/last.ckpt": saved({"state_dict": STATE, "optimizer_states": [], "epoch": 3})},
        "run/last.ckpt", TRAINING,
    ),
    "a copy with a config": (
        {"best/model.safetensors": tensors(STATE), "best/config.json": words, "best/a.txt": words},
        "best", COPY,
    ),
    "a copy without a config": ({"w/m.safetensors": tensors(STATE)}, "w/m.safetensors", COPY),
    "a copy in bfloat16": (
        {"w/m.safetensors": tensors({k: x.bfloat16() for k, x in STATE.items()})},
        "w/m.safetensors", COPY,
    ),
    "a copy of whole numbers": (
        {"w/m.safetensors": tensors({k: x.to(torch.int8) for k, x in STATE.items()})},
        "w/m.safetensors", COPY,
    ),
    "a copy by torch": ({"w/m.pt": saved(STATE)}, "w/m.pt", COPY),
    "a copy by an old torch": ({"w/m.pt": saved(STATE, old=True)}, "w/m.pt", COPY),
    "a copy under a key": ({"w/m.pt": saved({"model": STATE, "epoch": 3})}, "w/m.pt", COPY),
    "a copy under a wrapper": ({"w/m.pt": saved(renamed("module."))}, "w/m.pt", COPY),
    "a copy under Lightning": ({"w/m.pt": saved(renamed("model."))}, "w/m.pt", COPY),
    "half of a copy": (
        {"w/m.safetensors": tensors(dict(list(STATE.items())[:4]))}, "w/m.safetensors", COPY,
    ),
    "an averaged copy with more": ({"ema/m.pt": saved(STATE | OTHER)}, "ema/m.pt", COPY),
    "torch.distributed": ({"dcp/__0_0.distcp": words}, "dcp/__0_0.distcp", COPY),
    "an object": ({"w/object.pt": saved(Arguments())}, "w/object.pt", UNREAD),
    "no file of torch.save": ({"w/ggml.bin": words}, "w/ggml.bin", UNREAD),
}  # fmt: skip

CARRIED: dict[str, dict[str, Callable[[Path], None]]] = {
    "sentence-transformers": {
        "modules.json": words,
        "1_Pooling/config.json": words,
        "2_Dense/model.safetensors": tensors(OTHER),
        "2_Dense/config.json": words,
    },
    "sentence-transformers by torch": {"2_Dense/pytorch_model.bin": saved(OTHER)},
    "sentence-transformers by an old torch": {"2_Dense/pytorch_model.bin": saved(OTHER, old=True)},
    "a voice": {"voices/ann.pt": saved(torch.ones(3))},
    "a list of tensors": {"voices/all.pt": saved([torch.ones(3)])},
    "tokenizers": {
        "spiece.model": words,
        "vocab.txt": words,
        "merges.txt": words,
        "a.tiktoken": words,
    },
    "templates": {"chat_template.jinja": words, "additional_chat_templates/tool.jinja": words},
    "processors": {"preprocessor_config.json": words, "generation_config.json": words},
    "code": {"modeling_own.py": words, "own/__init__.py": words, "LICENSE": words},
    "a card in a folder": {"docs/README.md": words, "docs/config.json": words},
    "a folder called as a step": {"step_1/prompt.txt": words},
    "another vocabulary": {"pkg/vocab.h": words, "pkg/encoder.json": words},
    "an adapter": {"adapter/adapter_model.safetensors": tensors(OTHER)},
    "no safetensors": {"w/m.safetensors": words},
}

HIDDEN = [".git/objects/a", ".cache/x.bin", "__pycache__/a.pyc", "README.md", "report.json"]


def checkpoint_with(directory: Path, files: dict[str, Callable[[Path], None]]) -> Path:
    save_file(STATE, directory / "model.safetensors")
    for name, write in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        write(directory / name)
    return directory


def carried(path: Path) -> set[str]:
    return {file.relative_to(path).as_posix() for file in open_source(path).side_files()}


@pytest.mark.parametrize("kind", LEFT)
def test_other_forms_of_the_network_and_training_states_are_left_out(
    kind: str, tmp_path: Path
) -> None:
    files, name, why = LEFT[kind]
    source = open_source(checkpoint_with(tmp_path, {**files, "LICENSE": words}))
    if why == WEIGHTS:  # a second form is read, and is one network with the first
        assert source.files == [tmp_path / "model.safetensors"]
    assert source.left_out == {name: why}
    assert carried(tmp_path) == {"LICENSE"} | {f for f in files if not f.startswith(name)}
    assert any(name in note and why in note for note in source.notes)
    assert not any("weights of other networks" in note for note in source.notes)


@pytest.mark.parametrize("kind", CARRIED)
def test_what_belongs_to_the_model_is_carried_over(kind: str, tmp_path: Path) -> None:
    files = CARRIED[kind]
    source = open_source(checkpoint_with(tmp_path, files))
    assert carried(tmp_path) == set(files) and not source.left_out
    weights = {name for name in files if name.endswith((".safetensors", ".bin", ".pt"))}
    assert all(any(name in note for note in source.notes) for name in weights)


def test_hidden_files_and_files_that_lrc_replaces_pass_without_a_word(tmp_path: Path) -> None:
    source = open_source(checkpoint_with(tmp_path, dict.fromkeys(HIDDEN, words)))
    assert not source.side_files() and not source.left_out and not source.notes


def test_an_index_goes_with_its_shards(tmp_path: Path) -> None:
    index = "w/model.safetensors.index.json"
    checkpoint_with(tmp_path, {"w/a.safetensors": tensors(STATE), index: words})
    assert open_source(tmp_path).left_out == {"w/a.safetensors": COPY, index: COPY}
    checkpoint_with(tmp_path, {"w/a.safetensors": tensors(OTHER)})
    assert carried(tmp_path) == {"w/a.safetensors", index}


def test_an_output_holds_no_second_network(checkpoint: Models, tmp_path: Path, text: Path) -> None:
    model = shutil.copytree(checkpoint("llama"), tmp_path / "model")
    shutil.copytree(checkpoint("llama"), model / "best")
    (model / "2_Dense").mkdir()
    save_file(OTHER, model / "2_Dense/model.safetensors")
    output, report = pico.compressed(
        tmp_path, {"model.path": str(model), "calibration.path": str(text)}
    )
    assert not (output / "best").exists() and (output / "2_Dense/model.safetensors").exists()
    assert report["provenance"]["left_out"] == {"best": COPY}
    for page in ("README.md", "report.html"):
        assert "another copy of the network" in (output / page).read_text()
