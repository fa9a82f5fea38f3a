"""Each family of models has a pico model here: adding one is one line of FAMILIES.

A line says how the model is built, what it is fed, and what of it stays dense and why.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from lrc_cli.execution.weight_use import OTHER, READ

NUM_SEQUENCES = 24
VOCABULARY = 64


def _ids(length: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(4, VOCABULARY, (NUM_SEQUENCES, length), generator=generator)


def _noise(*shape: int) -> Tensor:
    return torch.randn(NUM_SEQUENCES, *shape, generator=torch.Generator().manual_seed(2))


TEXT = {"input_ids": _ids()}
TWO_TEXTS = {"input_ids": _ids(), "decoder_input_ids": _ids(8)}
IMAGES = {"pixel_values": _noise(3, 32, 32)}
TEXT_AND_IMAGES = TEXT | IMAGES
SPEECH = {"input_features": _noise(16, 32), "decoder_input_ids": _ids(8)}

LLAMA_LIKE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
BERT_LIKE = {
    key: LLAMA_LIKE[key] for key in LLAMA_LIKE if key not in ("num_key_value_heads", "head_dim")
}
VIT_LIKE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
GPT_LIKE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
T5_LIKE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
}
BART_LIKE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
}
WHISPER = BART_LIKE | {
    "num_mel_bins": 16,
    "max_source_positions": 16,
    "max_target_positions": 16,
}
DISTILBERT = {"vocab_size": VOCABULARY, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}
CLIP = {"text_config": BERT_LIKE, "vision_config": VIT_LIKE, "projection_dim": 24}
MAMBA = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
RESNET = {"embedding_size": 16, "hidden_sizes": [32, 48], "depths": [1, 1], "num_labels": 5}
CONVNEXT = {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2, "num_labels": 5}
TIED = {"tie_word_embeddings": True}
UNTIED_T5 = T5_LIKE | {"tie_word_embeddings": False}
SCALED_BART = BART_LIKE | {"scale_embedding": True}
MIXTURE = LLAMA_LIKE | {
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
}
GPT_OSS = MIXTURE | {"max_position_embeddings": 4096}
LLAMA4 = MIXTURE | {"intermediate_size_mlp": 48}
OPT = LLAMA_LIKE | {"ffn_dim": 48, "word_embed_proj_dim": 32}

EMBEDDING = "an embedding; not in this version"
GROUPED = "a grouped convolution: its kernels are small already"


def _parameter(kind: str) -> str:
    return f"a parameter of {kind}, no layer's weight"


def _embeddings(*names: str) -> dict[str, str]:
    return {f"{name}.weight": EMBEDDING for name in names}


def _router(kind: str, name: str = "gate") -> dict[str, str]:
    return {f"{name}.weight": f"{kind}TopKRouter; not in this version"}


@dataclass(frozen=True)
class Family:
    """Holds a pico model, its inputs, and what of it stays dense."""

    architecture: str
    model_type: str
    settings: Mapping[str, Any]
    skipped: Mapping[str, str]
    """The reason by the end of a tensor's name; vectors go without saying."""
    inputs: Mapping[str, Tensor]

    def build(self) -> PreTrainedModel:
        """Returns the model with random weights."""
        torch.manual_seed(0)
        config = AutoConfig.for_model(self.model_type, **self.settings)
        model: PreTrainedModel = getattr(transformers, self.architecture)(config)
        return model.eval()


_LLAMA = LLAMA_LIKE, {}, TEXT
SCALED = _embeddings("embed_tokens")
"""An embedding of a class of its own, which does more than look rows up."""
RELATIVE, PLACED = _embeddings("relative_attention_bias"), _embeddings("embed_positions")
GRANITE_ROUTER = _router("GraniteMoe", "router.layer")
_BERT_SKIPPED = _embeddings("position_embeddings", "token_type_embeddings")
_BERT = BERT_LIKE, _BERT_SKIPPED, TEXT

FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", "llama", *_LLAMA),
    "mistral": Family("MistralForCausalLM", "mistral", *_LLAMA),
    "qwen2": Family("Qwen2ForCausalLM", "qwen2", *_LLAMA),
    "qwen3": Family("Qwen3ForCausalLM", "qwen3", *_LLAMA),
    "llama-tied": Family("LlamaForCausalLM", "llama", LLAMA_LIKE | TIED, {}, TEXT),
    "gemma": Family("GemmaForCausalLM", "gemma", LLAMA_LIKE, SCALED, TEXT),
    "gemma2": Family("Gemma2ForCausalLM", "gemma2", LLAMA_LIKE, SCALED, TEXT),
    "gemma3-tied": Family("Gemma3ForCausalLM", "gemma3_text", LLAMA_LIKE | TIED, {}, TEXT),
    "phi": Family("PhiForCausalLM", "phi", *_LLAMA),
    "opt": Family("OPTForCausalLM", "opt", OPT, _embeddings("positions"), TEXT),
    "gpt2": Family("GPT2LMHeadModel", "gpt2", GPT_LIKE, _embeddings("wpe"), TEXT),
    "gpt-neox": Family("GPTNeoXForCausalLM", "gpt_neox", BERT_LIKE, {}, TEXT),
    "bloom": Family("BloomForCausalLM", "bloom", GPT_LIKE, {}, TEXT),
    "falcon": Family("FalconForCausalLM", "falcon", BERT_LIKE, {}, TEXT),
    "mixtral": Family("MixtralForCausalLM", "mixtral", MIXTURE, _router("Mixtral"), TEXT),
    "qwen3-moe": Family("Qwen3MoeForCausalLM", "qwen3_moe", MIXTURE, _router("Qwen3Moe"), TEXT),
    "gpt-oss": Family("GptOssForCausalLM", "gpt_oss", GPT_OSS, _router("GptOss", "router"), TEXT),
    "granite-moe": Family("GraniteMoeForCausalLM", "granitemoe", MIXTURE, GRANITE_ROUTER, TEXT),
    "llama4": Family("Llama4ForCausalLM", "llama4_text", LLAMA4, {"router.weight": OTHER}, TEXT),
    "bert": Family("BertModel", "bert", *_BERT),
    "bert-masked": Family("BertForMaskedLM", "bert", BERT_LIKE | TIED, _BERT_SKIPPED, TEXT),
    "bert-classifier": Family("BertForSequenceClassification", "bert", *_BERT),
    "roberta": Family("RobertaForSequenceClassification", "roberta", *_BERT),
    "distilbert": Family(
        "DistilBertModel",
        "distilbert",
        DISTILBERT,
        _embeddings("position_embeddings"),
        TEXT,
    ),
    "mpnet": Family(
        "MPNetModel",
        "mpnet",
        BERT_LIKE,
        _embeddings("position_embeddings", "relative_attention_bias"),
        TEXT,
    ),
    "t5": Family("T5Model", "t5", T5_LIKE, RELATIVE, TWO_TEXTS),
    "t5-headed": Family("T5ForConditionalGeneration", "t5", T5_LIKE, RELATIVE, TWO_TEXTS),
    "t5-untied": Family("T5ForConditionalGeneration", "t5", UNTIED_T5, RELATIVE, TWO_TEXTS),
    "bart": Family("BartModel", "bart", BART_LIKE, PLACED, TWO_TEXTS),
    "bart-headed": Family("BartForConditionalGeneration", "bart", SCALED_BART, PLACED, TWO_TEXTS),
    "marian": Family("MarianMTModel", "marian", BART_LIKE, {}, TWO_TEXTS),
    "whisper-headed": Family("WhisperForConditionalGeneration", "whisper", WHISPER, PLACED, SPEECH),
    "whisper": Family("WhisperModel", "whisper", WHISPER, PLACED, SPEECH),
    "vit": Family(
        "ViTModel",
        "vit",
        VIT_LIKE,
        {"position_embeddings": _parameter("ViTEmbeddings")},
        IMAGES,
    ),
    "clip": Family(
        "CLIPModel",
        "clip",
        CLIP,
        _embeddings("token_embedding", "position_embedding"),
        TEXT_AND_IMAGES,
    ),
    "dinov2": Family(
        "Dinov2Model",
        "dinov2",
        VIT_LIKE,
        {"position_embeddings": _parameter("Dinov2Embeddings")},
        IMAGES,
    ),
    "resnet": Family("ResNetForImageClassification", "resnet", RESNET, {}, IMAGES),
    "convnext": Family(
        "ConvNextForImageClassification", "convnext", CONVNEXT, {"dwconv.weight": GROUPED}, IMAGES
    ),
    "mamba": Family(
        "MambaModel",
        "mamba",
        MAMBA,
        {
            "A_log": _parameter("MambaMixer"),
            "conv1d.weight": GROUPED,
            "dt_proj.weight": READ,
        },
        TEXT,
    ),
}
