"""Speed of a compressed layer beside the dense one: the table of docs/benchmarks.md.

    .venv/bin/python scripts/bench_inference.py
    .venv/bin/python scripts/bench_inference.py --threads 1 --dtypes bfloat16 --seconds 3

For every layer width and kept share, the dense layer, its two factors and its interpolative form,
as `lrc` loads them, decode one token (batch 1) and prefill 512. Their runs alternate in one
process; a figure is the median over the repetitions of dense time / compressed time of the same
repetition, so above 1 the compressed layer is faster. A network's other layers push a layer out of
the caches between two tokens: decoding goes round several copies of it. `auto`, the default
storage, takes the interpolative form where it is the more accurate one, which is nearly always.

Weights are random: speed does not depend on them. The script exits with 1 if a target is missed.
"""

import argparse
import copy
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lrc_cli.engine import STORAGES, Predicted, default_rank_multiple, pivot_block
from lrc_cli.network.layouts import LINEAR
from lrc_cli.network.low_rank.slots import low_rank_module

SHAPES = (
    (576, 576),
    (1024, 1024),
    (2048, 2048),
    (2048, 5632),
    (5632, 2048),
    (4096, 4096),
    (4096, 11008),
    (11008, 4096),
)
"""(outputs, inputs) of the layers."""
SHARES = (0.8, 0.5)
FORMS = ("factors", "interpolative")
TOKENS = {"decode": 1, "prefill": 512}
COLD_BYTES = 200e6
"""The bytes of all copies of a dense layer that decoding goes round."""
TARGET_WIDTH = 2048
SLOWEST_AT_8 = 0.97
FASTER_AT_5 = 1.4
"""Targets of the interpolative form, from TARGET_WIDTH on: at 0.8 both figures are at least the
first, at 0.5 prefill is at least the second."""
WARM_UP = 2
MIN_REPETITIONS = 7

Run = Callable[[], None]
Clock = Callable[[], float]


@dataclass(frozen=True, kw_only=True)
class Row:
    """The figures of one shape, dtype and kept share."""

    shape: tuple[int, int]
    dtype: str
    share: float
    speedups: dict[tuple[str, str], float]
    """(form, task) -> median of dense time / compressed time."""
    milliseconds: dict[str, float]
    """Task -> median time of the dense layer."""


def main() -> None:
    """Measure every case, print the table and the verdicts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--widest", type=int, default=11008, help="leave wider layers out")
    parser.add_argument("--seconds", type=float, default=4.0, help="per case, at least")
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="not wall time: for a machine that others use too; implies one thread on a CPU",
    )
    arguments = parser.parse_args()
    if arguments.processor_time:
        arguments.device, arguments.threads = "cpu", 1
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    clock = time.process_time if arguments.processor_time else time.perf_counter
    counted = "processor time" if arguments.processor_time else "wall time"
    load = f"load average {os.getloadavg()[0]:.1f}"
    print(f"{describe(device)}, {torch.get_num_threads()} threads, {counted}, {load}")
    print(f"torch {torch.__version__}\n")
    print(HEADER, flush=True)
    rows = []
    for dtype in arguments.dtypes:
        for shape in SHAPES:
            if max(shape) > arguments.widest:
                continue
            for row in measure(shape, getattr(torch, dtype), device, clock, arguments.seconds):
                rows.append(row)
                print(line(row), flush=True)
    print()
    if not verdicts(rows):
        sys.exit(1)


def describe(device: torch.device) -> str:
    """The device, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({torch.backends.cpu.get_cpu_capability()})"


@torch.no_grad()
def measure(
    shape: tuple[int, int], dtype: torch.dtype, device: torch.device, clock: Clock, seconds: float
) -> Iterator[Row]:
    """One row per kept share."""
    for share in SHARES:
        speedups: dict[tuple[str, str], float] = {}
        milliseconds: dict[str, float] = {}
        for task, num_tokens in TOKENS.items():
            num_bytes = shape[0] * shape[1] * dtype.itemsize
            copies = max(1, round(COLD_BYTES / num_bytes)) if task == "decode" else 1
            copies = min(copies, 64)
            layers = {
                form: ring(build(form, shape, share, dtype).to(device), copies)
                for form in ("dense", *FORMS)
            }
            x = torch.randn(num_tokens, shape[1]).to(device, dtype)
            times = alternate(
                {form: runner(ring, x) for form, ring in layers.items()}, clock, seconds
            )
            milliseconds[task] = statistics.median(times["dense"]) / copies * 1e3
            for form in FORMS:
                pairs = zip(times["dense"], times[form], strict=True)
                speedups[form, task] = statistics.median(dense / own for dense, own in pairs)
        name = str(dtype).removeprefix("torch.")
        yield Row(
            shape=shape, dtype=name, share=share, speedups=speedups, milliseconds=milliseconds
        )


