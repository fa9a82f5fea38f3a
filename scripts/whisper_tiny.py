"""whisper-tiny.en: from CTranslate2's file to a plain transformers directory."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)
from transformers.utils import logging

END, START, NO_TIMESTAMPS = 50256, 50257, 50362
HALF = 4
"""CTranslate2's number of float16."""
ATTENTION = {
    "self_attention": ("self_attn", (("q_proj", "k_proj", "v_proj"), ("out_proj",))),
    "attention": ("encoder_attn", (("q_proj",), ("k_proj", "v_proj"), ("out_proj",))),
}
"""For each of CTranslate2's names: transformers' name, and the layers that each matrix stacks."""
NORMS = {
    "self_attention": "self_attn_layer_norm",
    "attention": "encoder_attn_layer_norm",
    "ffn": "final_layer_norm",
}
ENDS = {"gamma": "weight", "beta": "bias", "weight": "weight", "bias": "bias"}


def convert(folder: Path, target: Path) -> None:
    """Write model, tokenizer and feature extractor to `target`, in float16 as in the file.

    Args:
        folder: with CTranslate2's `model.bin` and `config.json`, and `tokenizer.json`.
    """
    logging.disable_progress_bar()
    hints = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model = WhisperForConditionalGeneration(config())
    state = dict(renamed(read(folder / "model.bin")))
    missing, unexpected = model.load_state_dict(state, strict=False)
    # The keys' projections have no bias in Whisper, where CTranslate2 stacks zeros; the output
    # layer is the embedding.
    assert set(missing) <= {"proj_out.weight"}, missing
    assert all(key.endswith("k_proj.bias") and not state[key].any() for key in unexpected)
    model.tie_weights()
    model.generation_config = generation(hints)
    model.half().save_pretrained(target)
    WhisperFeatureExtractor().save_pretrained(target)
    tokenizer(folder / "tokenizer.json").save_pretrained(target)


def config() -> WhisperConfig:
    """The shape of tiny.en."""
    return WhisperConfig(
        vocab_size=51864,
        d_model=384,
        encoder_layers=4,
        decoder_layers=4,
        encoder_attention_heads=6,
        decoder_attention_heads=6,
        encoder_ffn_dim=1536,
        decoder_ffn_dim=1536,
        bos_token_id=START,
        eos_token_id=END,
        pad_token_id=END,
        decoder_start_token_id=START,
    )


def generation(hints: dict[str, list[int]]) -> GenerationConfig:
    """The settings for writing texts: greedily, without timestamps and unspoken tokens."""
    return GenerationConfig(
        bos_token_id=START,
        eos_token_id=END,
        pad_token_id=END,
        decoder_start_token_id=START,
        no_timestamps_token_id=NO_TIMESTAMPS,
        is_multilingual=False,
        return_timestamps=False,
        suppress_tokens=hints["suppress_ids"],
        begin_suppress_tokens=hints["suppress_ids_begin"],
        max_length=448,
    )


def tokenizer(file: Path) -> PreTrainedTokenizerFast:
    """Texts become <|startoftranscript|><|notimestamps|> ... <|endoftext|>."""
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    core = Tokenizer.from_file(str(file))
    start, plain, end = (core.id_to_token(number) for number in (START, NO_TIMESTAMPS, END))
    core.post_processor = TemplateProcessing(
        single=f"{start} {plain} $A {end}",
        special_tokens=[(start, START), (plain, NO_TIMESTAMPS), (end, END)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=start, eos_token=end, unk_token=end, pad_token=end
    )


def read(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of a file of CTranslate2, version 6; only the float16 ones."""
    data = file.read_bytes()
    place = 0

    def number(kind: str) -> int:
        nonlocal place
        (value,) = struct.unpack_from(f"<{kind}", data, place)
        place += struct.calcsize(f"<{kind}")
        return value

    def text() -> str:
        nonlocal place
        length = number("H")
        place += length
        return data[place - length : place].rstrip(b"\0").decode()

    version, spec, _ = number("I"), text(), number("I")
    assert (version, spec) == (6, "WhisperSpec"), f"version {version} of {spec}"
    for _ in range(number("I")):
        name = text()
        shape = [number("I") for _ in range(number("B"))]
        kind, size = number("B"), number("I")
        if kind == HALF:
            values = np.frombuffer(data, dtype="<f2", count=size // 2, offset=place)
            yield name, torch.from_numpy(values.astype(np.float32)).reshape(shape)
        place += size


def renamed(tensors: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors under transformers' names, stacked matrices taken apart."""
    for name, tensor in tensors:
        side, *inner, end = name.split("/")
        for key, part in _named(inner, tensor):
            yield f"model.{side}.{key}.{ENDS.get(end, 'weight')}", part


def _named(inner: list[str], tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    if not inner[0].startswith("layer_") or inner == ["layer_norm"]:
        names = {"embeddings": "embed_tokens", "position_encodings": "embed_positions"}
        return [(names.get(inner[0], inner[0]), tensor)]
    layer, part, last = f"layers.{inner[0].removeprefix('layer_')}", *inner[1:]
    if last == "layer_norm":
        return [(f"{layer}.{NORMS[part]}", tensor)]
    index = int(last.removeprefix("linear_"))
    if part == "ffn":
        return [(f"{layer}.fc{index + 1}", tensor)]
    attention, stacks = ATTENTION[part]
    keys = stacks[index]
    parts = tensor.chunk(len(keys))
    return [(f"{layer}.{attention}.{key}", x) for key, x in zip(keys, parts, strict=True)]
