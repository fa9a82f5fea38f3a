"""`relu` beside `frobenius` on trained ReLU networks: the tables of docs/relu.md.

    .venv/bin/python scripts/fetch_demo.py mnist
    .venv/bin/python scripts/mnist.py [--dir .cache/mnist]

Trains an MLP and a CNN on 4000 of 5000 MNIST digits, which takes seconds, and compresses both with
either method at equal ranks, fitted to the 4000. For every layer followed by a ReLU the relative
error behind it, ||relu(W x + b) - relu(Z x + b^)|| / ||relu(W x + b)|| on the dense network's
inputs, is measured by running the modules, on the 4000 digits and on the other 1000. Exits with 1
if `relu` is above `frobenius` in a layer on calibration data, or not below it held out, in total of
a network.
"""

import argparse
import gzip
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from lrc_cli import compress, load
from lrc_cli.config import parse_config
from lrc_cli.errors import LrcError

ROOT = Path(__file__).resolve().parents[1]
DIGITS = ROOT / ".cache" / "data" / "mnist-5k.csv.gz"
NUM_TRAINED = 4000
METHODS = ("frobenius", "relu")


def mlp() -> nn.Module:
    """784 pixels, two hidden layers, 10 classes."""
    first, second = nn.Linear(784, 256), nn.Linear(256, 128)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Linear(128, 10))