def build(form: str, shape: tuple[int, int], share: float, dtype: torch.dtype) -> nn.Module:
    """A random layer: dense, or of the largest rank that keeps `share` of the bytes."""
    m, n = shape
    linear = nn.Linear(n, m, bias=False, dtype=dtype)
    if form == "dense":
        return linear
    rank, block = rank_of(form, shape, share, dtype), 0
    tensors = {"weight": random(rank, n, dtype), "up.weight": random(m, rank, dtype)}
    if form == "interpolative":
        block = pivot_block(m, rank)
        tensors["up.weight"] = random(m - rank, rank, dtype)
        tensors["perm"] = interleaved(m // block, rank // block)
    return low_rank_module(linear, tensors, LINEAR, shape)


def rank_of(form: str, shape: tuple[int, int], share: float, dtype: torch.dtype) -> int:
    """The largest rank whose bytes are at most `share` of the dense layer's."""
    m, n = shape
    any_error = Predicted(spectrum=torch.zeros(min(m, n)))
    step, itemsize = default_rank_multiple(m, n), dtype.itemsize
    choices = STORAGES[form].choices(shape, itemsize, any_error, rank_multiple=step)
    return max(x.rank for x in choices if x.rank and x.num_bytes <= share * m * n * itemsize)


def random(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Entries that keep the scale of what is multiplied with them."""
    return (torch.randn(rows, columns) / columns**0.5).to(dtype)


def interleaved(num_blocks: int, num_chosen: int) -> Tensor:
    """The permutation of chosen blocks at random places, both parts in ascending order."""
    is_chosen = torch.zeros(num_blocks, dtype=torch.bool)
    is_chosen[torch.randperm(num_blocks)[:num_chosen]] = True
    order = torch.cat([is_chosen.nonzero()[:, 0], (~is_chosen).nonzero()[:, 0]])
    return order.argsort().to(torch.int32)


def ring(layer: nn.Module, copies: int) -> list[nn.Module]:
    """The layer and as many more, each in memory of its own."""
    return [layer, *(copy.deepcopy(layer) for _ in range(copies - 1))]


def runner(layers: list[nn.Module], x: Tensor) -> Run:
    """Runs every layer once."""

    def run() -> None:
        for layer in layers:
            layer(x)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)

    return run


def alternate(runs: dict[str, Run], clock: Clock, seconds: float) -> dict[str, list[float]]:
    """Times of every run, taken in turns until `seconds` have passed."""
    for _ in range(WARM_UP):
        for run in runs.values():
            run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    names, begin = list(runs), clock()
    while clock() - begin < seconds or len(times[names[0]]) < MIN_REPETITIONS:
        names = names[1:] + names[:1]  # nobody always comes after the same one
        for name in names:
            start = clock()
            runs[name]()
            times[name].append(clock() - start)
    return times


HEADER = """\
| dtype | outputs x inputs | kept | dense ms, 1 / 512 | factors, 1 | 512 | interpolative, 1 | 512 |
| --- | --- | --- | --- | --- | --- | --- | --- |"""


def line(row: Row) -> str:
    """One line of the table."""
    dense = " / ".join(f"{row.milliseconds[task]:.3g}" for task in TOKENS)
    cells = (f"{row.speedups[form, task]:.2f}" for form in FORMS for task in TOKENS)
    size = f"{row.shape[0]} x {row.shape[1]}"
    return f"| {row.dtype} | {size} | {row.share} | {dense} | " + " | ".join(cells) + " |"


def verdicts(rows: list[Row]) -> bool:
    """Print every target beside its figure; whether all are met."""
    met = True
    for row in rows:
        if min(row.shape) < TARGET_WIDTH:
            continue
        tasks = TOKENS if row.share == 0.8 else ("prefill",)
        least = SLOWEST_AT_8 if row.share == 0.8 else FASTER_AT_5
        for task in tasks:
            found = row.speedups["interpolative", task]
            met &= found >= least
            verdict = "met   " if found >= least else "MISSED"
            size = f"{row.shape[0]} x {row.shape[1]}"
            print(f"{verdict} {row.dtype} {size} at {row.share}, {task}: {found:.2f} >= {least}")
    return met


if __name__ == "__main__":
    main()
