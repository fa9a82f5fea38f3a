"""These tests show that no code path copies a whole checkpoint into private memory.

They take minutes: they compress checkpoints of more than a gigabyte in a process of its own, whose
anonymous resident memory is sampled all the while. (RLIMIT_DATA would not do: it counts the private
file mappings of safetensors.)
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pico
import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

pytestmark = pytest.mark.long
WIDTH, FEED_FORWARD, BYTES = 512, 1536, 1_080_000_000
COMPRESSED = tuple(f"model.layers.{i}.self_attn" for i in (0, 20, 40, 60))
SAMPLE_SECONDS = 0.005
IDLE = """
import time, torch, transformers, lrc_cli.job.run, lrc_cli.hf
from transformers.models.llama import modeling_llama
torch.ones(64, 64) @ torch.ones(64, 64)
print("ready", flush=True)
time.sleep(60)
"""


def write_large(directory: Path, dtype: torch.dtype) -> Path:
    """Writes a random Llama of more than a gigabyte, one shard for every few blocks."""
    per_layer = (4 * WIDTH * WIDTH + 3 * WIDTH * FEED_FORWARD) * dtype.itemsize
    config = LlamaConfig(
        vocab_size=len(pico.VOCABULARY),
        hidden_size=WIDTH,
        intermediate_size=FEED_FORWARD,
        num_hidden_layers=-(-BYTES // per_layer),
        num_attention_heads=8,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
        dtype=str(dtype).removeprefix("torch."),
    )
    config.save_pretrained(directory)
    pico.write_tokenizer(directory)
    with torch.device("meta"):
        shapes = {k: p.shape for k, p in LlamaForCausalLM(config).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    shards: dict[str, list[str]] = {}
    for key in shapes:
        block = re.search(r"layers\.(\d+)\.", key)
        shards.setdefault(f"model-{int(block[1]) // 20 if block else 0}.safetensors", []).append(
            key
        )
    for name, keys in shards.items():
        state = {}
        for key in keys:
            noise = torch.randn(shapes[key], generator=generator) / WIDTH**0.5
            state[key] = (noise + (len(shapes[key]) == 1)).to(dtype)
        save_file(state, directory / name, {"format": "pt"})
    weight_map = {key: name for name, keys in shards.items() for key in keys}
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def private_bytes(pid: int) -> int:
    """Returns RssAnon of a process; 0 once the process has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0


def gram_bytes(method: str) -> int:
    """Returns the bytes of one block's float64 Gram matrices: two distinct inputs, four outputs."""
    num_matrices = {"svd": 0, "frobenius": 2, "curvature": 2 + 4}[method]
    return 8 * num_matrices * WIDTH**2


@pytest.fixture(scope="module")
def idle() -> int:
    """Returns the private bytes of a process with all imports of `lrc compress`."""
    with subprocess.Popen(
        [sys.executable, "-c", IDLE], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        found = private_bytes(process.pid)
        process.terminate()
    return found


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> dict[torch.dtype, Path]:
    """Returns a dictionary of checkpoints by dtype. Each is made when it is first asked for."""
    return {}


CASES = [
    ("svd", torch.float32),
    ("frobenius", torch.float32),
    ("curvature", torch.float32),
    ("curvature", torch.bfloat16),
]


@pytest.mark.parametrize(("method", "dtype"), CASES)
def test_private_memory_stays_under_a_quarter_of_the_checkpoint(
    method: str,
    dtype: torch.dtype,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    large: dict[torch.dtype, Path],
    idle: int,
    text: Path,
) -> None:
    if dtype not in large:
        large[dtype] = write_large(tmp_path_factory.mktemp("large"), dtype)
    files = list(large[dtype].glob("*.safetensors"))
    total = sum(file.stat().st_size for file in files)
    assert total > 1_000_000_000 and len(files) > 2
    config = pico.job(
        tmp_path,
        {
            "model.path": str(large[dtype]),
            "calibration.path": str(text),
            # Tokens are few, because activations for the backward pass are private memory too.
            "calibration.num_sequences": 2,
            "calibration.sequence_length": 8,
            "evaluation": [{"name": "rest", "path": str(text), "num_sequences": 1}],
            "compression.method": method,
            "compression.include": [f"{block}.*" for block in COMPRESSED],
            "output.shard_size": "400MB",
            "runtime.device": "cpu",
        },
    )
    lrc = Path(sys.executable).with_name("lrc")
    # On a busy machine, threads that wait for each other take ten times as long.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [lrc, "compress", config], stdout=log, stderr=log, env=environment
        )
        peak = 0
        while process.poll() is None:
            peak = max(peak, private_bytes(process.pid))
            time.sleep(SAMPLE_SECONDS)
    assert process.returncode == 0, (tmp_path / "log").read_text()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert sum(layer["storage"] != "dense" for layer in report["layers"]) > 11
    for file in (tmp_path / "out").glob("*.safetensors"):
        os.remove(file)
    beyond = peak - idle - gram_bytes(method)
    print(f"{method} {dtype}: {beyond / 1e6:.0f} MB of {total / 1e6:.0f} MB")
    assert beyond < total / 4
