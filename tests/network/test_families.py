"""Every family of support/families.py goes from a dense checkpoint to a compressed module."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES, Family
from pico import State, compressed, factorised_keys, randomise, read_state, rebuilt
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

import lrc_cli.hf  # noqa: F401 - registers the format
from lrc_cli.execution.network import make_network
from lrc_cli.execution.segments import find_segments
from lrc_cli.network.keys import Keys
from lrc_cli.network.layer import Layer
from lrc_cli.network.low_rank.stored import stored_layers


@dataclass(frozen=True, kw_only=True)
class Made:
    """A family's dense checkpoint, the compressed checkpoint and its report."""

    family: Family
    dense: Path
    output: Path
    report: dict[str, Any]


Get = Callable[[str], Made]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Get:
    """Compresses each family once: all layers to about half, fitted to the family's inputs."""
    done: dict[str, Made] = {}

    def get(name: str) -> Made:
        if name not in done:
            done[name] = _make(FAMILIES[name], tmp_path_factory.mktemp(name))
        return done[name]

    return get


def _make(family: Family, folder: Path) -> Made:
    model, dense = family.build(), folder / "dense"
    randomise(model)
    model.save_pretrained(dense)
    save_file(
        {name: x.contiguous() for name, x in family.inputs.items()}, folder / "data.safetensors"
    )
    changes = {
        "model.path": str(dense),
        "calibration.path": str(folder / "data.safetensors"),
        "calibration.num_sequences": 16,
        "evaluation": None,
        "compression.method": "frobenius",
        "compression.allocation": "uniform",
        "compression.sequential": False,
        "compression.exclude": [],
        "compression.embeddings": True,
        "compression.size": 0.6,
        "compression.rank_multiple": 1,
    }
    output, report = compressed(folder, changes)
    return Made(family=family, dense=dense, output=output, report=report)


def outputs(model: PreTrainedModel, family: Family) -> list[Tensor]:
    with torch.no_grad():
        found = model(**{name: x[-2:] for name, x in family.inputs.items()})
    return [x for x in found.values() if isinstance(x, Tensor) and x.is_floating_point()]


def model_class(made: Made) -> Any:
    return getattr(transformers, made.family.architecture)


@pytest.mark.parametrize("name", FAMILIES)
def test_computes_what_its_factors_multiplied_out_do(made: Get, name: str, tmp_path: Path) -> None:
    family = made(name)
    state = rebuilt(read_state(family.output))
    state |= {key: state[key].T.contiguous() for key in _transposed_keys(family)}
    _fuse(state, family)
    (tmp_path / "config.json").write_bytes((family.dense / "config.json").read_bytes())
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = model_class(family).from_pretrained(family.output)
    plain = model_class(family).from_pretrained(tmp_path)
    assert list(stored_layers(loaded)) and not list(stored_layers(plain))
    pairs = list(zip(outputs(loaded, family.family), outputs(plain, family.family), strict=True))
    assert pairs
    for got, wanted in pairs:
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max().item())
    dense = model_class(family).from_pretrained(family.dense)
    before = outputs(dense, family.family)[0]
    assert (before - pairs[0][0]).norm() > 1e-3 * before.norm()  # the factors are really used


def _fuse(state: State, made: Made) -> None:
    """Puts experts' tensors together again where the dense checkpoint has fused tensors."""
    fused = made.report["fused"]
    dense = read_state(made.dense)
    for key, entry in fused.items():
        parts = [f"{entry['experts']}.{i}.{entry['part']}" for i in range(len(dense[key]))]
        whole = torch.stack([state.pop(part) for part in parts])
        state[key] = whole if whole.shape == dense[key].shape else whole.mT.contiguous()


