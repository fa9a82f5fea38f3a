"""These tests show which tensors are weights of layers, and the reasons of all others."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from safetensors.torch import save_file
from torch import nn

from lrc_cli.checkpoint.source import open_source
from lrc_cli.config import Compression
from lrc_cli.network.candidates.find import CONVERTED, find_layers
from lrc_cli.network.opening import open_module


class Many(nn.Module):
    """One part of every kind that stays dense, and two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.left_out = nn.Linear(4, 6), nn.Linear(4, 6)
        self.tied = nn.Linear(4, 9, bias=False)
        self.table = nn.Embedding(9, 4)
        self.tied.weight = self.table.weight
        self.words = nn.Embedding(9, 4)
        self.recurrent = nn.LSTM(4, 5)
        self.projected = nn.LSTM(4, 5, proj_size=2)
        self.depthwise = nn.Conv2d(4, 4, 3, groups=4)
        self.upwards = nn.ConvTranspose2d(4, 4, 2)
        self.attention = nn.MultiheadAttention(4, 2)
        self.scale = nn.Parameter(torch.ones(1, 1, 4))
        self.positions = nn.Parameter(torch.ones(1, 3, 4))


def test_every_tensor_that_stays_says_why(tmp_path: Path) -> None:
    module = Many()
    state = {k: t for k, t in module.state_dict().items() if k != "tied.weight"}
    save_file({k: t.clone() for k, t in state.items()}, tmp_path / "many.safetensors")
    source = open_source(tmp_path / "many.safetensors")
    layers, skipped = find_layers(module, source, Compression(size=0.5, exclude=("left_out",)))
    assert [layer.name for layer in layers] == ["layer"]
    reasons = {x.name: x.reason for x in skipped if x.reason != "a vector"}
    assert reasons == {
        "left_out.weight": "left out by include and exclude",
        "table.weight": "shared by several modules; not in this version",
        "words.weight": "an embedding; not in this version",
        "recurrent.weight_ih_l0": "a matrix of LSTM; not in this version",
        "recurrent.weight_hh_l0": "a matrix of LSTM; not in this version",
        "projected.weight_ih_l0": "a matrix of LSTM with proj_size; not in this version",
        "projected.weight_hh_l0": "a matrix of LSTM with proj_size; not in this version",
        "projected.weight_hr_l0": "a matrix of LSTM with proj_size; not in this version",
        "depthwise.weight": "a grouped convolution: its kernels are small already",
        "upwards.weight": "ConvTranspose2d; not in this version",
        "attention.in_proj_weight": "a parameter of MultiheadAttention, no layer's weight",
        "attention.out_proj.weight": "NonDynamicallyQuantizableLinear; not in this version",
        "positions": "a parameter of Many, no layer's weight",
    }
    assert "scale" in {x.name for x in skipped if x.reason == "a vector"}


def test_a_tensor_that_transformers_splits_says_so(tmp_path: Path) -> None:
    """NomicBert's checkpoints have query, key and value as one tensor."""
    nomic = replace(FAMILIES["bert"], architecture="NomicBertModel", model_type="nomic_bert")
    nomic.build().save_pretrained(tmp_path)
    source = open_source(tmp_path)
    module, source = open_module(source, factory=None)
    layers, skipped = find_layers(module, source, Compression(size=0.5))
    reasons = {x.name: x.reason for x in skipped}
    for block in range(2):
        assert reasons[f"encoder.layers.{block}.attn.Wqkv.weight"] == CONVERTED
    found = {x.name.rpartition(".")[2] for x in layers}
    assert found == {"gate_proj", "up_proj", "down_proj", "o_proj"}


@pytest.mark.parametrize(
    ("family", "head"), [("llama", "lm_head"), ("bert-masked", "cls.predictions.decoder")]
)
def test_the_head_is_left_out_by_any_name(family: str, head: str, tmp_path: Path) -> None:
    untied = {**FAMILIES[family].settings, "tie_word_embeddings": False}
    replace(FAMILIES[family], settings=untied).build().save_pretrained(tmp_path)
    source = open_source(tmp_path)
    module, source = open_module(source, factory=None)
    by_default, skipped = find_layers(module, source, Compression(size=0.5))
    every, _ = find_layers(module, source, Compression(size=0.5, exclude=()))
    assert {x.name for x in every} - {x.name for x in by_default} == {head}
    reasons = {x.name: x.reason for x in skipped}
    assert reasons[f"{head}.weight"] == "left out by include and exclude"
