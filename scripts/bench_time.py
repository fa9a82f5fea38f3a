"""Time of `lrc compress` beside the least that its work takes, and beside the usual way to do it.

    .venv/bin/python scripts/bench_time.py                 SmolLM2, 64 x 512 tokens
    .venv/bin/python scripts/bench_time.py --shape-only    random weights, nothing to download
    .venv/bin/python scripts/bench_time.py --sequences 16 --processor-time

Everything runs in one process, in turn, on one device:

* `lrc compress` by `curvature` with the defaults and by `frobenius` as SVD-LLM uses it (uniform
  ranks, two factors), each in an empty work directory, without evaluation. All phases count.
* The floor: the bare passes over the same micro-batches in the same dtype (frobenius: forward,
  without logits; curvature: forward and backward, parameters frozen), and the bare Gram products in
  the dtypes of lrc, one lower triangle per distinct input and, for curvature, one per layer's
  output gradients: micro-batches multiplied in float32 and added up in float64. Nothing is watched,
  stored or solved.
* The reference, what SVD-LLM does (profle_svdllm and whitening of its SVDLLM.py): one float32 call
  of the model, logits included, with a hook on every linear layer, the head too, each of which
  multiplies its own Gram matrix (q, k and v three times the same) into a float32 sum; then, for
  every layer of the blocks, the Cholesky factor S in float64 (where that fails, shifted by the
  smallest eigenvalue), its inverse, and the SVD of W S in float32. Nothing is stored or checked.
  Batches hold as many tokens as lrc's: SVD-LLM takes one sequence, of 2048 tokens, at a time.

There are two targets: lrc takes at most 1.5 times the floor and the time inside of the symmetric
eigensolver, and by frobenius lrc is at least 2 times (CUDA: 3) as fast as the reference. The script
exits with 1 if a target is missed.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from random_llama import smollm2_config, write_job, write_llama
from torch import Tensor, nn

from lrc_cli.config import Config, load_config
from lrc_cli.data.draw import micro_batch
from lrc_cli.data.purposes import CALIBRATION
from lrc_cli.execution.hooks import grouping
from lrc_cli.execution.losses import backward_scalars, choose_loss, prepare
from lrc_cli.execution.network import make_network
from lrc_cli.execution.precision import recast_in_backward
from lrc_cli.job.plan import Plan, make_plan
from lrc_cli.job.run import compress
from lrc_cli.job.statistics.collect import MICRO_BATCH_TOKENS
from lrc_cli.job.statistics.moments import PANEL
from lrc_cli.network.opening import open_module
from lrc_cli.runtime.progress import Phase, Progress, Seconds

ROOT = Path(__file__).resolve().parent.parent
METHODS: Mapping[str, tuple[str, ...]] = {
    "frobenius": (
        "compression.method=frobenius",
        "compression.allocation=uniform",
        "compression.storage=factors",
    ),
    "curvature": ("compression.method=curvature",),
}
LARGEST_SHARE = 1.5
FASTER = {"cpu": 2.0, "cuda": 3.0}
SHIFT = 1e-6
VOCABULARY = 49152
WARM_UP_SIZE = 256

Clock = Callable[[], float]


@dataclass(frozen=True, kw_only=True)
class Floor:
    """Seconds of the bare work of one method."""

    passes: float
    products: float

    @property
    def total(self) -> float:
        """Both."""
        return self.passes + self.products


@dataclass(frozen=True, kw_only=True)
class Took:
    """Seconds of one `lrc compress`."""

    phases: Mapping[str, float]
    eigensolver: float
    total: float
    """Seconds from the config to the finished output, including the time between the phases."""


class Timed(Progress):
    """A silent Progress that takes phases by the clock of this benchmark."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(quiet=True)
        self.clock = clock
        self.seconds: Seconds = {}

    @contextmanager
    def phase(self, name: str, cost: float) -> Iterator[Phase]:
        """A phase, see Progress.phase."""
        start, before = self.clock(), self.seconds.get(name, 0.0)
        with super().phase(name, cost) as phase:
            yield phase
        self.seconds[name] = before + self.clock() - start


