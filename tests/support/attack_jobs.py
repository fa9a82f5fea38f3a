"""One finished output of each kind is made here, for attacks on what `lrc verify` says of it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pico
import torch
from families import FAMILIES
from safetensors.torch import save_file


@dataclass(frozen=True, kw_only=True)
class Target:
    """Holds a finished output, with what `lrc verify --against` needs."""

    kind: str
    output: Path
    original: Path
    factory: str | None = None


Job = dict[str, Any]


def _two_texts(text: Path) -> list[Job]:
    """Returns the config of two evaluation texts."""
    shared = {"path": str(text), "num_sequences": 4}
    return [
        {"name": "near", "part": [0.6, 0.7], **shared},
        {"name": "far", "part": [0.9, 1.0], **shared},
    ]


def _pico(model: str, changes: Job) -> Callable[[Path, Path], tuple[Path, Job]]:
    """Returns what writes a pico model and gives the changes of the default job."""

    def prepare(folder: Path, text: Path) -> tuple[Path, Job]:
        original = pico.write_model(folder / "model", model)
        job = {"model.path": str(original), "calibration.path": str(text)} | changes
        if job.pop("texts", 0) == 2:
            job["evaluation"] = _two_texts(text)
        return original, job

    return prepare


def _experts(folder: Path, text: Path) -> tuple[Path, Job]:
    """Writes a mixture whose first block never chooses the last expert: that expert falls back."""
    original = folder / "model"
    model = FAMILIES["mixtral"].build()
    pico.randomise(model)
    first = model.model.layers[0]
    with torch.no_grad():
        # A channel that is the same for every token is a bias to the first router.
        model.model.embed_tokens.weight[:, 0] = 2.0
        first.self_attn.o_proj.weight[0] = 0.0
        first.mlp.gate.weight[:, 0] = torch.tensor([1.0, 1.0, 0.3, -5.0])
    model.save_pretrained(original)
    ids = torch.randint(4, 64, (48, 12), generator=torch.Generator().manual_seed(4))
    save_file({"input_ids": ids}, folder / "ids.safetensors")
    return original, {
        "model.path": str(original),
        "calibration.path": str(folder / "ids.safetensors"),
        "calibration.num_sequences": 24,
        "evaluation": None,
        "compression.method": "frobenius",
    }


def _plain(name: str, changes: Job) -> Callable[[Path, Path], tuple[Path, Job]]:
    """Returns what writes a module with its factory; the caller puts the folder on the path."""

    def prepare(folder: Path, text: Path) -> tuple[Path, Job]:
        job = pico.write_plain(folder).model(name)
        return Path(job["model.path"]), job | changes

    return prepare


CERTIFIED: Job = {
    "certification.part": [0.7, 0.9],
    "certification.num_sequences": 24,
    "certification.sequence_length": 16,
}
GATED: Job = {"gates.max_perplexity_increase": 9.0, "gates.max_layer_error": 0.9}

PREPARE: dict[str, Callable[[Path, Path], tuple[Path, Job]]] = {
    "curvature": _pico("llama", CERTIFIED | GATED | {"texts": 2, "output.shard_size": "60KB"}),
    "sequential": _pico(
        "llama",
        CERTIFIED
        | {
            "compression.method": "frobenius",
            "compression.sequential": True,
            "compression.storage": "factors",
            "compression.size": 0.5,
            "calibration.num_sequences": 60,
        },
    ),
    "embeddings": _pico(
        "llama",
        {
            "compression.method": "frobenius",
            "compression.embeddings": True,
            "compression.storage": "interpolative",
            "compression.exclude": ["*.down_proj"],
            "calibration.part": None,
            "evaluation": None,
        },
    ),
    "relu": _pico("opt", CERTIFIED | {"compression.method": "relu"}),
    "nuclear": _pico(
        "bert-mlm",
        {
            "compression.method": "nuclear",
            "compression.size": None,
            "compression.threshold": 0.4,
        },
    ),
    "svd": _pico(
        "qwen2", {"compression.method": "svd", "compression.size": 0.3, "output.dtype": "bfloat16"}
    ),
    "experts": _experts,
    "worst": _plain("mlp", {"certification.num_sequences": 12}),
    "recovered": _pico(
        "bert-mlm",
        CERTIFIED
        | {
            "compression.method": "frobenius",
            "recover.scope": "model",
            "recover.tokens": 4000,
            "recover.norms": True,
        },
    ),
    "idle": _plain("with_idle", {"compression.size": 0.9}),
}
"""The kinds of outputs that are attacked."""


def make_target(kind: str, folder: Path, text: Path) -> Target:
    """Runs the job of a kind in a new folder."""
    folder.mkdir(parents=True, exist_ok=True)
    original, job = PREPARE[kind](folder, text)
    output, _ = pico.compressed(folder, job)
    return Target(kind=kind, output=output, original=original, factory=job.get("model.factory"))
