"""These tests read and write checkpoints: headers, lazy tensors, shards, manifests."""

import json
import struct
import weakref
from pathlib import Path

import pico
import pytest
import torch
from hf_helpers import mapped_file
from pico import Models
from safetensors.torch import load_file, save_file

from lrc_cli.checkpoint.manifest import build_manifest, matches_manifest
from lrc_cli.checkpoint.source import open_source
from lrc_cli.checkpoint.writer import Entry, write_weights
from lrc_cli.errors import InputError


def entry(key: str, tensor: torch.Tensor) -> Entry:
    return Entry(key=key, shape=tuple(tensor.shape), dtype=tensor.dtype, read=lambda: tensor)


TENSORS = {
    "a": torch.arange(6, dtype=torch.int32).reshape(2, 3),
    "b": torch.randn(5, 3).to(torch.bfloat16),
    "c": torch.randn(7),
    "d": torch.zeros(0, 4),
    "é": torch.randn(3, 4, dtype=torch.float64).T,
    "f": torch.tensor(3.0),
    "g": torch.randn(9).half(),
    "h": torch.tensor([True, False, True]),
}


@pytest.mark.parametrize("shard_bytes", [1, 40, 10**9])
def test_what_is_written_reads_back(tmp_path: Path, shard_bytes: int) -> None:
    entries = [entry(key, tensor) for key, tensor in TENSORS.items()]
    write_weights(tmp_path, entries, shard_bytes=shard_bytes, metadata={"b": 1, "a": "x"})
    files = sorted(tmp_path.glob("*.safetensors"))
    state: dict[str, torch.Tensor] = {}
    for file in files:
        shard = load_file(file)  # safetensors' own reader checks the header
        assert sum(t.nbytes for t in shard.values()) <= shard_bytes or len(shard) <= 2
        state |= shard
    assert set(state) == set(TENSORS)
    for key, tensor in TENSORS.items():
        assert state[key].dtype == tensor.dtype and torch.equal(state[key], tensor)
    assert (len(files) == 1) == (shard_bytes == 10**9)
    if len(files) > 1:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"].values()) == {file.name for file in files}
    source = open_source(tmp_path)
    assert all(torch.equal(source.read(key), tensor) for key, tensor in TENSORS.items())
    assert source.num_bytes == sum(tensor.nbytes for tensor in TENSORS.values())