def main() -> None:
    """Run everything, print the tables and the verdicts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shape-only", action="store_true", help="random weights and tokens")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--blocks", type=int, default=30, help="of the random model")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="not wall time: for a machine that others use too; implies one thread on a CPU",
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1 if arguments.processor_time else arguments.threads)
    clock = time.process_time if arguments.processor_time else wall
    with tempfile.TemporaryDirectory() as name:
        job = job_of(Path(name), arguments)
        plan = make_plan(job("frobenius"))
        print(describe(plan, arguments), end="\n\n", flush=True)
        warm_up(plan)
        took = {method: run(job(method), clock) for method in arguments.methods}
        floors = {method: floor(plan, method, clock) for method in arguments.methods}
        compared = reference(plan, clock) if "frobenius" in took else {}
    print(table(took, floors, compared))
    print()
    if not verdicts(took, floors, compared, FASTER[plan.device.type]):
        sys.exit(1)


def wall() -> float:
    """Seconds, once the GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def job_of(directory: Path, arguments: argparse.Namespace) -> Callable[[str], Config]:
    """Configs by method, each with a work directory of its own below `directory`."""
    base = ROOT / "configs" / "benchmark.yaml"
    common = [
        f"calibration.num_sequences={arguments.sequences}",
        f"calibration.sequence_length={arguments.length}",
        "compression.size=0.8",
        "compression.sequential=false",
        "evaluation=[]",
    ]
    if arguments.processor_time:
        common.append("runtime.device=cpu")
    if arguments.shape_only:
        base = write_shape(directory / "model", arguments)

    def job(method: str) -> Config:
        places = [
            f"output.path={directory / method / 'out'}",
            f"runtime.work_dir={directory / method / 'work'}",
        ]
        return load_config(base, [*common, *METHODS[method], *places])

    return job


def write_shape(directory: Path, arguments: argparse.Namespace) -> Path:
    """A random checkpoint of SmolLM2-135M's shape, and tokens; returns its config."""
    config = smollm2_config(arguments.blocks, VOCABULARY)
    write_llama(directory, config)
    return write_job(
        directory,
        vocabulary=VOCABULARY,
        num_sequences=arguments.sequences,
        length=arguments.length,
        size=0.8,
    )


def describe(plan: Plan, arguments: argparse.Namespace) -> str:
    """The run and its device, in words."""
    on = "CPU" if plan.device.type == "cpu" else torch.cuda.get_device_name(plan.device)
    counted = "processor time" if arguments.processor_time else "wall time"
    return (
        f"{len(plan.sequences[CALIBRATION])} x {arguments.length} tokens, {len(plan.layers)}"
        f" layers, activations in {str(plan.network.dtype).removeprefix('torch.')}\n"
        f"{on}, {torch.get_num_threads()} threads, {counted},"
        f" load average {os.getloadavg()[0]:.1f}, torch {torch.__version__}"
    )


def warm_up(plan: Plan) -> None:
    """Start the libraries that all sides use, so that the first of them does not pay for it."""
    with torch.no_grad():
        plan.network(next(plan.sequences[CALIBRATION].batches(1)))
    matrix = torch.eye(WARM_UP_SIZE, device=plan.device)
    for solve in (torch.linalg.eigh, torch.linalg.svd, torch.linalg.cholesky):
        solve(matrix)


def run(config: Config, clock: Clock) -> Took:
    """`lrc compress`, with its phases timed."""
    progress = Timed(clock)
    start = clock()
    with eigensolver_timed(clock) as spent:
        compress(config, progress=progress)
    total = clock() - start
    phases = {**progress.seconds, "between the phases": total - sum(progress.seconds.values())}
    return Took(phases=phases, eigensolver=sum(spent), total=total)


