"""Sequential fitting beside plain fitting on SmolLM2-135M: the table of docs/benchmarks.md.

    .venv/bin/python scripts/bench_sequential.py               seed 0
    .venv/bin/python scripts/bench_sequential.py --seeds 0 1

Rows at kept shares 0.6 and 0.4, and at 0.6 with few calibration tokens, where sequential fitting
would overfit: both are below 15 n for all layers once an eighth is held back, and what is below
falls back. Exits with 1 if sequential fitting is worse than plain fitting on any text.
"""

import argparse
import sys
import time
from math import exp

from bench_quality import Losses, run_seed, table

SIZES = ("0.6", "0.4")
FEW = {"8192 tokens": 16, "4096 tokens": 8}
"""Calibration sequences of 512 tokens."""


def rows() -> dict[str, tuple[str, ...]]:
    """What is compressed, by name; "X" and "X, sequential" belong together."""
    plain = {size: (f"compression.size={size}",) for size in SIZES}
    plain |= {
        f"0.6, {name}": ("compression.size=0.6", f"calibration.num_sequences={number}")
        for name, number in FEW.items()
    }
    found = {}
    for name, overrides in plain.items():
        found[name] = (*overrides, "compression.sequential=false")
        found[f"{name}, sequential"] = (*overrides, "compression.sequential=true")
    return found


def main() -> None:
    """Run every row for every seed, print the tables and the verdicts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rows", default="", help="only rows whose name starts with this text")
    parser.add_argument("--blocks", type=int, default=64, help="evaluation blocks of each text")
    arguments = parser.parse_args()
    chosen = {name: keys for name, keys in rows().items() if name.startswith(arguments.rows)}
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
