"""Factorised checkpoints are built by hand from random factors, with their dense counterparts."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

State = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Form:
    """Says how a test checkpoint stores its layers: 0 is two factors, else rows of a row group."""

    block: int
    largest: bool = False
    """Whether the rank is m - block (m - 1 for two factors) instead of about half."""

    def rank(self, rows: int) -> int:
        step = self.block or 1
        return rows - step if self.largest else max(rows // 2 // step * step, step)


FORMS = {
    "factors": Form(block=0),
    "rows": Form(block=1),
    "blocks": Form(block=8),
    "factors-largest": Form(block=0, largest=True),
    "rows-largest": Form(block=1, largest=True),
}

_DECODER: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": True,
}


def _llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**_DECODER))


def _qwen() -> PreTrainedModel:
    return Qwen2ForCausalLM(Qwen2Config(**_DECODER))


def _bert() -> PreTrainedModel:
    return BertForMaskedLM(
        BertConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
        )
    )


def _gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=64,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=64,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": _llama,
    "qwen2": _qwen,
    "bert": _bert,
    "gpt2": _gpt2,
}

_LAYERS = ("_proj", ".query", ".value", "output.dense", ".c_attn", ".c_proj", ".c_fc")


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Holds a factorised checkpoint and the dense checkpoint that it must equal."""

    factorised: Path
    dense: Path
    layers: dict[str, dict[str, Any]]


def random_factors(rows: int, columns: int, form: Form, generator: torch.Generator) -> State:
    """Returns random factors of a (rows, columns) matrix, keyed by the ends of their disk names."""
    rank = form.rank(rows)
    outer = (rows - rank if form.block else rows, rank)
    factors = {
        "weight": torch.randn(rank, columns, generator=generator) / columns**0.5,
        "up.weight": torch.randn(outer, generator=generator) / rank**0.5,
    }
    if form.block:
        order = torch.randperm(rows // form.block, generator=generator)
        factors["perm"] = order.to(torch.int32)
    return factors


def multiply_out(factors: Mapping[str, Tensor]) -> Tensor:
    """Returns the dense matrix, row by row, straight from the words of format.md.

    A convolution's matrix keeps its kernel's dimensions.
    """
    kernel = factors["weight"].shape[2:]
    if kernel:
        flat = {end: x if end == "perm" else x.flatten(1) for end, x in factors.items()}
        return multiply_out(flat).unflatten(1, (-1, *kernel))
    inner, outer = factors["weight"].double(), factors["up.weight"].double()
    if "perm" not in factors:
        return (outer @ inner).float()
    merged = torch.cat([inner, outer @ inner])
    count = len(factors["perm"])
    block = len(merged) // count
    dense = torch.empty_like(merged)
    for i, source in enumerate(factors["perm"].tolist()):
        dense[i * block : (i + 1) * block] = merged[source * block : (source + 1) * block]
    return dense.float()


def layer_table(factors: Mapping[str, Mapping[str, Tensor]], form: Form) -> dict[str, Any]:
    """Returns the table that a checkpoint states for its layers."""
    storage = "interpolative" if form.block else "factors"
    return {
        name: {"storage": storage, "rank": len(parts["weight"]), "block": form.block or None}
        for name, parts in factors.items()
    }


def with_factors(state: State, factors: Mapping[str, Mapping[str, Tensor]]) -> State:
    """Returns a state dict with some layers' weights replaced by factors under their disk names."""
    named = {f"{x}.{end}": t for x, parts in factors.items() for end, t in parts.items()}
    kept = {key: tensor for key, tensor in state.items() if key not in named}
    return kept | named


def write_pair(directory: Path, model: str, form: Form) -> Pair:
    """Writes a model's factorised checkpoint and its dense counterpart."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    dense, factorised = directory / "dense", directory / "factorised"
    MODELS[model]().save_pretrained(dense)
    state = load_file(dense / "model.safetensors")
    names = [key.removesuffix(".weight") for key in state if key.endswith(".weight")]
    factors, products = {}, {}
    for name in [name for name in names if name.endswith(_LAYERS)]:
        transposed = model == "gpt2"
        shape = state[f"{name}.weight"].shape
        rows, columns = shape[::-1] if transposed else shape
        factors[name] = random_factors(rows, columns, form, generator)
        product = multiply_out(factors[name])
        products[f"{name}.weight"] = (product.T if transposed else product).contiguous()
    for name in names:
        if f"{name}.bias" in state:  # zeros would hide a bias that is dropped
            state[f"{name}.bias"] = torch.randn(state[f"{name}.bias"].shape, generator=generator)
    layers = layer_table(factors, form)
    config = json.loads((dense / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "lrc", "format_version": 1, "layers": layers}
    factorised.mkdir()
    (factorised / "config.json").write_text(json.dumps(config))
    save_file(state | products, dense / "model.safetensors", {"format": "pt"})
    save_file(with_factors(state, factors), factorised / "model.safetensors", {"format": "pt"})
    return Pair(factorised=factorised, dense=dense, layers=layers)


def mapped_file(tensor: Tensor) -> str:
    """Returns the file that a tensor's memory is a view of, empty for private memory."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= tensor.data_ptr() < end:
            return line.split(maxsplit=5)[5] if len(line.split()) > 5 else ""
    return ""


def edit_tensors(directory: Path, target: Path, edit: Callable[[State], None]) -> Path:
    """Copies a single-file checkpoint with its tensors changed by `edit`."""
    target.mkdir()
    (target / "config.json").write_bytes((directory / "config.json").read_bytes())
    state = load_file(directory / "model.safetensors")
    edit(state)
    save_file(state, target / "model.safetensors", {"format": "pt"})
    return target


def edit_config(directory: Path, target: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    """Copies a single-file checkpoint with its quantization_config changed by `edit`."""
    target.mkdir()
    (target / "model.safetensors").write_bytes((directory / "model.safetensors").read_bytes())
    config = json.loads((directory / "config.json").read_text())
    edit(config["quantization_config"])
    (target / "config.json").write_text(json.dumps(config))
    return target
