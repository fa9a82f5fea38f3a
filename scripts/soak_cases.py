"""Random jobs for scripts/soak.py: a seed decides model, form of the source, data and options.

The models are the pico models of the tests. The same seed gives the same files and the same job.
"""

import functools
import json
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import data_helpers
import media_helpers
import numpy as np
import pico
import source_helpers
import torch
from families import FAMILIES, IMAGES, TEXT, TWO_TEXTS
from safetensors.torch import save_file
from torch import Tensor

Changes = dict[str, Any]
Batch = Mapping[str, Tensor]

SOURCE, DATA, ORIGINAL = "source", "data", "original"
"""Names in a case's folder: the checkpoint, the data, the checkpoint as transformers wrote it."""
FACTORIES = "pico_factories"
"""The module with the factories of plain networks; it must lie in the working directory."""
TEMPLATE = (
    "{% for m in messages %}{{ 'w1' if m.role == 'user' else 'w2' }} {{ m.content }} {% endfor %}"
)
SCOPES = ("model",)
"""What `recover.scope` can be, where anything is trained."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Model:
    """Holds a pico model: how it is written, the data that it takes, and inputs to run it on."""

    write: Callable[[Path, str], object]
    """Writes the checkpoint into a directory, in a dtype."""
    data: tuple[str, ...]
    """Names of DATA_KINDS."""
    inputs: Batch
    """A few sequences."""
    dtypes: tuple[str, ...] = ("float32",)
    has_relu: bool = False
    has_likelihood: bool = False
    has_experts: bool = False
    least_size: float = 0.5
    """The smallest share of the bytes that can be asked for with ranks of any number."""
    takes_biases: bool = True
    """Whether the original network has a place for a bias that `compression.center` adds."""
    factory: str | None = None
    """The function that builds the network; None: transformers does."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """Holds one random job."""

    seed: int
    model: str
    dtype: str
    form: str
    """The form of the source, a name of FORMS or PLAIN_FORMS."""
    data: str
    changes: Changes
    processes: int
    by_transformers: bool
    """Whether the output is loaded by transformers and not by `lrc_cli.load`."""
    replaces: bool
    """Whether a job that is killed replaces an older output."""

    @property
    def network(self) -> Model:
        """The model that is compressed."""
        return MODELS[self.model]

    def __str__(self) -> str:
        asked = {key: value for key, value in self.changes.items() if value not in (None, False)}
        options = ", ".join(f"{key} {value}" for key, value in asked.items())
        many = f", {self.processes} processes" if self.processes > 1 else ""
        return f"{self.model} ({self.dtype}, {self.form}), {self.data}{many}, {options}"


# ---------------------------------------------------------------- models


def _write_family(directory: Path, dtype: str, *, name: str) -> None:
    model = FAMILIES[name].build()
    pico.randomise(model)
    model.to(DTYPES[dtype]).save_pretrained(directory)


def _write_pico(directory: Path, dtype: str, *, name: str) -> None:
    pico.write_model(directory, name)
    if name != "qwen2":  # the template's words are no tokens of its alphabet
        (directory / "chat_template.jinja").write_text(TEMPLATE)


def _write_media(directory: Path, dtype: str, *, name: str) -> None:
    media_helpers.write_model(directory, name)


def _write_plain(directory: Path, dtype: str, *, name: str) -> None:
    directory.mkdir()
    everything = directory / "everything"
    everything.mkdir()
    pico.write_plain(everything)
    state = pico.read_state(everything / f"{name}.safetensors")
    shutil.rmtree(everything)
    cast = {k: t.to(DTYPES[dtype]) if t.is_floating_point() else t for k, t in state.items()}
    save_file(cast, directory / "model.safetensors")


def _noise(*shape: int) -> Tensor:
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(3))


def _few(inputs: Batch) -> Batch:
    return {name: tensor[-2:] for name, tensor in inputs.items()}


def _family(name: str) -> Model:
    family = FAMILIES[name]
    writes = family.architecture.endswith(("ForCausalLM", "LMHeadModel", "ForMaskedLM"))
    return Model(
        write=functools.partial(_write_family, name=name),
        data=("tensors", "npz"),
        inputs=_few(family.inputs),
        dtypes=tuple(DTYPES),
        has_relu=name in ("opt", "resnet"),
        has_likelihood=writes,
        has_experts="num_experts" in family.settings,
        takes_biases="num_experts" not in family.settings,
    )


def _text_model(name: str) -> Model:
    _, dtype, _ = pico.MODELS[name]
    return Model(
        write=functools.partial(_write_pico, name=name),
        data=("text", "jsonl", "csv", "parquet", "ids", *(() if name == "qwen2" else ("chat",))),
        inputs=_few(TEXT),
        dtypes=(str(dtype).removeprefix("torch."),),
        has_relu=name == "opt",
        has_likelihood=name not in ("bert", "bert-classifier"),
    )


_SOUND: Batch = {"input_features": _noise(16, 100), "decoder_input_ids": _few(TEXT)["input_ids"]}
_MEDIA: dict[str, tuple[tuple[str, ...], Batch]] = {
    "vit": (("images",), _few(IMAGES)),
    "t5": (("text", "jsonl"), _few(TWO_TEXTS)),
    "t5-body": (("text", "parquet"), _few(TWO_TEXTS)),
    "whisper": (("recordings", "speech"), _SOUND),
    "wav2vec2": (("recordings",), {"input_values": _noise(8000)}),
    "clip": (("captions",), _few(TEXT | IMAGES)),
}
_MASK = torch.tensor([[1] * 10, [1] * 6 + [0] * 4])
_MASKED: Batch = {"x": _noise(10, 24), "attention_mask": _MASK}
_PLAIN: dict[str, tuple[str, Batch]] = {
    "mlp": ("rows", {"input": _noise(24)}),
    "with_idle": ("rows", {"x": _noise(24)}),
    "pictures": ("pixels", {"pixels": _noise(3, 12, 10)}),
    "attention": ("masked", _MASKED),
    "recurrent": ("masked", _MASKED),
    "packed": ("masked", _MASKED),
    "padded": ("masked", _MASKED),
}


def _media(name: str) -> Model:
    data, inputs = _MEDIA[name]
    return Model(write=functools.partial(_write_media, name=name), data=data, inputs=inputs)


def _plain(name: str) -> Model:
    data, inputs = _PLAIN[name]
    return Model(
        write=functools.partial(_write_plain, name=name),
        data=(data,),
        inputs=inputs,
        dtypes=("float32", "bfloat16"),
        has_relu=name in ("mlp", "with_idle"),
        takes_biases=name != "recurrent",
        least_size=0.93 if name == "with_idle" else 0.5,  # two of its layers stay dense
        factory=f"{FACTORIES}:{name}",
    )


MODELS: dict[str, Model] = {
    **{f"family {name}": _family(name) for name in FAMILIES},
    **{f"text {name}": _text_model(name) for name in pico.MODELS},
    **{f"media {name}": _media(name) for name in _MEDIA},
    **{f"plain {name}": _plain(name) for name in _PLAIN},
}

# ---------------------------------------------------------------- sources


def as_it_is(original: Path, directory: Path) -> None:
    """Copies the checkpoint."""
    shutil.copytree(original, directory)


def as_safetensors_shards(original: Path, directory: Path) -> None:
    """Writes two .safetensors files with an index."""
    state = _emptied(original, directory)
    weight_map = {}
    for number, keys in enumerate((list(state)[::2], list(state)[1::2]), start=1):
        name = f"model-{number:05}-of-00002.safetensors"
        save_file({key: state[key] for key in keys}, directory / name, {"format": "pt"})
        weight_map |= dict.fromkeys(keys, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def as_wrapped(original: Path, directory: Path) -> None:
    """Writes model.safetensors with the names that DataParallel and torch.compile make."""
    state = _emptied(original, directory)
    wrapped = {f"module._orig_mod.{key}": tensor for key, tensor in state.items()}
    save_file(wrapped, directory / "model.safetensors", {"format": "pt"})


def _emptied(original: Path, directory: Path) -> pico.State:
    shutil.copytree(original, directory, ignore=shutil.ignore_patterns("*.safetensors*"))
    return pico.read_state(original)


FORMS: dict[str, Callable[[Path, Path], None]] = {
    "safetensors": as_it_is,
    "sharded": as_safetensors_shards,
    "wrapped": as_wrapped,
    **source_helpers.FORMS,
}
PLAIN_FORMS: dict[str, tuple[str, str, bool]] = {
    "safetensors": (".safetensors", "", False),
    "wrapped safetensors": (".safetensors", "module.", False),
    "pt": (".pt", "", False),
    "wrapped pt": (".pt", "module._orig_mod.", False),
    "bin in a dictionary": (".bin", "", True),
    "ckpt": (".ckpt", "module.", True),
}
"""Forms of a bare file: suffix, prefix of the names, whether more than the state dict is saved."""


def _write_bare(original: Path, directory: Path, form: str) -> Path:
    suffix, prefix, nested = PLAIN_FORMS[form]
    state = pico.read_state(original)
    named = {f"{prefix}{key}": tensor for key, tensor in state.items()}
    directory.mkdir()
    file = directory / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(named, file)
    else:
        torch.save({"model": named, "step": 7} if nested else named, file)
    return file


# ---------------------------------------------------------------- data


def _tensors(folder: Path, case: Case) -> Path:
    inputs = FAMILIES[case.model.partition(" ")[2]].inputs
    file = folder / "inputs.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in inputs.items()}, file)
    return file


def _npz(folder: Path, case: Case) -> Path:
    inputs = FAMILIES[case.model.partition(" ")[2]].inputs
    np.savez(folder / "inputs.npz", **{name: tensor.numpy() for name, tensor in inputs.items()})
    return folder / "inputs.npz"


def _text(folder: Path, case: Case) -> Path:
    (folder / "words.txt").write_text(pico.words(6000, seed=case.seed))
    return folder / "words.txt"


def _records(folder: Path, case: Case, *, suffix: str, field: str) -> Path:
    texts = [pico.words(120, seed=case.seed + i) for i in range(50)]
    return data_helpers.write_records(folder / f"records{suffix}", field, texts)


def _ids(folder: Path, case: Case) -> Path:
    chance = random.Random(case.seed)
    rows = [[chance.randrange(5, 20) for _ in range(120)] for _ in range(50)]
    return data_helpers.write_records(folder / "ids.jsonl", "text", rows)


def _chat(folder: Path, case: Case) -> Path:
    chats = [
        [
            {"role": "user", "content": pico.words(60, seed=case.seed + i)},
            {"role": "assistant", "content": pico.words(60, seed=case.seed - i)},
        ]
        for i in range(50)
    ]
    return data_helpers.write_records(folder / "chats.jsonl", "messages", chats)


def _plain_rows(folder: Path, case: Case) -> Path:
    everything = folder / "everything"
    everything.mkdir()
    pico.write_plain(everything)
    file = (everything / f"{case.data}.safetensors").rename(folder / f"{case.data}.safetensors")
    shutil.rmtree(everything)
    return file


DATA_KINDS: dict[str, Callable[[Path, Case], Path]] = {
    "tensors": _tensors,
    "npz": _npz,
    "text": _text,
    "jsonl": functools.partial(_records, suffix=".jsonl", field="text"),
    "csv": functools.partial(_records, suffix=".csv", field="body"),
    "parquet": functools.partial(_records, suffix=".parquet", field="text"),
    "ids": _ids,
    "chat": _chat,
    "images": lambda folder, _: media_helpers.write_images(folder / "images"),
    "captions": lambda folder, _: media_helpers.write_images(folder / "images", captions=True),
    "recordings": lambda folder, _: media_helpers.write_recordings(folder / "sounds"),
    "speech": lambda folder, _: media_helpers.write_recordings(folder / "sounds", transcripts=True),
    "rows": _plain_rows,
    "pixels": _plain_rows,
    "masked": _plain_rows,
}
TOKENS = ("text", "jsonl", "csv", "parquet", "ids", "chat")
"""Kinds of data that are cut into sequences of any length."""

# ---------------------------------------------------------------- draws


def draw(seed: int, models: list[str] | None = None) -> Case:
    """Returns the case of a seed.

    Args:
        models: names of MODELS to choose from; None: all.
    """
    chance = random.Random(seed)
    name = chance.choice(models or list(MODELS))
    model = MODELS[name]
    data, dtype = chance.choice(model.data), chance.choice(model.dtypes)
    forms = list(PLAIN_FORMS if model.factory else FORMS)
    # A distributed save takes two processes and some seconds: it comes up less often.
    weights = [1 if form == "distributed" else 4 for form in forms]
    form = chance.choices(forms, weights)[0]
    changes = _draw_changes(chance, model, data, dtype)
    # Training has draws of its own, so the other draws of a seed stay what they were.
    changes |= _draw_recover(random.Random(f"recover {seed}"), data, changes)
    if form == "distributed" and "masked" in name:
        # Such a directory has no tokenizer, and so no mask token for the default loss.
        changes["compression.loss"] = "sampled"
    return Case(
        seed=seed,
        model=name,
        dtype=dtype,
        form=form,
        data=data,
        changes=changes,
        processes=2 if chance.random() < 0.1 else 1,
        by_transformers=model.factory is None and chance.random() < 0.5,
        replaces=chance.random() < 0.5,
    )


def _draw_changes(chance: random.Random, model: Model, data: str, dtype: str) -> Changes:
    changes = _draw_data(chance, model, data) | _draw_method(chance, model)
    changes |= _draw_measures(chance, data)
    changes["runtime.dtype"] = chance.choice(("auto", "float32", "float32", "bfloat16"))
    # A size is a share of the source's bytes, which wider numbers do not reach.
    narrow = [name for name in DTYPES if DTYPES[name].itemsize <= DTYPES[dtype].itemsize]
    changes["output.dtype"] = chance.choice(("auto", "auto", *narrow))
    changes["output.shard_size"] = chance.choice(("5GB", "30KB", "100KB"))
    changes["runtime.memory_limit"] = chance.choice((None, None, "0B", "20KB", "1MB"))
    changes["runtime.work_dir"] = chance.choice((None, None, "work"))
    changes["runtime.seed"] = chance.randrange(1000)
    return changes


def _draw_data(chance: random.Random, model: Model, data: str) -> Changes:
    if data in TOKENS:
        number = chance.choice((8, 24, 60, 100))
    elif model.factory:
        number = chance.choice((20, 40))
    else:
        number = chance.choice((8, 12))
    changes: Changes = {
        "calibration.num_sequences": number,
        "calibration.seed": chance.randrange(1000),
    }
    if data == "csv":
        changes["calibration.text_field"] = "body"
    if data == "chat":
        changes["calibration.chat_template"] = True
    return changes


def _draw_method(chance: random.Random, model: Model) -> Changes:
    methods = ["curvature", "frobenius", "nuclear", "svd", *(["relu"] if model.has_relu else [])]
    weights = [4, 4, 3, 1, *([6] if model.has_relu else [])]
    method = chance.choices(methods, weights)[0]
    target = _draw_target(chance, model, method)
    changes: Changes = {"compression.method": method, **target} | _draw_layers(chance, model)
    if "compression.threshold" not in target:
        changes["compression.rank_multiple"] = chance.choice(("auto", 1, 2))
    if method not in ("relu", "svd") and model.takes_biases and chance.random() < 0.25:
        # A table of embeddings, and a head that is tied to it, have no place for a bias.
        changes["compression.center"] = True
        changes |= {"compression.exclude": ["lm_head"], "compression.embeddings": False}
    if method == "relu":  # the layers before a ReLU must be there
        changes["compression.exclude"] = ["lm_head"]
    if "compression.size" in target:
        changes |= _draw_size(chance, model, changes)
    if method in ("curvature", "frobenius"):
        allowed = (
            ("auto", False) if "compression.max_layer_error" in target else ("auto", True, False)
        )
        changes["compression.sequential"] = chance.choice(allowed)
        changes["compression.correction"] = chance.choice(("auto", "auto", 0.5, 1.0))
    if chance.random() < 0.4:
        changes["compression.allocation"] = chance.choice(("relative", "uniform"))
    changes["compression.storage"] = chance.choice(("auto", "interpolative", "factors"))
    return changes


def _draw_size(chance: random.Random, model: Model, changes: Changes) -> Changes:
    """Draws a size that can be reached: ranks that are multiples of 8 and biases take their part.

    Of a whole checkpoint, narrow layers are a small part.
    """
    coarse = changes["compression.rank_multiple"] == "auto" or "compression.center" in changes
    least = max(model.least_size, 0.75 if coarse else 0.5)
    if chance.random() < 0.15:
        return {
            "compression.size": round(chance.uniform(max(least, 0.9), 0.98), 2),
            "compression.size_of": "checkpoint",
            "compression.exclude": ["lm_head"],
        }
    return {"compression.size": round(chance.uniform(least, max(least, 0.95)), 2)}


def _draw_layers(chance: random.Random, model: Model) -> Changes:
    changes: Changes = {
        "compression.exclude": chance.choice((["lm_head"], [], ["lm_head", "*.0.*"])),
        "compression.embeddings": model.factory is None and chance.random() < 0.3,
    }
    if chance.random() < 0.15:
        changes["compression.layers"] = {"*": {"storage": chance.choice(("factors", "auto"))}}
    return changes


def _draw_target(chance: random.Random, model: Model, method: str) -> Changes:
    kinds = ["size"] * 5
    if method not in ("relu", "svd"):
        kinds.append("max_layer_error")
    if method == "curvature" and model.has_likelihood:
        kinds.append("max_loss_increase")
    if method == "nuclear":
        kinds += ["threshold"] * 2
    match chance.choice(kinds):
        case "size":
            return {"compression.size": None}
        case "max_layer_error":
            return {"compression.max_layer_error": round(chance.uniform(0.1, 0.7), 2)}
        case "max_loss_increase":
            return {"compression.max_loss_increase": round(chance.uniform(0.05, 2.0), 2)}
        case _:
            return {"compression.threshold": round(chance.uniform(0.02, 0.3), 2)}


def _draw_recover(chance: random.Random, data: str, changes: Changes) -> Changes:
    """Draws a short training of the factors, where method and target leave one."""
    bounded = {"compression.max_layer_error", "compression.max_loss_increase"} & changes.keys()
    fits_biases = changes["compression.method"] == "relu" or "compression.center" in changes
    if bounded or fits_biases or chance.random() < 0.6:
        return {}
    own = chance.choice((None, None, 6)) if data in TOKENS else None
    if changes["calibration.num_sequences"] == 100:
        own = None  # nearly all that the calibration's part holds
    return {
        "recover.scope": chance.choice(SCOPES),
        "recover.tokens": chance.choice((64, 500, 3000)),
        "recover.norms": chance.random() < 0.5,
        **({} if own is None else {"recover.num_sequences": own}),
    }


def _draw_measures(chance: random.Random, data: str) -> Changes:
    """Draws evaluation, certification and gates, and the shares of the data that they get."""
    changes: Changes = {}
    part = data in TOKENS
    changes["calibration.part"] = [0.0, 0.6] if part else None
    evaluated = chance.choice(("held back", "named", "none"))
    if evaluated == "named" and part:
        changes["evaluation"] = "named"
    else:
        changes["evaluation"] = [] if evaluated == "none" else None
    certified = chance.random() < 0.35
    if certified:
        changes["certification.num_sequences"] = chance.choice((8, 30) if part else (4, 8))
        changes["certification.part"] = [0.6, 1.0] if part else None
        changes["certification.confidence"] = chance.choice((0.9, 0.95))
    if changes["evaluation"] != [] and chance.random() < 0.3:
        changes["gates.max_perplexity_increase"] = chance.choice((0.01, 1.0, 1000.0))
    if certified and chance.random() < 0.5:
        changes["gates.max_layer_error"] = chance.choice((0.05, 0.5, 0.99))
    return changes


# ---------------------------------------------------------------- files


def write(case: Case, folder: Path) -> Path:
    """Writes source, data and job.yaml into an empty folder; returns the config's path."""
    original, data = folder / ORIGINAL, folder / DATA
    case.network.write(original, case.dtype)
    if case.network.factory:
        source = _write_bare(original, folder / SOURCE, case.form)
    else:
        source = folder / SOURCE
        FORMS[case.form](original, source)
    data.mkdir()
    path = DATA_KINDS[case.data](data, case)
    return pico.job(folder, _with_paths(case, folder, source, path))


def source_of(case: Case, folder: Path) -> Path:
    """Returns the checkpoint that a case compresses, as `model.path` names it."""
    source = folder / SOURCE
    return next(source.iterdir()) if case.network.factory else source


def _with_paths(case: Case, folder: Path, source: Path, data: Path) -> Changes:
    changes = {
        **case.changes,
        "model.path": str(source),
        "model.factory": case.network.factory,
        "calibration.path": str(data),
    }
    if changes["evaluation"] == "named":
        reading = {
            key: changes[f"calibration.{key}"]
            for key in ("text_field", "chat_template")
            if f"calibration.{key}" in changes
        }
        changes["evaluation"] = [
            {"name": "rest", "path": str(data), "part": [0.6, 1.0], "num_sequences": 4, **reading}
        ]
    if changes["runtime.work_dir"] is not None:
        changes["runtime.work_dir"] = str(folder / "work")
    if "compression.size" not in changes:
        changes["compression.size"] = None
    return changes
