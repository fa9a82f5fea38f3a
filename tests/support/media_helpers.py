"""Pico models of images, recordings and encoder-decoders are made, with processors and data."""

import wave
from pathlib import Path

import numpy as np
import pico
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    T5Model,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

START = 4
"""The token that pico decoders begin with: [MASK], which has no other use there."""
RATE = 16000
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}


def write_model(directory: Path, name: str) -> Path:
    """Saves a random model with what makes its inputs."""
    torch.manual_seed(0)
    model = _BUILD[name]()
    pico.randomise(model)
    model.save_pretrained(directory)
    if name.startswith("t5"):
        write_ending_tokenizer(directory, suffix="[SEP]")
    elif name == "whisper":
        write_ending_tokenizer(directory, prefix="[MASK]", suffix="[SEP]")
        WhisperFeatureExtractor(feature_size=16, chunk_length=1).save_pretrained(directory)
    elif name == "wav2vec2":
        Wav2Vec2FeatureExtractor().save_pretrained(directory)
    elif name == "clip":
        pico.write_tokenizer(directory)
        size = {"height": 32, "width": 32}
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size).save_pretrained(directory)
    else:
        ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(directory)
    return directory


def write_ending_tokenizer(directory: Path, *, suffix: str, prefix: str = "") -> None:
    """Writes a tokenizer with a token per word that ends every text, and may begin it."""
    ids = {word: i for i, word in enumerate(pico.VOCABULARY)}
    core = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [word for word in (prefix, suffix) if word]
    core.post_processor = processors.TemplateProcessing(
        single=" ".join(word for word in (prefix, "$A", suffix) if word),
        special_tokens=[(word, ids[word]) for word in special],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="[UNK]", pad_token="[PAD]", eos_token=suffix
    ).save_pretrained(directory)


def _t5() -> T5Config:
    return T5Config(
        vocab_size=len(pico.VOCABULARY),
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=3,
    )


def _whisper() -> PreTrainedModel:
    return WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=len(pico.VOCABULARY),
            num_mel_bins=16,
            d_model=32,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            max_source_positions=50,
            max_target_positions=32,
            pad_token_id=0,
            bos_token_id=2,
            eos_token_id=3,
            decoder_start_token_id=START,
        )
    )


def _wav2vec2() -> PreTrainedModel:
    return Wav2Vec2ForCTC(
        Wav2Vec2Config(
            vocab_size=32,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=48,
            conv_dim=(16, 16),
            conv_stride=(5, 4),
            conv_kernel=(10, 8),
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=4,
        )
    )


def _clip() -> PreTrainedModel:
    text = {
        "vocab_size": len(pico.VOCABULARY),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "max_position_embeddings": 32,
        "bos_token_id": 2,
        "eos_token_id": 3,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=_VISION, projection_dim=16))


_BUILD = {
    "vit": lambda: ViTForImageClassification(ViTConfig(**_VISION, num_labels=5)),
    "t5": lambda: T5ForConditionalGeneration(_t5()),
    "t5-body": lambda: T5Model(_t5()),
    "whisper": _whisper,
    "wav2vec2": _wav2vec2,
    "clip": _clip,
}


def write_images(directory: Path, count: int = 24, *, captions: bool = False) -> Path:
    """Writes PNG files of several sizes, half of them in a folder of their own."""
    chance = np.random.default_rng(0)
    for index in range(count):
        folder = directory / ("even" if index % 2 else "odd")
        folder.mkdir(parents=True, exist_ok=True)
        size = (20 + index, 30, 3)
        shape = size if index % 3 else size[:2]
        pixels = chance.integers(0, 256, shape, dtype=np.uint8)
        file = folder / f"{index:03}.png"
        Image.fromarray(pixels).save(file)
        if captions:
            file.with_suffix(".txt").write_text(pico.words(4 + index % 3, seed=index))
    return directory


def write_recordings(
    directory: Path, count: int = 24, *, transcripts: bool = False, seconds: float = 0.5
) -> Path:
    """Writes WAV files of a tone in noise, each a little longer than the last."""
    directory.mkdir(parents=True, exist_ok=True)
    chance = np.random.default_rng(0)
    for index in range(count):
        time = np.arange(int(RATE * seconds) + 160 * index) / RATE
        sound = 0.3 * np.sin(2000 * (1 + index) * time) + 0.05 * chance.standard_normal(len(time))
        write_wave(directory / f"{index:03}.wav", sound)
        if transcripts:
            (directory / f"{index:03}.txt").write_text(pico.words(3 + index % 4, seed=index))
    return directory


def write_wave(file: Path, sound: np.ndarray, *, width: int = 2, rate: int = RATE) -> None:
    """Writes samples (time,) or (time, channels) in [-1, 1] as PCM of `width` bytes."""
    whole = np.round(sound.astype(np.float64) * (2 ** (8 * width - 1) - 1)).astype("<i8")
    data = whole.reshape(-1, 1).view(np.uint8)[:, :width].copy()
    if width == 1:
        data ^= 0x80  # 8 bits are unsigned
    with wave.open(str(file), "wb") as handle:
        handle.setnchannels(1 if sound.ndim == 1 else sound.shape[1])
        handle.setsampwidth(width)
        handle.setframerate(rate)
        handle.writeframes(data.tobytes())
