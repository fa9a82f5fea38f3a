"""Quality of compressed SmolLM2-135M beside the SVD-LLM baseline: the table of docs/benchmarks.md.

    .venv/bin/python scripts/bench_quality.py            seeds 0, 1 and 2
    .venv/bin/python scripts/bench_quality.py --seeds 0  one seed only
    .venv/bin/python scripts/bench_quality.py --rows "0.6 frob" --sequential
                                                         the baseline with sequential: auto
    .venv/bin/python scripts/bench_quality.py --curve    quality over size: see scripts/curve.py,
                                                         which also takes --estimate and --draw

Every row is `lrc compress` with configs/benchmark.yaml and the overrides that the row names, so the
figures are of the written files: weights rounded to bfloat16. All networks of a seed, the dense one
included, are scored on the same sequences in one run. The script exits with 1 if a target of seed 0
is missed.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import exp
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from lrc_cli import load
from lrc_cli.config import load_config
from lrc_cli.data.purposes import CALIBRATION
from lrc_cli.execution.network import Network, make_network
from lrc_cli.job.plan import Plan, make_plan
from lrc_cli.job.run import compress
from lrc_cli.runtime.progress import Progress

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "out" / "bench"
PLAIN = "compression.sequential=false"
BASELINE = (
    "compression.method=frobenius",
    "compression.allocation=uniform",
    "compression.storage=factors",
    PLAIN,
)
ROWS: Mapping[str, tuple[str, ...]] = {
    "0.8 frobenius, uniform, factors (SVD-LLM)": ("compression.size=0.8", *BASELINE),
    "0.8 curvature, global, auto": ("compression.size=0.8",),
    "0.6 frobenius, uniform, factors (SVD-LLM)": ("compression.size=0.6", *BASELINE),
    "0.6 curvature, global, auto": ("compression.size=0.6", PLAIN),
}
BASE_8, OURS_8, BASE_6, OURS_6 = ROWS
INT8 = "dense, int8 per output channel"
Losses = dict[str, dict[str, float]]
"""Mean loss in nats per token, by row and text."""


def main() -> None:
    """Run every row for every seed, print the table and the verdicts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", default="", help="only rows whose name holds this text")
    parser.add_argument("--blocks", type=int, default=64, help="evaluation sequences of each text")
    parser.add_argument(
        "--sequential", action="store_true", help="sequential: auto, the default, in every row"
    )
    parser.add_argument(
        "--curve", action="store_true", help="another benchmark: --curve --help says more"
    )
    if "--curve" in sys.argv:
        from curve import main as draw_curve

        sys.exit(draw_curve([word for word in sys.argv[1:] if word != "--curve"]))
    arguments = parser.parse_args()
    results: dict[int, Losses] = {}
    for seed in arguments.seeds:
        start = time.perf_counter()
        rows = {name: keys for name, keys in ROWS.items() if arguments.rows in name}
        if arguments.sequential:
            rows = {
                f"sequential {name}": tuple(key for key in keys if key != PLAIN)
                for name, keys in rows.items()
            }
        results[seed] = run_seed(seed, arguments.blocks, rows)
        print(table(results[seed], seed), flush=True)
        print(f"({time.perf_counter() - start:.0f} s)\n", flush=True)
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "quality.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    whole = not (arguments.rows or arguments.sequential)
    if 0 in results and whole and not verdicts(results[0]):
        sys.exit(1)


