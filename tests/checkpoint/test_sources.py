"""These tests read checkpoints in every form that people have, and see other forms refused."""

import errno
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from hf_helpers import mapped_file
from pico import Models
from safetensors.torch import save_file
from source_helpers import FORMS, as_bin
from torch import nn
from torch.distributed import checkpoint as dcp
from transformers import GPT2Config, GPT2LMHeadModel

from lrc_cli import load
from lrc_cli.checkpoint.source import open_source
from lrc_cli.errors import InputError, RunError

JOB = {"calibration.num_sequences": 4, "evaluation": None, "compression.method": "frobenius"}


@pytest.fixture(scope="module")
def expected(checkpoint: Models, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pico Llama compressed from its .safetensors files."""
    changes = {"model.path": str(checkpoint("llama")), "calibration.path": str(text)}
    output, _ = pico.compressed(tmp_path_factory.mktemp("expected"), JOB | changes)
    return output


@pytest.fixture(scope="module")
def written(checkpoint: Models, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns the directory of the pico Llama in one of FORMS, by the form's name."""
    root = tmp_path_factory.mktemp("sources")

    def write(form: str) -> Path:
        if not (root / form).exists():
            FORMS[form](checkpoint("llama"), root / form)
        return root / form

    return write


@pytest.mark.parametrize("form", FORMS)
def test_the_form_of_a_checkpoint_changes_nothing(
    form: str,
    checkpoint: Models,
    text: Path,
    expected: Path,
    written: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    source = written(form)
    changes = {"model.path": str(source), "calibration.path": str(text)}
    output, report = pico.compressed(tmp_path, JOB | changes)
    wanted, found = pico.read_state(expected), pico.read_state(output)
    assert set(wanted) == set(found) and pico.factorised_keys(found)
    assert all(torch.equal(wanted[key], found[key]) for key in wanted)
    names = {file.name for file in expected.iterdir()}
    assert {file.name for file in output.iterdir()} == names
    assert type(load(output)).__name__ == "LlamaForCausalLM"
    original = json.loads((expected / "report.json").read_text())
    assert report["size"] == original["size"]
    for command in ("verify", "eval"):
        ended = pico.call(command, output, "--against", source)
        assert ended.code == 0, ended.out + ended.err
    inspected = [pico.call("inspect", path, "--json") for path in (checkpoint("llama"), source)]
    layers = [json.loads(ended.out)["layers"] for ended in inspected]
    assert layers[0] == layers[1] and layers[0]


@pytest.mark.parametrize("form", [form for form in FORMS if form != "old bin"])
def test_parameters_are_views_of_mapped_files(form: str, written: Callable[[str], Path]) -> None:
    source = written(form)
    files = {mapped_file(parameter) for parameter in load(source).parameters()}
    # Shards of tensors are put together in a file without a name.
    inside = "(deleted)" if form == "distributed" else str(source)
    assert files and all(inside in str(file) for file in files)


def test_other_files_are_another_checkpoint(written: Callable[[str], Path], expected: Path) -> None:
    source = open_source(written("distributed"))
    assert {".metadata", "__0_0.distcp", "__1_0.distcp", "config.json"} <= set(source.hashes)
    assert pico.call("verify", expected, "--against", source.path).code == 3


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt"])
def test_a_bare_file_and_a_factory(
    suffix: str, plain_folder: pico.PlainFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(plain_folder.path)
    state = pico.read_state(plain_folder.path / "mlp.safetensors")
    file = tmp_path / f"mlp{suffix}"
    torch.save(state if suffix == ".pt" else {"model": state, "step": 7}, file)
    wanted, _ = pico.compressed(tmp_path, plain_folder.model("mlp"))
    changes = {"model.path": str(file), "output.path": str(tmp_path / "other")}
    output, _ = pico.compressed(tmp_path, plain_folder.model("mlp") | changes)
    first, second = pico.read_state(wanted), pico.read_state(output)
    assert set(first) == set(second) and all(torch.equal(first[k], second[k]) for k in first)
    factory = ("--factory", "pico_factories:mlp")
    ended = pico.call("verify", output, "--against", file, *factory)
    assert ended.code == 0, ended.out
    assert pico.call("eval", output, *factory).code == 0
    assert pico.call("inspect", file).code == 2, "it needs a factory"
    assert "compressible: 3 layers" in pico.call("inspect", file, *factory).out


def test_a_distributed_directory_and_a_factory(
    plain_folder: pico.PlainFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(plain_folder.path)
    state = pico.read_state(plain_folder.path / "mlp.safetensors")
    dcp.save(state, checkpoint_id=tmp_path / "source", no_dist=True)
    changes = {"model.path": str(tmp_path / "source")}
    output, _ = pico.compressed(tmp_path, plain_folder.model("mlp") | changes)
    assert pico.factorised_keys(pico.read_state(output))
    source = open_source(tmp_path / "source")
    assert all(torch.equal(source.read(key), state[key]) for key in state)


def test_tied_weights_are_stored_once(text: Path, tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    model = GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path / "source")
    pico.write_tokenizer(tmp_path / "source")
    (tmp_path / "source" / "model.safetensors").unlink()
    state = {"lm_head.weight": model.lm_head.weight, **model.state_dict()}
    torch.save(state, tmp_path / "source" / "pytorch_model.bin")
    assert len(open_source(tmp_path / "source").tensors) == len(state) - 1
    changes = {"model.path": str(tmp_path / "source"), "calibration.path": str(text)}
    output, _ = pico.compressed(tmp_path, JOB | changes)
    loaded = load(output)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert len({"lm_head.weight", "transformer.wte.weight"} & set(pico.read_state(output))) == 1


def test_a_head_that_the_files_lack_is_named_with_the_remedy(
    checkpoint: Models, tmp_path: Path
) -> None:
    as_bin(checkpoint("bert"), tmp_path / "source")
    file = tmp_path / "source" / "config.json"
    config = json.loads(file.read_text()) | {"architectures": ["BertForMaskedLM"]}
    file.write_text(json.dumps(config))
    ended = pico.call("inspect", tmp_path / "source")
    assert ended.code == 2 and 'write "architectures": ["BertModel"]' in ended.err
    for architectures in (["BertModel"], None):
        file.write_text(json.dumps(config | {"architectures": architectures}))
        assert json.loads(pico.call("inspect", tmp_path / "source", "--json").out)["layers"]


# ---------------------------------------------------------------- what is refused


class Linear(nn.Linear):
    """A class that no reader knows."""


def whole_module(file: Path) -> Path:
    torch.save(Linear(4, 4), file)
    return file


def program(file: Path) -> Path:
    exported = torch.export.export(nn.Linear(4, 4), (torch.zeros(2, 4),))
    torch.export.save(exported, file.with_suffix(".pt2"))
    return file.with_suffix(".pt2")


def script(file: Path) -> Path:
    torch.jit.save(torch.jit.trace(nn.Linear(4, 4), torch.zeros(2, 4)), file)
    return file


def cut(file: Path) -> Path:
    torch.save({"weight": torch.zeros(400)}, file)
    file.write_bytes(file.read_bytes()[:-600])
    return file


def saved(content: Any) -> Callable[[Path], Path]:
    def save(file: Path) -> Path:
        torch.save(content, file)
        return file

    return save


def tensors(state: pico.State) -> Callable[[Path], Path]:
    def save(file: Path) -> Path:
        save_file(state, file.with_suffix(".safetensors"))
        return file.with_suffix(".safetensors")

    return save


def named(name: str) -> Callable[[Path], Path]:
    def write(file: Path) -> Path:
        path = file.parent / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"GGUF")
        return path

    return write


def folder_of(name: str) -> Callable[[Path], Path]:
    return lambda file: named(f"folder/{name}")(file).parent


STATE = {"weight": torch.zeros(4, 4), "bias": torch.zeros(4)}
REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "module": (whole_module, "holds code .*Linear.*, which lrc does not run; save the state dict"),
    "program": (program, "torch.export program is a graph without layers.*state_dict.*factory"),
    "script": (script, "TorchScript program is a graph without layers.*state_dict"),
    "cut": (cut, "cannot be read as a file of torch.save"),
    "list": (saved([torch.zeros(3)]), "holds a list, no state dict"),
    "tensor": (saved(torch.zeros(3)), "holds a Tensor, no state dict"),
    "empty": (saved({}), "holds no state dict, only nothing"),
    "numbers": (saved({"epoch": 3}), r"holds no state dict, only 'epoch' \(int\)"),
    "two": (
        saved({"model": STATE, "ema": {name: x + 1 for name, x in STATE.items()}}),
        r"several state dicts: 'model' of 2 tensors.*'ema' of 2.*; choose one with model.state_d",
    ),
    "sparse": (saved({"weight": torch.eye(4).to_sparse()}), "weight is not a plain dense tensor"),
    "float8": (saved({"weight": torch.zeros(4, 4).to(torch.float8_e4m3fn)}), "float8.*dequantise"),
    "qint8": (
        saved({"weight": torch.quantize_per_tensor(torch.zeros(4, 4), 0.1, 0, torch.qint8)}),
        "dtype qint8.*dequantise",
    ),
    "int8": (tensors({"weight": torch.zeros(4, 4, dtype=torch.int8)}), "weight is quantised.*int8"),
    "gptq": (tensors({"a.qweight": torch.zeros(4, 4, dtype=torch.int32)}), "qweight is quantised"),
    "gguf": (named("model.gguf"), "GGUF files hold quantised weights; dequantise"),
    "gguf folder": (folder_of("model.gguf"), "GGUF files hold quantised weights; dequantise"),
    "packed": (
        tensors({"a.weight_packed": torch.zeros(4, 2, dtype=torch.int32)}),
        "a.weight_packed is quantised: it holds int32 numbers; dequantise",
    ),
    "int8 beside": (
        tensors({"a.weight_int8": torch.zeros(4, 4, dtype=torch.int8)}),
        "a.weight_int8 is quantised: it holds int8 numbers; dequantise",
    ),
    "int8 attention": (
        tensors({"in_proj_weight": torch.zeros(4, 4, dtype=torch.int8)}),
        "in_proj_weight is quantised",
    ),
    "int8 recurrent": (
        tensors({"weight_ih_l0": torch.zeros(4, 4, dtype=torch.int8)}),
        "weight_ih_l0 is quantised",
    ),
    "program folder": (
        lambda file: program(named("folder/notes.txt")(file).with_name("model.pt")).parent,
        "torch.export program is a graph without layers.*state_dict.*factory",
    ),
    "gguf under another name": (named("model.xyz"), "GGUF files hold quantised weights"),
    "no weights": (folder_of("notes.txt"), "neither a config.json nor a weight file"),
    "metadata": (folder_of(".metadata"), "metadata.* cannot be read, or names code"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_dense_checkpoint_is_refused_in_one_sentence(kind: str, tmp_path: Path) -> None:
    write, cause = REFUSED[kind]
    path = write(tmp_path / "model.pt")
    ended = pico.call("inspect", path, "--factory", "torch.nn:Identity")
    assert ended.code == 2 and ended.err.count("\n") == 1
    with pytest.raises(InputError, match=cause) as caught:
        open_source(path)
    assert caught.value.remedy and str(path) in str(caught.value)


def test_a_generators_state_is_no_state_dict(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    for beside in ({"rng_state": state}, {"rng_state": {"cpu": state}}):
        torch.save({"model": STATE, "step": torch.tensor(3)} | beside, tmp_path / "all.pt")
        assert open_source(tmp_path / "all.pt").tensors.keys() == STATE.keys()


def test_a_config_of_timm_asks_for_a_factory(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet18"}))
    ended = pico.call("inspect", tmp_path)
    assert ended.code == 2 and ended.err.count("\n") == 1
    assert "has no model_type" in ended.err and "timm.create_model" in ended.err


def test_several_files_without_an_index_are_not_guessed_at(tmp_path: Path) -> None:
    for name in ("a.pt", "b.pt"):
        torch.save(STATE, tmp_path / name)
    with pytest.raises(InputError, match=r"several .pt files.*give the one file"):
        open_source(tmp_path)


def test_metadata_runs_no_code(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "attacked"),)

    (tmp_path / "save").mkdir()
    (tmp_path / "save" / ".metadata").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(InputError, match="names code that lrc does not run"):
        open_source(tmp_path / "save")
    assert not (tmp_path / "attacked").exists()


def test_a_damaged_distributed_directory(tmp_path: Path) -> None:
    dcp.save(STATE, checkpoint_id=tmp_path / "save", no_dist=True)
    (shard,) = (tmp_path / "save").glob("*.distcp")
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"tensor \w+ cannot be read.*may be truncated"):
        open_source(tmp_path / "save").check_finite()
    shard.unlink()
    with pytest.raises(InputError, match="distcp, which is missing; copy all"):
        open_source(tmp_path / "save")


def test_no_room_for_shards_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dcp.save(STATE, checkpoint_id=tmp_path / "save", no_dist=True)

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(RunError, match=r"No space left.*set TMPDIR to a disk with room"):
        open_source(tmp_path / "save").check_finite()