@contextmanager
def eigensolver_timed(clock: Clock) -> Iterator[list[float]]:
    """A context in which every symmetric eigenproblem appends its share of the seconds.

    On a CPU lrc solves as many eigenproblems at once as there are threads, one thread each. The
    seconds of an eigenproblem are divided by the number that runs side by side.
    """
    spent: list[float] = []

    def timed(solve: Callable[..., Any]) -> Callable[..., Any]:
        def solved(*args: Any, **kwargs: Any) -> Any:
            start, side_by_side = clock(), threads // torch.get_num_threads()
            result = solve(*args, **kwargs)
            spent.append((clock() - start) / max(side_by_side, 1))
            return result

        return solved

    threads = torch.get_num_threads()
    names = ("eigh", "eigvalsh")
    with mock.patch.multiple(torch.linalg, **{n: timed(getattr(torch.linalg, n)) for n in names}):
        yield spent


def floor(plan: Plan, method: str, clock: Clock) -> Floor:
    """The bare passes and the bare products."""
    sequences = plan.sequences[CALIBRATION]
    batches = list(sequences.batches(micro_batch(sequences, MICRO_BATCH_TOKENS)))
    with torch.no_grad(), grouping(plan.network, plan.layers) as groups:
        plan.network(next(sequences.batches(1)))
    leaders = set(groups.values())
    widths = [layer.shape[1] for layer in plan.layers if layer.name in leaders]
    if method == "curvature":
        widths += [layer.shape[0] for layer in plan.layers]
    passes = backward_passes if method == "curvature" else forward_passes
    start = clock()
    passes(plan, batches)
    middle = clock()
    for batch in batches:
        products(widths, batch["input_ids"].numel(), plan)
    return Floor(passes=middle - start, products=clock() - middle)


@torch.no_grad()
def forward_passes(plan: Plan, batches: list[dict[str, Tensor]]) -> None:
    """Every micro-batch through the blocks; the logits of one position only."""
    for batch in batches:
        plan.network({**batch, "logits_to_keep": torch.tensor([0])})


def backward_passes(plan: Plan, batches: list[dict[str, Tensor]]) -> None:
    """Forward and backward to the embeddings, parameters frozen; no hook looks on."""
    network, generator = plan.network, torch.Generator().manual_seed(0)
    loss = choose_loss("auto", network, {k: t[:1] for k, t in batches[0].items()}, plan.tokenizer)
    embedding = network.module.get_input_embeddings()
    handle = embedding.register_forward_hook(lambda _, __, output: output.requires_grad_().clone())
    try:
        for batch in batches:
            inputs, labels = prepare(loss, batch, generator)
            with recast_in_backward(network.casts):
                outputs = network(inputs)
                for scalar in backward_scalars(loss, outputs, labels, generator):
                    scalar.backward()
    finally:
        handle.remove()


def products(widths: list[int], num_rows: int, plan: Plan) -> None:
    """The lower triangles of x^T x, for a random x (num_rows, width) of every width, summed."""
    made = {
        width: torch.randn(num_rows, width, device=plan.device).to(plan.network.dtype)
        for width in set(widths)
    }
    # On a CPU, bfloat16 rows are multiplied in bfloat16 and added up in float32.
    settings: Any = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "bf16" if plan.network.dtype == torch.bfloat16 else "ieee"
    sums = {
        width: torch.zeros(width, width, dtype=torch.float64, device=plan.device) for width in made
    }
    for width in widths:
        add_lower_triangle(sums[width], made[width])
    settings.fp32_precision = before


def add_lower_triangle(total: Tensor, rows: Tensor) -> None:
    """x^T x in float32, panel by panel, added to the float64 sum."""
    fused = rows.is_cuda and rows.dtype == torch.bfloat16
    rows = rows if fused else rows.float()
    for first in range(0, rows.shape[1], PANEL):
        last = min(first + PANEL, rows.shape[1])
        panel, left = rows[:, first:last].T, rows[:, :last]
        total[first:last, :last] += (
            torch.mm(panel, left, out_dtype=torch.float32) if fused else panel @ left
        )


