"""Sequential fitting beside plain fitting on SmolLM2-135M: the tables of docs/benchmarks.md.

    .venv/bin/python scripts/bench_sequential.py                     kept shares 0.6 and 0.4, seed 0
    .venv/bin/python scripts/bench_sequential.py --seeds 1 2
    .venv/bin/python scripts/bench_sequential.py --sizes 0.8         above what `auto` takes
    .venv/bin/python scripts/bench_sequential.py --sizes 0.6 --tokens 10240 8192 4096
    .venv/bin/python scripts/bench_sequential.py --sizes 0.6 --method frobenius
    .venv/bin/python scripts/bench_sequential.py --sizes 0.6 --correction 1     nothing held back

With few calibration tokens sequential fitting would overfit. A layer with fewer than 15 tokens for
each input, once an eighth is held back, falls back to plain fitting. The script exits with 1 if
sequential fitting is worse than plain fitting on any text.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from math import exp

from bench_quality import Losses, run_seed, table

LENGTH = 512
"""Tokens of a calibration sequence."""


def rows(
    sizes: Sequence[str], tokens: Sequence[int], method: str, correction: str
) -> dict[str, tuple[str, ...]]:
    """The settings of each run, by name; "X" and "X, sequential" belong together."""
    found = {}
    for size in sizes:
        for number in tokens:
            name = size if number == 64 * LENGTH else f"{size}, {number} tokens"
            name = name if method == "curvature" else f"{name}, {method}"
            common = (
                f"compression.size={size}",
                f"compression.method={method}",
                f"compression.correction={correction}",
                f"calibration.num_sequences={number // LENGTH}",
            )
            found[name] = (*common, "compression.sequential=false")
            found[f"{name}, sequential"] = (*common, "compression.sequential=true")
    return found


def main() -> None:
    """Run every row for every seed, print the tables and the verdicts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--sizes", nargs="+", default=["0.6", "0.4"], help="kept shares")
    parser.add_argument("--tokens", type=int, nargs="+", default=[64 * LENGTH])
    parser.add_argument("--method", default="curvature", choices=["curvature", "frobenius"])
    parser.add_argument("--correction", default="auto", help="compression.correction")
    parser.add_argument("--blocks", type=int, default=64, help="evaluation sequences of each text")
    arguments = parser.parse_args()
    chosen = rows(arguments.sizes, arguments.tokens, arguments.method, arguments.correction)
    met = True
    for seed in arguments.seeds:
        start = time.perf_counter()
        losses = run_seed(seed, arguments.blocks, chosen, int8=False)
        print(table(losses, seed), flush=True)
        print(f"({time.perf_counter() - start:.0f} s)\n", flush=True)
        met &= verdicts(losses)
    if not met:
        sys.exit(1)


def verdicts(losses: Losses) -> bool:
    """Print both perplexities of every pair and text; whether sequential is never worse."""
    met = True
    for name in losses:
        if f"{name}, sequential" not in losses:
            continue
        for text, plain in losses[name].items():
            change = exp(losses[f"{name}, sequential"][text] - plain) - 1
            met &= change <= 0
            sign = "MISSED" if change > 0 else "met   "
            print(f"{sign} {name} on {text}: sequential changes the perplexity by {change:+.2%}")
    return met


if __name__ == "__main__":
    main()