def cnn() -> nn.Module:
    """Two convolutions, which stay dense, and a classifier of three linear layers."""
    convolutions = [
        layer
        for width, out in ((1, 16), (16, 32))
        for layer in (nn.Conv2d(width, out, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    ]
    first, second = nn.Linear(32 * 7 * 7, 128), nn.Linear(128, 64)
    classifier = (first, nn.ReLU(), second, nn.ReLU(), nn.Linear(64, 10))
    return nn.Sequential(nn.Unflatten(1, (1, 28, 28)), *convolutions, nn.Flatten(), *classifier)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One network, and the ranks of its layers that are followed by a ReLU."""

    name: str
    epochs: int
    ranks: dict[str, int]

    def config(self, folder: Path, method: str) -> str:
        """The job as YAML; equal ranks and two factors, so that only the method differs."""
        layers = "".join(f"\n    {name}: {{rank: {rank}}}" for name, rank in self.ranks.items())
        return f"""
model: {{path: {folder / self.name}.safetensors, factory: "mnist:{self.name}"}}
calibration: {{path: {folder / "calibration.safetensors"}, num_sequences: {NUM_TRAINED}}}
evaluation: []
compression:
  method: {method}
  size: 1.0
  storage: factors
  sequential: false
  include: [{", ".join(f'"{name}"' for name in self.ranks)}]
  layers: {layers}
runtime: {{device: cpu, dtype: float32}}
output: {{path: {folder / self.name}-{method}}}
"""


CASES = (
    Case(name="mlp", epochs=15, ranks={"0": 32, "2": 16}),
    Case(name="cnn", epochs=5, ranks={"8": 16, "10": 12}),
)

Errors = dict[str, tuple[float, float, float]]
"""Each layer's sum of squares of the outputs behind the ReLU, and of each method's errors."""


def read_digits() -> tuple[Tensor, Tensor]:
    """5000 images (5000, 784) in 0..1 and their labels, in a fixed random order."""
    with gzip.open(DIGITS, "rt", encoding="ascii") as lines:
        rows = torch.tensor([[int(entry) for entry in line.split(",")] for line in lines])
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    return rows[:, :-1] / 255, rows[:, -1]


def train(module: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> None:
    """Adam, in place."""
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for chosen in torch.randperm(len(images), generator=generator).split(64):
            optimizer.zero_grad()
            functional.cross_entropy(module(images[chosen]), labels[chosen]).backward()
            optimizer.step()


def accuracy(module: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of right answers."""
    return (module(images).argmax(dim=1) == labels).float().mean().item()


def errors_of(dense: nn.Module, others: list[nn.Module], names: list[str], x: Tensor) -> Errors:
    """Squared errors behind the ReLU of the layers `names`, which read the dense inputs."""
    found: Errors = {}
    for name, layer in dense.named_children():
        following = layer(x)
        if name in names:
            wanted = following.relu().double()
            given = [other.get_submodule(name)(x).relu().double() for other in others]
            first, second = ((wanted - y).square().sum().item() for y in given)
            found[name] = (wanted.square().sum().item(), first, second)
        x = following
    return found


def run_case(case: Case, folder: Path, images: Tensor, labels: Tensor) -> bool:
    """Train, compress twice, print the table; whether every criterion is met."""
    torch.manual_seed(0)
    dense = globals()[case.name]()
    train(dense, images[:NUM_TRAINED], labels[:NUM_TRAINED], case.epochs)
    save_file(dense.state_dict(), folder / f"{case.name}.safetensors")
    factory, others = globals()[case.name], []
    for method in METHODS:
        config = parse_config(case.config(folder, method), f"{case.name}, {method}")
        compress(config, force=True, restart=True)
        others.append(load(folder / f"{case.name}-{method}", factory=factory))
    names = list(case.ranks)
    parts = images[:NUM_TRAINED], images[NUM_TRAINED:]
    with torch.no_grad():
        calibration, held_out = (errors_of(dense, others, names, x) for x in parts)
        rights = [accuracy(m, parts[1], labels[NUM_TRAINED:]) for m in (dense, *others)]
    print(table(case, calibration, held_out))
    words = (f"{name} {right:.1%}" for name, right in zip(("dense", *METHODS), rights, strict=True))
    print(f"Right answers on the 1000 other digits: {', '.join(words)}.\n", flush=True)
    return verdict(calibration, held_out)


def table(case: Case, calibration: Errors, held_out: Errors) -> str:
    """Both methods' relative errors by layer, and in total, as a Markdown table."""
    head = " | ".join(f"{part}, `{m}`" for part in ("calibration", "held out") for m in METHODS)
    lines = [f"| {case.name}: layer | rank | {head} |", f"|{' --- |' * 6}"]
    for name, rank in case.ranks.items():
        lines.append(_row(name, str(rank), [calibration[name]], [held_out[name]]))
    lines.append(_row("total", "", [*calibration.values()], [*held_out.values()]))
    return "\n".join(lines)


def _row(name: str, rank: str, *parts: list[tuple[float, float, float]]) -> str:
    cells = [f"{(error / sums[0]) ** 0.5:.4f}" for sums in map(_sums, parts) for error in sums[1:]]
    return f"| {name} | {rank} | {' | '.join(cells)} |"


def _sums(entries: list[tuple[float, float, float]]) -> list[float]:
    return [sum(column) for column in zip(*entries, strict=True)]


def verdict(calibration: Errors, held_out: Errors) -> bool:
    """Whether `relu` is nowhere above on calibration data, and below in total held out."""
    met = True
    for name, (_, frobenius, relu) in calibration.items():
        if relu > frobenius:
            print(f"MISSED: layer {name}: {relu:.6g} above {frobenius:.6g} on calibration data")
            met = False
    _, frobenius, relu = _sums([*held_out.values()])
    if relu >= frobenius:
        print(f"MISSED: {relu:.6g} is not below {frobenius:.6g} held out, in total")
        met = False
    return met


def main() -> int:
    """Run both networks; 0 when every criterion is met."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--dir", type=Path, default=ROOT / ".cache" / "mnist")
    folder: Path = parser.parse_args().dir
    if not DIGITS.exists():
        print("error: the digits are missing; run scripts/fetch_demo.py mnist", file=sys.stderr)
        return 1
    folder.mkdir(parents=True, exist_ok=True)
    images, labels = read_digits()
    save_file({"x": images[:NUM_TRAINED].contiguous()}, folder / "calibration.safetensors")
    save_file({"x": images[NUM_TRAINED:].contiguous()}, folder / "held-out.safetensors")
    try:
        met = [run_case(case, folder, images, labels) for case in CASES]
    except LrcError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main())