def reference(plan: Plan, clock: Clock) -> dict[str, float]:
    """Do what SVD-LLM does, in memory; the result is the seconds by step."""
    module = open_module(plan.source, factory=None).module.float()
    network = make_network(module, device=plan.device, dtype=torch.float32)
    grams: dict[nn.Module, Tensor] = {}

    def look(linear: nn.Module, args: tuple[Tensor, ...], _: Tensor) -> None:
        rows = args[0].flatten(0, -2)
        gram = rows.T @ rows
        grams[linear] = grams[linear] + gram if linear in grams else gram

    linears = [linear for linear in module.modules() if isinstance(linear, nn.Linear)]
    handles = [linear.register_forward_hook(look) for linear in linears]
    sequences = plan.sequences[CALIBRATION]
    start = clock()
    with torch.no_grad():
        for batch in sequences.batches(micro_batch(sequences, MICRO_BATCH_TOKENS)):
            network(batch)
    for handle in handles:
        handle.remove()
    middle = clock()
    for layer in plan.layers:
        m, n = layer.shape
        linear = module.get_submodule(layer.name)
        svd_llm_factors(linear, grams.pop(linear), rank=int(0.8 * m * n / (m + n)))
    return {"statistics": middle - start, "factors": clock() - middle}


def svd_llm_factors(linear: nn.Module, gram: Tensor, *, rank: int) -> tuple[Tensor, Tensor]:
    """Outer (m, r) and inner (r, n) of W S truncated, times S^-1, for gram = S S^T (SVD-LLM)."""
    root = shifted_cholesky(gram.double())
    inverse = torch.linalg.inv(root).float()
    weight = linear.get_parameter("weight")
    u, s, vt = torch.linalg.svd(weight @ root.float(), full_matrices=False)
    scale = s[:rank].sqrt().diag()
    return u[:, :rank] @ scale, scale @ (vt[:rank] @ inverse)


def shifted_cholesky(gram: Tensor) -> Tensor:
    """S with S S^T = gram; where that fails, the diagonal is raised by the smallest eigenvalue."""
    root, info = torch.linalg.cholesky_ex(gram)
    if info.item():
        smallest = torch.linalg.eigvalsh(gram)[0]
        root = torch.linalg.cholesky(gram + (SHIFT - smallest) * torch.eye(len(gram)).to(gram))
    return root


def table(
    took: Mapping[str, Took], floors: Mapping[str, Floor], compared: Mapping[str, float]
) -> str:
    """Markdown: seconds by phase and side."""
    lines = [
        f"| seconds | {' | '.join(took)} | SVD-LLM's way |",
        "| --- |" + " --- |" * (len(took) + 1),
    ]

    def add(name: str, values: Iterable[float | None], other: float | None = None) -> None:
        cells = ("-" if value is None else f"{value:.1f}" for value in (*values, other))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")

    for name in dict.fromkeys(name for run in took.values() for name in run.phases):
        add(name, (run.phases.get(name) for run in took.values()), compared.get(name))
    add("**total**", (run.total for run in took.values()), sum(compared.values()) or None)
    add("of it, inside the eigensolver", (run.eigensolver for run in took.values()))
    add("floor: bare passes", (floor.passes for floor in floors.values()))
    add("floor: bare Gram products", (floor.products for floor in floors.values()))
    return "\n".join(lines)


def verdicts(
    took: Mapping[str, Took],
    floors: Mapping[str, Floor],
    compared: Mapping[str, float],
    faster: float,
) -> bool:
    """Print every target beside its figure; whether all are met."""
    checks = []
    for method in took:
        share = (took[method].total - took[method].eigensolver) / floors[method].total
        checks.append((f"{method}: total less eigensolver / floor", share, share <= LARGEST_SHARE))
    if compared:
        ratio = sum(compared.values()) / took["frobenius"].total
        checks.append(("frobenius: SVD-LLM's way / total", ratio, ratio >= faster))
    for what, found, holds in checks:
        print(f"{'met   ' if holds else 'MISSED'} {what}: {found:.2f}")
    if compared:
        most = sum(compared.values()) / floors["frobenius"].total
        print(
            f"       SVD-LLM's way / floor: {most:.2f}, which nothing that does this work exceeds"
        )
    return all(holds for *_, holds in checks)


if __name__ == "__main__":
    main()
