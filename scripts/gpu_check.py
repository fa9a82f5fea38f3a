"""The last part of gpu_check.sh: a random Llama of 7B's width against time and memory targets.

    .venv/bin/python scripts/gpu_check.py                  on a GPU, where there is one
    .venv/bin/python scripts/gpu_check.py --small --device cpu

32 blocks of width 4096 and 11008, or as many as the disk holds with the work directory and the
output, are written, calibrated on 128 x 2048 random tokens and compressed by `curvature` to 0.8.
The target is 300 s for 32 blocks, pro rata for fewer, and less than 24 GB of GPU memory. Without a
GPU, or with --small, a small shape goes the same way and no target applies. The script exits with 1
if a target is missed or the output is wrong.
"""

import argparse
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from bench_time import Took, run, wall
from random_llama import llama_config, write_job, write_llama

from lrc_cli import load
from lrc_cli.config import load_config
from lrc_cli.network.low_rank.stored import stored_layers
from lrc_cli.report.record import read_record

FULL_BLOCKS, FULL_SECONDS = 32, 300.0
MEMORY_LIMIT = 24e9
SIZE = 0.8
SPARE_BYTES = 4e9
"""The bytes of the disk that are left free."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The shape of the written model and of its calibration data."""

    width: int
    inner: int
    blocks: int
    heads: int
    vocabulary: int
    num_sequences: int
    length: int

    @property
    def block_bytes(self) -> float:
        """The bytes of disk per block.

        These are weights, factors twice (work directory and output), block inputs for the backward
        sweep, float32 triangles of the Gram matrices, and eigenvectors.
        """
        weights = 2.0 * (4 * self.width**2 + 3 * self.width * self.inner)
        inputs = 2.0 * self.num_sequences * self.length * self.width
        # Inputs of q, o, gate and down; output gradients of all seven.
        triangles = 2.0 * (8 * self.width**2 + 3 * self.inner**2)
        vectors = 4.0 * 7 * self.width**2
        return weights * (1 + 2 * SIZE) + inputs + triangles + vectors

    @property
    def table_bytes(self) -> float:
        """The bytes of disk for embedding and head, in the checkpoint and in the output."""
        return 2 * 2 * 2.0 * self.vocabulary * self.width


FULL = Shape(
    width=4096,
    inner=11008,
    blocks=FULL_BLOCKS,
    heads=32,
    vocabulary=32000,
    num_sequences=128,
    length=2048,
)
SMALL = Shape(
    width=256, inner=688, blocks=4, heads=4, vocabulary=1000, num_sequences=16, length=128
)


def main() -> None:
    """Write, compress, load again, and judge."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--directory", type=Path, help="on the disk to use; default: a temporary")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    small = arguments.small or device.type != "cuda"
    shape = SMALL if small else FULL
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        blocks = blocks_that_fit(shape, shutil.disk_usage(name).free)
        on = torch.get_num_threads() if device.type == "cpu" else torch.cuda.get_device_name(device)
        print(f"{blocks} of {shape.blocks} blocks of {shape.width} and {shape.inner}", flush=True)
        print(f"{shape.num_sequences} x {shape.length} tokens, {device.type} ({on})", flush=True)
        seconds, took, memory = compress_random(Path(name), shape, blocks, device)
    print(table(took, seconds))
    if small:
        print("\npassed; a small shape, no target applies")
        return
    if not verdicts(seconds, FULL_SECONDS * blocks / FULL_BLOCKS, memory):
        sys.exit(1)


def blocks_that_fit(shape: Shape, free: float) -> int:
    """The number of blocks that the disk holds; exits where it holds none."""
    fitting = int((free - SPARE_BYTES - shape.table_bytes) // shape.block_bytes)
    if fitting < 1:
        need = SPARE_BYTES + shape.table_bytes + shape.block_bytes
        sys.exit(f"{free / 1e9:.1f} GB are free; one block needs {need / 1e9:.1f} GB of disk")
    return min(shape.blocks, fitting)


def compress_random(
    directory: Path, shape: Shape, blocks: int, device: torch.device
) -> tuple[float, Took, int]:
    """Seconds from end to end, by phase, and the peak of GPU memory in bytes."""
    config = llama_config(
        width=shape.width,
        inner=shape.inner,
        blocks=blocks,
        heads=shape.heads,
        kv_heads=shape.heads,
        vocabulary=shape.vocabulary,
    )
    num_bytes = write_llama(directory / "model", config, device=device)
    print(f"checkpoint: {num_bytes / 1e9:.2f} GB\n", flush=True)
    file = write_job(
        directory / "model",
        vocabulary=shape.vocabulary,
        num_sequences=shape.num_sequences,
        length=shape.length,
        size=SIZE,
    )
    job = load_config(file, [f"runtime.device={device}"])
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    took = run(job, wall)
    seconds = time.perf_counter() - start
    memory = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0
    check(Path(job.output.path), blocks)
    return seconds, took, memory


def check(output: Path, blocks: int) -> None:
    """Exit unless the output loads with its factors and kept what was asked for."""
    layers = [layer for _, layer in stored_layers(load(output))]
    record = read_record(output)
    fallbacks = [layer.name for layer in record.fallen_back]
    if not layers or fallbacks or not record.target.met:
        sys.exit(f"{len(layers)} layers of {blocks} blocks are factorised; fell back: {fallbacks}")


def table(took: Took, seconds: float) -> str:
    """Markdown: seconds by phase, and the eigensolver's share of them."""
    lines = ["| phase | seconds | share |", "| --- | --- | --- |"]
    rows = {**took.phases, "end to end": seconds, "of it, eigensolver": took.eigensolver}
    lines += [f"| {name} | {x:.1f} | {x / seconds:.0%} |" for name, x in rows.items()]
    return "\n".join(lines)


def verdicts(seconds: float, most_seconds: float, memory: int) -> bool:
    """Print both targets beside their figures; whether they are met."""
    checks = (
        (f"{seconds:.0f} s from end to end, of {most_seconds:.0f}", seconds < most_seconds),
        (
            f"{memory / 1e9:.1f} GB of GPU memory, of {MEMORY_LIMIT / 1e9:.0f}",
            memory < MEMORY_LIMIT,
        ),
    )
    print()
    for what, holds in checks:
        print(f"{'met   ' if holds else 'MISSED'} {what}")
    return all(holds for _, holds in checks)


if __name__ == "__main__":
    main()
