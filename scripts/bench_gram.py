"""Processor time of adding rows to a Gram matrix, and its error: a table of docs/benchmarks.md.

    .venv/bin/python scripts/bench_gram.py

2048 random bfloat16 rows, one thread, best of seven: multiplied in float32, and in bfloat16 with
float32 sums, as lrc does where the processor can; in panels, as lrc does, and whole. Errors are
relative to the product in float64, in the Frobenius norm.
"""

import time
from unittest import mock

import torch

from lrc_cli.job.statistics import moments

WIDTHS = (576, 1536, 4096)
NUM_ROWS, REPEATS = 2048, 7


def measure(rows: torch.Tensor, panel: int) -> tuple[float, float]:
    """Milliseconds of the fastest addition, and the error of the lower triangle."""
    exact = (rows.double().T @ rows.double()).tril()
    best = float("inf")
    with mock.patch.object(moments, "PANEL", panel):
        for _ in range(REPEATS):
            gram = moments.GramSum(rows.shape[1], rows.device)
            start = time.process_time()
            gram.add(rows)
            best = min(best, time.process_time() - start)
    return 1000 * best, ((gram.total.tril() - exact).norm() / exact.norm()).item()


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    print("| width | float32, ms | error | bfloat16, ms | error | bfloat16 whole, ms |")
    print("| --- | --- | --- | --- | --- | --- |")
    for width in WIDTHS:
        generator = torch.Generator().manual_seed(width)
        rows = torch.randn(NUM_ROWS, width, generator=generator).bfloat16()
        exact, error = measure(rows.float(), moments.PANEL)
        fast, fast_error = measure(rows, moments.PANEL)
        whole, _ = measure(rows, width)
        cells = f"{exact:.1f} | {error:.1e} | {fast:.1f} | {fast_error:.1e} | {whole:.1f}"
        print(f"| {width} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