def test_every_tensor_lies_at_a_multiple_of_its_item_size(tmp_path: Path) -> None:
    write_weights(
        tmp_path, [entry(k, t) for k, t in TENSORS.items()], shard_bytes=10**9, metadata={"v": 1}
    )
    data = (tmp_path / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt", "lrc": '{"v":1}'}
    assert length % 8 == 0
    for key, value in header.items():
        assert value["data_offsets"][0] % TENSORS[key].element_size() == 0


def test_the_same_tensors_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        entries = [entry(key, tensor) for key, tensor in TENSORS.items()]
        write_weights(tmp_path / name, entries, shard_bytes=40, metadata={"z": 1, "a": [1]})
    first, second = (sorted((tmp_path / name).iterdir()) for name in ("one", "two"))
    assert [f.name for f in first] == [f.name for f in second] and len(first) > 2
    for left, right in zip(first, second, strict=True):
        assert left.read_bytes() == right.read_bytes()


def test_tensors_are_not_held_after_they_are_written(tmp_path: Path) -> None:
    given: list[weakref.ref[torch.Tensor]] = []

    def read() -> torch.Tensor:
        assert not any(tensor() is not None for tensor in given[:-1]), "earlier tensors are held"
        tensor = torch.ones(4)
        given.append(weakref.ref(tensor))
        return tensor

    entries = [Entry(key=str(i), shape=(4,), dtype=torch.float32, read=read) for i in range(5)]
    write_weights(tmp_path, entries, shard_bytes=10**9, metadata={})
    assert len(load_file(tmp_path / "model.safetensors")) == 5


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_checkpoint_is_read_as_views_of_its_files(name: str, checkpoint: Models) -> None:
    path = checkpoint(name)
    source = open_source(path)
    state = pico.read_state(path)
    assert set(source.tensors) == set(state)
    for key, info in source.tensors.items():
        assert (info.shape, info.dtype) == (tuple(state[key].shape), state[key].dtype)
        assert torch.equal(source.read(key), state[key])
        assert mapped_file(source.read(key)) == str(info.file)
    names = {file.name for file in source.side_files()}
    assert {"LICENSE", "tokenizer.json", "generation_config.json"} <= names
    assert not any("safetensors" in name for name in names | {"config.json"} - {"config.json"})
    weights = {source.weights.place.name, *(file.name for file in source.files)}
    assert {"config.json", *weights, *names} == set(source.hashes)


CARRIED = ["1_Pooling/config.json", "2_Dense/model.safetensors", "a.txt", "b/README.md", "code.py"]
LEFT = [".git/c", "manifest.json", "README.md", "old.bin", "other.safetensors", "b/m.gguf"]
LEFT += ["onnx/model.json", "original/params.json", "b/m.onnx", "model.safetensors.index.json"]


def write_files(directory: Path, names: list[str]) -> None:
    for name in names:
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(name)


def test_side_files_are_all_but_our_own_and_other_forms_of_the_weights(tmp_path: Path) -> None:
    write_files(tmp_path, [*CARRIED, *LEFT])
    save_file({"x": torch.zeros(1)}, tmp_path / "used.safetensors")
    index = {"weight_map": {"x": "used.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    source = open_source(tmp_path)
    files = [file.relative_to(tmp_path).as_posix() for file in source.side_files()]
    assert files == CARRIED
    assert set(source.hashes) == {
        "used.safetensors",
        "model.safetensors.index.json",
        *CARRIED,
    }
    before = source.hashes
    (tmp_path / "code.py").write_text("x = 2")
    after = open_source(tmp_path).hashes
    assert {name for name in after if after[name] != before[name]} == {"code.py"}


def broken(tmp_path: Path, kind: str, source: Path) -> Path:
    """Makes a damaged copy of a sharded checkpoint."""
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    shards = sorted(tmp_path.glob("*.safetensors"))
    config = json.loads((tmp_path / "config.json").read_text())
    if kind == "truncated":
        shards[0].write_bytes(shards[0].read_bytes()[:-100])
    elif kind == "missing":
        shards[1].unlink()
    elif kind == "no index":
        (tmp_path / "model.safetensors.index.json").unlink()
    elif kind == "no weights":
        for shard in [*shards, tmp_path / "model.safetensors.index.json"]:
            shard.unlink()
    elif kind == "pickled":
        for shard in [*shards, tmp_path / "model.safetensors.index.json"]:
            shard.unlink()
        (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    elif kind == "index":
        index = {"weight_map": [shard.name for shard in shards]}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    elif kind == "quantization":
        config["quantization_config"] = "gptq"
        (tmp_path / "config.json").write_text(json.dumps(config))
    elif kind == "config":
        (tmp_path / "config.json").write_text("{")
    else:
        config["quantization_config"] = {"quant_method": kind, "load_in_4bit": True}
        (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize(
    ("kind", "cause"),
    [
        ("truncated", "00001-of-00003.safetensors"),
        ("missing", "which is missing; copy all shards"),
        ("no index", "several .safetensors files and no"),
        ("no weights", "has no weight file"),
        ("pickled", "pytorch_model.bin: holds more than tensors, which lrc does not run"),
        ("config", "config.json.* JSON"),
        ("index", "weight_map does not name a file"),
        ("quantization", "quantization_config is not an object"),
        ("bitsandbytes", "already quantised or compressed .bitsandbytes.*dequantise"),
        ("lrc", "already quantised or compressed .lrc.*dense checkpoint it came from"),
    ],
)
def test_a_checkpoint_that_cannot_be_used(
    kind: str, cause: str, tmp_path: Path, checkpoint: Models
) -> None:
    with pytest.raises(InputError, match=cause) as caught:
        open_source(broken(tmp_path, kind, checkpoint("qwen2")))
    assert caught.value.remedy and str(tmp_path) in str(caught.value)


def test_an_eight_bit_float_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"x": torch.zeros(4).to(torch.float8_e4m3fn)}, file)
    with pytest.raises(InputError, match=r"tensor x has dtype F8_E4M3.*dequantise"):
        open_source(file)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_damaged_weight_is_named(tmp_path: Path, value: float) -> None:
    tensor = torch.zeros(30, 30)
    tensor[29, 29] = value
    save_file({"fine": torch.zeros(3), "x.weight": tensor}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"tensor x\.weight holds NaN or infinity"):
        open_source(tmp_path / "model.safetensors").check_finite()


def test_the_manifest_finds_every_file_but_itself(tmp_path: Path) -> None:
    save_file({"x": torch.arange(3.0)}, tmp_path / "model.safetensors")
    write_files(tmp_path, ["b.txt", "sub/a.txt", "manifest.json", "sub/manifest.json"])
    save_file({"x": torch.zeros(2)}, tmp_path / "sub" / "other.safetensors")
    manifest = build_manifest(tmp_path)
    sub = ["sub/a.txt", "sub/manifest.json", "sub/other.safetensors"]
    assert list(manifest["files"]) == ["b.txt", "model.safetensors", *sub]
    before = manifest["tensors"]["x"]
    save_file({"x": torch.arange(3.0) + 1}, tmp_path / "model.safetensors")
    assert build_manifest(tmp_path)["tensors"]["x"] != before


def test_a_manifest_matches_until_a_file_changes_or_goes(tmp_path: Path) -> None:
    write_files(tmp_path, ["a.txt", "sub/b.txt"])
    (tmp_path / "manifest.json").write_text(json.dumps(build_manifest(tmp_path)))
    assert matches_manifest(tmp_path)
    (tmp_path / "sub" / "b.txt").write_text("sub/c.txt")
    assert not matches_manifest(tmp_path)
    (tmp_path / "sub" / "b.txt").unlink()
    assert not matches_manifest(tmp_path)
