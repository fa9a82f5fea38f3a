"""Measure what several processes gain: time of `lrc compress` under torchrun, by phase.

    .venv/bin/python scripts/bench_processes.py                            1 and 2 of one thread
    .venv/bin/python scripts/bench_processes.py --processes 1 2 4 --device cuda

A random Llama of SmolLM2's width, by `curvature`, scored and certified; the same command for every
number of processes, in turn, each in an empty work directory. On a CPU every process has
`--threads`, so give no more processes than there are cores. The script exits with 1 if the largest
number is no faster than the smallest.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from random_llama import smollm2_config, write_llama, write_tokens

VOCABULARY = 4096
TOKENS = "tokens.safetensors"


def main() -> None:
    """Run every number of processes, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--threads", type=int, default=1, help="of every process")
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--device", default="cpu", help="runtime.device")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        write(directory, arguments)
        times = {number: run(directory, number, arguments) for number in arguments.processes}
    first, last = (sum(times[number].values()) for number in (min(times), max(times)))
    print(table(times))
    print(f"\n{max(times)} processes: {first / last:.2f} times as fast as {min(times)}")
    if len(times) > 1 and last >= first:
        sys.exit(1)


def write(directory: Path, arguments: argparse.Namespace) -> None:
    """The checkpoint and the data."""
    config = smollm2_config(arguments.blocks, VOCABULARY)
    write_llama(directory / "model", config)
    write_tokens(directory / TOKENS, VOCABULARY, 4 * arguments.sequences, arguments.length)


def run(directory: Path, number: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds by phase, as the report of the run says."""
    data, output = str(directory / TOKENS), directory / f"out-{number}"
    given = {"num_sequences": arguments.sequences, "sequence_length": arguments.length}
    job: dict[str, Any] = {
        "model": {"path": str(directory / "model")},
        "calibration": {"path": data, **given},
        "certification": given,
        "evaluation": [{"name": "rest", "path": data, **given}],
        "compression": {"size": 0.8},
        "runtime": {"device": arguments.device, "work_dir": str(directory / f"work-{number}")},
        "output": {"path": str(output)},
    }
    file = directory / f"{number}.yaml"
    file.write_text(yaml.safe_dump(job))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(number)]
    command += ["-m", "lrc_cli", "compress", str(file), "-q"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
    done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=False)
    if done.returncode:
        sys.exit(f"lrc compress in {number} processes ended with {done.returncode}")
    timing: dict[str, float] = json.loads((output / "report.json").read_text())["timing"]
    return timing


def table(times: dict[int, dict[str, float]]) -> str:
    """Markdown: seconds by phase and number of processes."""
    lines = [
        f"| seconds | {' | '.join(f'{number} processes' for number in times)} |",
        "| --- |" + " --- |" * len(times),
    ]
    for phase in dict.fromkeys(phase for timing in times.values() for phase in timing):
        cells = (f"{timing.get(phase, 0.0):.1f}" for timing in times.values())
        lines.append(f"| {phase} | {' | '.join(cells)} |")
    lines.append(f"| **total** | {' | '.join(f'{sum(t.values()):.1f}' for t in times.values())} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
