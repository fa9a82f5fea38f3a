"""Write a Llama checkpoint of any shape with random weights, and tokens to calibrate it on.

    .venv/bin/python scripts/random_llama.py out/random --blocks 8
    .venv/bin/python scripts/random_llama.py out/7b --width 4096 --inner 11008 --blocks 32

Nothing is downloaded, and no more than one tensor is in memory at a time. Beside the checkpoint lie
`calibration.safetensors` and `lrc.yaml`, so that `lrc compress out/random/lrc.yaml` runs as it is.
Random weights have no low-rank structure: they show time and memory, never quality.
"""

import argparse
import hashlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lrc_cli.checkpoint.writer import Entry, write_weights
from lrc_cli.runtime.files import write_json

CALIBRATION = "calibration.safetensors"
JOB = "lrc.yaml"
SHARD_BYTES = 2_000_000_000


def main() -> None:
    """Write what the arguments say."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--inner", type=int, default=1376, help="width of the feed-forward part")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--head-width", type=int, default=0, help="0: 64, or 128 from 4096 on")
    parser.add_argument("--kv-heads", type=int, default=0, help="0: as many as query heads")
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--tied", action="store_true", help="one table for embedding and head")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--size", type=float, default=0.8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    head_width = arguments.head_width or (128 if arguments.width >= 4096 else 64)
    config = llama_config(
        width=arguments.width,
        inner=arguments.inner,
        blocks=arguments.blocks,
        heads=arguments.width // head_width,
        kv_heads=arguments.kv_heads or arguments.width // head_width,
        vocabulary=arguments.vocabulary,
        tied=arguments.tied,
        positions=max(2048, arguments.length),
    )
    device = torch.device(arguments.device)
    num_bytes = write_llama(arguments.directory, config, seed=arguments.seed, device=device)
    write_job(
        arguments.directory,
        vocabulary=arguments.vocabulary,
        num_sequences=arguments.sequences,
        length=arguments.length,
        size=arguments.size,
        seed=arguments.seed,
    )
    print(f"{arguments.directory}: {arguments.blocks} blocks, {num_bytes / 1e9:.2f} GB")


def llama_config(
    *,
    width: int,
    inner: int,
    blocks: int,
    heads: int,
    kv_heads: int,
    vocabulary: int,
    tied: bool = False,
    positions: int = 2048,
) -> LlamaConfig:
    """The configuration of a Llama in bfloat16."""
    return LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=positions,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )


def smollm2_config(blocks: int, vocabulary: int) -> LlamaConfig:
    """The configuration of a Llama whose blocks have SmolLM2-135M's shape."""
    return llama_config(
        width=576,
        inner=1536,
        blocks=blocks,
        heads=9,
        kv_heads=3,
        vocabulary=vocabulary,
        tied=True,
    )


def write_llama(
    directory: Path,
    config: LlamaConfig,
    *,
    seed: int = 0,
    device: torch.device | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Write config.json and bfloat16 shards; the same seed and kind of device, the same bytes.

    Args:
        device: where the weights are drawn; None: the CPU.

    Returns:
        Bytes of all tensors.
    """
    directory.mkdir(parents=True, exist_ok=True)
    place = device or torch.device("cpu")
    entries = list(_entries(config, seed, place))
    write_json(directory / "config.json", config.to_diff_dict())
    write_weights(directory, entries, shard_bytes=shard_bytes, metadata={})
    return sum(entry.num_bytes for entry in entries)


def _entries(config: LlamaConfig, seed: int, device: torch.device) -> Iterator[Entry]:
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    for key, meta in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        # So small that the sum over the blocks keeps its size.
        scale = 1.0 if "embed" in key else (meta.shape[-1] * config.num_hidden_layers) ** -0.5
        read = partial(_drawn, key, tuple(meta.shape), scale, seed, device)
        yield Entry(key=key, shape=tuple(meta.shape), dtype=torch.bfloat16, read=read)


def _drawn(
    key: str, shape: tuple[int, ...], scale: float, seed: int, device: torch.device
) -> Tensor:
    """Ones for a norm; everything else normal, of standard deviation `scale`."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    own = int.from_bytes(hashlib.sha256(f"{seed} {key}".encode()).digest()[:7], "little")
    generator = torch.Generator(device).manual_seed(own)
    # Drawn in bfloat16 at once: a float32 copy of a large table would be the peak of memory.
    noise = torch.empty(shape, dtype=torch.bfloat16, device=device)
    noise.normal_(generator=generator)
    return noise.mul_(scale)


def write_tokens(
    file: Path, vocabulary: int, num_sequences: int, length: int, *, seed: int = 0
) -> None:
    """Random token ids, (num_sequences, length), as calibration tensors."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, vocabulary, (num_sequences, length), generator=generator)
    save_file({"input_ids": tokens}, file)


def write_job(
    directory: Path,
    *,
    vocabulary: int,
    num_sequences: int,
    length: int,
    size: float,
    seed: int = 0,
    method: str = "curvature",
) -> Path:
    """Write random calibration tokens and a config whose output is `<directory>-compressed`.

    Returns:
        The config's path.
    """
    write_tokens(directory / CALIBRATION, vocabulary, num_sequences, length, seed=seed)
    job = {
        "model": {"path": str(directory)},
        "calibration": {
            "path": str(directory / CALIBRATION),
            "num_sequences": num_sequences,
        },
        "evaluation": [],
        "compression": {"method": method, "size": size, "sequential": False},
        "output": {"path": f"{directory}-compressed"},
    }
    (directory / JOB).write_text(yaml.safe_dump(job, sort_keys=False), encoding="utf-8")
    return directory / JOB


if __name__ == "__main__":
    main()
