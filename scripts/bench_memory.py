"""Private memory of `lrc compress`: the tables of docs/benchmarks.md.

    .venv/bin/python scripts/bench_memory.py            depth 8, 16 and 32 of one block shape
    .venv/bin/python scripts/bench_memory.py --recover  the same, trained block by block
    .venv/bin/python scripts/bench_memory.py --large    a checkpoint of more than 6 GB within 3 GB

Random Llamas, bfloat16, written tensor by tensor. The peak of RssAnon is sampled in the process
that compresses: what is mapped from files (weights, statistics) is not in it. The script exits with
1 if the peak grows by 5 % or more from depth 8 to 32, or if the large checkpoint takes more than
3 GB.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from random_llama import llama_config, write_llama, write_tokens

DEPTHS = (8, 16, 32)
LARGEST_GROWTH = 0.05
LARGE_BYTES, LARGE_LIMIT = 6_000_000_000, 3_000_000_000
VOCABULARY = 1000
SAMPLE_SECONDS = 0.005


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The shape of a random Llama's blocks."""

    width: int
    feed_forward: int
    num_heads: int

    @property
    def block_bytes(self) -> int:
        """The bytes of one block's matrices in bfloat16."""
        return 2 * (4 * self.width**2 + 3 * self.width * self.feed_forward)


SMALL = Shape(width=512, feed_forward=1536, num_heads=8)
LARGE = Shape(width=1024, feed_forward=2816, num_heads=16)


def write_checkpoint(directory: Path, shape: Shape, depth: int) -> int:
    """A random Llama of this shape; returns the bytes of its tensors."""
    config = llama_config(
        width=shape.width,
        inner=shape.feed_forward,
        blocks=depth,
        heads=shape.num_heads,
        kv_heads=shape.num_heads,
        vocabulary=VOCABULARY,
        tied=True,
        positions=512,
    )
    return write_llama(directory, config, shard_bytes=1_000_000_000)


def write_job(directory: Path, checkpoint: Path, changes: dict[str, Any]) -> Path:
    """A config that compresses to 0.6 by `curvature`, evaluates and certifies."""
    job: dict[str, Any] = {
        "model": {"path": str(checkpoint)},
        "calibration": {"path": str(directory / "tokens.safetensors"), "num_sequences": 16},
        "certification": {"num_sequences": 8},
        "evaluation": [
            {"name": "rest", "path": str(directory / "tokens.safetensors"), "num_sequences": 8}
        ],
        "compression": {"size": 0.6, "sequential": False},
        "runtime": {"device": "cpu"},
        "output": {"path": str(directory / "out")},
    }
    for section, values in changes.items():
        job[section] = job.get(section, {}) | values
    file = directory / "job.yaml"
    file.write_text(yaml.safe_dump(job))
    return file


def private_bytes(pid: int) -> int:
    """RssAnon of a process; 0 once it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0


def compress(job: Path) -> tuple[int, float]:
    """Run `lrc compress`; returns its peak private memory and the seconds it took."""
    start, peak = time.perf_counter(), 0
    command = [Path(sys.executable).with_name("lrc"), "compress", job, "--quiet"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            peak = max(peak, private_bytes(process.pid))
            time.sleep(SAMPLE_SECONDS)
    if process.returncode:
        sys.exit(f"lrc compress ended with {process.returncode}")
    return peak, time.perf_counter() - start


def row(*cells: object) -> None:
    """One line of the table."""
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


TRAINED = {"recover": {"scope": "block", "tokens": 8192}, "compression": {"method": "frobenius"}}
"""Changes with which blocks are trained in turn, and statistics take less than the training."""


def by_depth(directory: Path, changes: dict[str, Any]) -> bool:
    """Whether memory stays where it is as the network gets deeper."""
    write_tokens(directory / "tokens.safetensors", VOCABULARY, 40, 256)
    row("blocks", "checkpoint", "peak private memory", "seconds")
    row("---", "---", "---", "---")
    peaks = []
    for depth in DEPTHS:
        folder = directory / str(depth)
        folder.mkdir()
        (folder / "tokens.safetensors").symlink_to(directory / "tokens.safetensors")
        size = write_checkpoint(folder / "model", SMALL, depth)
        peak, seconds = compress(write_job(folder, folder / "model", changes))
        peaks.append(peak)
        row(depth, f"{size / 1e6:.0f} MB", f"{peak / 1e6:.0f} MB", f"{seconds:.0f}")
    growth = peaks[-1] / peaks[0] - 1
    print(f"\nfrom depth {DEPTHS[0]} to {DEPTHS[-1]}: {growth:+.1%}")
    return growth < LARGEST_GROWTH


def large(directory: Path) -> bool:
    """Whether a checkpoint of more than 6 GB is compressed within 3 GB."""
    depth = -(-LARGE_BYTES // LARGE.block_bytes)
    write_tokens(directory / "tokens.safetensors", VOCABULARY, 24, 128)
    size = write_checkpoint(directory / "model", LARGE, depth)
    measured = {depth // 2, depth - 1}
    layers = {"*": {"method": "svd"}}
    layers |= {f"model.layers.{number}.*": {"method": "curvature"} for number in measured}
    changes = {
        "calibration": {"num_sequences": 8},
        "compression": {"layers": layers, "allocation": "relative"},
        "runtime": {"memory_limit": "256MB"},
    }
    peak, seconds = compress(write_job(directory, directory / "model", changes))
    report = json.loads((directory / "out" / "report.json").read_text())
    errors = [layer["errors"]["metric"]["unit"] for layer in report["layers"] if layer["errors"]]
    row("blocks", "with curvature", "checkpoint", "peak private memory", "seconds")
    row("---", "---", "---", "---", "---")
    row(depth, len(measured), f"{size / 1e6:.0f} MB", f"{peak / 1e6:.0f} MB", f"{seconds:.0f}")
    print(f"\n{len(errors)} layers measured, in {', '.join(sorted(set(errors)))}")
    return peak < LARGE_LIMIT


def main() -> None:
    """Write what is asked for, compress it, print the table and the verdict."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--large", action="store_true", help="6 GB within 3 GB")
    parser.add_argument("--recover", action="store_true", help="train one block after the other")
    parser.add_argument("--directory", type=Path, help="where to write; default: a temporary one")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        changes = TRAINED if arguments.recover else {}
        passed = large(Path(name)) if arguments.large else by_depth(Path(name), changes)
    print("passed" if passed else "FAILED")
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