def run_seed(
    seed: int, num_sequences: int, rows: Mapping[str, tuple[str, ...]], *, int8: bool = True
) -> Losses:
    """Compress by every row and score everything on the sequences that the seed draws.

    Args:
        rows: {name: what `lrc compress --set` would override}.
        int8: whether the dense network rounded to int8 is scored too.
    """
    common = [f"calibration.seed={seed}", f"runtime.seed={seed}"]
    scored = [*common, *(f"evaluation.{i}.num_sequences={num_sequences}" for i in (0, 1))]
    networks: dict[str, Network] = {}
    base = ROOT / "configs" / "benchmark.yaml"
    for row, overrides in rows.items():
        path = OUT / f"seed{seed}" / row.split(" (")[0].replace(", ", "-").replace(" ", "-")
        config = load_config(base, [*common, *overrides, "evaluation=[]", f"output.path={path}"])
        print(f"seed {seed}: {row}", file=sys.stderr, flush=True)
        compress(config, force=True, progress=Progress())
        networks[row] = make_network(load(path), device=torch.device("cpu"), dtype=None)
    plan = make_plan(load_config(base, [*scored, f"output.path={OUT / 'none'}"]))
    rounded = {INT8: rounded_to_int8(plan)} if int8 else {}
    return score({"dense": plan.network, **rounded, **networks}, plan)


def rounded_to_int8(plan: Plan) -> Network:
    """The dense network with its compressible weights rounded to int8 per output channel."""
    module = load(plan.source.path)
    for layer in plan.layers:
        linear = module.get_submodule(layer.name)
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
        linear.weight = nn.Parameter((weight / scale).round() * scale)
    return make_network(module, device=plan.device, dtype=plan.network.dtype)


def score(networks: Mapping[str, Network], plan: Plan) -> Losses:
    """Mean next-token loss of every network on every evaluation text."""
    losses: Losses = {row: {} for row in networks}
    for text in plan.evaluation_names:
        assert text != CALIBRATION
        sums = dict.fromkeys(networks, 0.0)
        count = 0
        with timed(f"scoring on {text}"):
            for batch in plan.sequences[text].batches(1):
                wanted = batch["input_ids"][:, 1:].flatten()
                count += len(wanted)
                for row, network in networks.items():
                    with torch.no_grad():
                        logits = network(batch).logits[:, :-1].flatten(0, 1).float()
                    sums[row] += functional.cross_entropy(logits, wanted, reduction="sum").item()
        for row, total in sums.items():
            losses[row][text] = total / count
    return losses


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Say on stderr how long something took."""
    start = time.perf_counter()
    yield
    print(f"{what}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)


def table(losses: Losses, seed: int) -> str:
    """Markdown: perplexity, and its ratio to the dense network's, by row and text."""
    texts = list(losses["dense"])
    lines = [
        f"| seed {seed} | " + " | ".join(f"{text} | / dense" for text in texts) + " |",
        "| --- |" + " --- | --- |" * len(texts),
    ]
    for row, by_text in losses.items():
        cells = (
            f"{exp(by_text[text]):.2f} | {exp(by_text[text] - losses['dense'][text]):.3f}"
            for text in texts
        )
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def verdicts(losses: Losses) -> bool:
    """Print each target beside its figure; whether all are met."""

    def log_ratio(row: str) -> float:
        return losses[row]["wikipedia"] - losses["dense"]["wikipedia"]

    ours_8, base_8, ours_6, base_6 = (log_ratio(row) for row in (OURS_8, BASE_8, OURS_6, BASE_6))
    share_8, share_6 = ours_8 / base_8, ours_6 / base_6
    checks = (
        (f"baseline honest at 0.8: 3.5 <= {exp(base_8):.2f} <= 7", 3.5 <= exp(base_8) <= 7),
        (f"ours at 0.8: {exp(ours_8):.3f} <= 1.30", exp(ours_8) <= 1.30),
        (f"ours at 0.8: log-ratio {share_8:.3f} <= 0.145 of the baseline's", share_8 <= 0.145),
        (
            f"ours at 0.6: {exp(ours_6):.3f} <= 2.8, or log-ratio {share_6:.3f} <= 0.45",
            exp(ours_6) <= 2.8 or share_6 <= 0.45,
        ),
    )
    for what, holds in checks:
        print(f"{'met   ' if holds else 'MISSED'} {what}")
    return all(holds for _, holds in checks)


if __name__ == "__main__":
    main()