def _transposed_keys(made: Made) -> set[str]:
    """Returns the disk names of factorised weights that the dense model keeps as (n, m)."""
    model = made.family.build()
    heads = {id(x.weight) for x in model.modules() if isinstance(x, nn.Linear)}
    turned = {
        name
        for name, x in model.named_modules()
        if isinstance(x, Conv1D) or (isinstance(x, nn.Embedding) and id(x.weight) not in heads)
    }
    return {f"{name}.weight" for name in turned & {*factorised_keys(read_state(made.output))}}


@pytest.mark.parametrize("name", FAMILIES)
def test_saves_the_same_tensors_again(made: Get, name: str, tmp_path: Path) -> None:
    family = made(name)
    model = model_class(family).from_pretrained(family.output)
    model.save_pretrained(tmp_path)
    first, second = read_state(family.output), read_state(tmp_path)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    again = model_class(family).from_pretrained(tmp_path)
    for a, b in zip(outputs(model, family.family), outputs(again, family.family), strict=True):
        # Outputs need not be equal: a product's rounding may depend on a matrix's place in a file.
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", FAMILIES)
def test_factorises_all_but_a_twentieth_and_says_why_not_the_rest(made: Get, name: str) -> None:
    family = made(name)
    layers = family.report["layers"]
    done = sum(x["bytes_before"] for x in layers if x["storage"] != "dense")
    weights = {id(x): x for x in compressible(family.family.build())}
    assert done >= 0.95 * sum(4 * x.numel() for x in weights.values()) > 0
    skipped, found = family.family.skipped, {}
    for row in family.report["skipped"]:
        if row["reason"] != "a vector":
            end = next((end for end in skipped if row["name"].endswith(end)), row["name"])
            assert found.setdefault(end, row["reason"]) == row["reason"]
    assert found == skipped


def compressible(model: nn.Module) -> list[Tensor]:
    """Returns the weights of the kinds that lrc promises to factorise."""
    names = {id(x): name for name, x in model.named_parameters()}
    linear = [x.weight for x in model.modules() if isinstance(x, nn.Linear | Conv1D)]
    convolutions = [x for x in model.modules() if isinstance(x, nn.Conv1d | nn.Conv2d)]
    linear += [x for x in model.parameters() if x.ndim == 3 and "experts" in names[id(x)]]
    return linear + [x.weight for x in convolutions if x.groups == 1]


WITHOUT_PLUGIN = """
import sys, transformers
for argument in sys.argv[1:]:
    architecture, path = argument.split("=")
    try:
        getattr(transformers, architecture).from_pretrained(path)
    except RuntimeError as error:
        print("refused" if "mismatch" in str(error) else error)
    else:
        print("loaded", path)
"""


def test_loading_without_the_plugin_fails(made: Get) -> None:
    paths = [f"{made(name).family.architecture}={made(name).output}" for name in FAMILIES]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_PLUGIN, *paths], capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\n")[:-1] == ["refused"] * len(paths), done.stdout[-2000:]


RUN_WHOLE = {name for name in FAMILIES if name.startswith(("t5", "bart", "whisper", "clip"))} | {
    "marian"
}
"""Families with two lists of blocks, where the loss depends on both lists."""


@pytest.mark.parametrize("name", FAMILIES)
def test_a_list_of_blocks_is_measured_block_by_block(name: str) -> None:
    """The default method also needs gradients to come from block to block."""
    family = FAMILIES[name]
    network = make_network(family.build(), device=torch.device("cpu"), dtype=None)
    module = network.module
    layers = [
        Layer(
            name=path,
            kind="Linear",
            shape=tuple(part.weight.shape),
            dtype=part.weight.dtype,
            keys=Keys(f"{path}.weight"),
            unit="",
        )
        for path, part in module.named_modules()
        if isinstance(part, nn.Linear)
    ]
    batch = {key: tensor[:1] for key, tensor in family.inputs.items()}
    segmentation = find_segments(network, layers, {layer.name for layer in layers}, batch)
    assert bool(segmentation.chain.names) is (name not in RUN_WHOLE), segmentation.reason
    assert bool(segmentation.reason) is (name in RUN_WHOLE)
