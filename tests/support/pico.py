"""Tiny random checkpoints are made with tokenizers and texts, and `lrc` is run on them.

Random weights have no low-rank structure: they show mechanics, never quality.
"""

import contextlib
import functools
import io
import json
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from hf_helpers import multiply_out
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from lrc_cli.cli import lrc, run_command

Models = Callable[[str], Path]
"""The fixture `checkpoint`: a name of MODELS -> the directory of that model."""

State = dict[str, Tensor]
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
VOCABULARY = [*SPECIAL, *(f"w{i}" for i in range(91))]
LENGTH = 32
"""The tokens of a sequence in the configs below."""

_DECODER: dict[str, Any] = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
_BERT: dict[str, Any] = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def words(count: int, seed: int = 0) -> str:
    """Returns text of `count` words, each likely to be followed by one of three others."""
    chance = random.Random(seed)
    plain = VOCABULARY[len(SPECIAL) :]
    index, chosen = 0, []
    for _ in range(count):
        step = chance.choice((1, 7, 30)) if chance.random() < 0.8 else chance.randrange(len(plain))
        index = (index + step) % len(plain)
        chosen.append(plain[index])
    return " ".join(chosen)


def write_tokenizer(directory: Path, *, wraps: bool = False) -> None:
    """Writes a tokenizer with a token per word; with `wraps`, sequences become [CLS] ... [SEP]."""
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if wraps:
        core.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="[UNK]",
        pad_token="[PAD]",
        **({"mask_token": "[MASK]", "cls_token": "[CLS]", "sep_token": "[SEP]"} if wraps else {}),
    )
    tokenizer.save_pretrained(directory)


def write_character_tokenizer(directory: Path) -> None:
    """Writes a byte-pair tokenizer: transformers takes no other kind from a Qwen2 checkpoint."""
    pieces = [*SPECIAL, *"w0123456789", "Ġ", "Ġw"]
    core = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [("Ġ", "w")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]").save_pretrained(directory)


def write_large_tokenizer(directory: Path) -> None:
    """Writes a tokenizer with more words than any pico model has embeddings."""
    numbers = {word: 1000 - i for i, word in enumerate(VOCABULARY)}
    core = Tokenizer(models.WordLevel(numbers, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]").save_pretrained(directory)


def _llama(**changes: Any) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**{**_DECODER, "tie_word_embeddings": True, **changes}))


def _qwen() -> PreTrainedModel:
    return Qwen2ForCausalLM(Qwen2Config(**_DECODER, tie_word_embeddings=False))


def _opt() -> PreTrainedModel:
    """Returns a model with a ReLU between fc1 and fc2 of its blocks, and biases in its layers."""
    changes = {"ffn_dim": 96, "word_embed_proj_dim": 64, "dropout": 0.0}
    return OPTForCausalLM(OPTConfig(**{**_DECODER, **changes}))


def _bert(kind: type[PreTrainedModel], **changes: Any) -> PreTrainedModel:
    return kind(BertConfig(**_BERT, **changes))


MODELS: dict[str, tuple[Callable[[], PreTrainedModel], torch.dtype, str]] = {
    "llama": (_llama, torch.bfloat16, "5GB"),
    "llama-fp16": (_llama, torch.float16, "5GB"),
    "llama-long": (functools.partial(_llama, num_hidden_layers=12), torch.float32, "5GB"),
    "qwen2": (_qwen, torch.float32, "100KB"),
    "opt": (_opt, torch.bfloat16, "5GB"),
    "bert": (functools.partial(_bert, BertModel), torch.float32, "5GB"),
    "bert-mlm": (functools.partial(_bert, BertForMaskedLM), torch.float32, "5GB"),
    "bert-classifier": (
        functools.partial(_bert, BertForSequenceClassification, num_labels=3),
        torch.float32,
        "5GB",
    ),
}
"""The models by name: a function that builds one, its dtype on the disk, the size of its shards."""


def write_model(directory: Path, name: str) -> Path:
    """Saves a random model of MODELS with its tokenizer and a licence."""
    build, dtype, shard_size = MODELS[name]
    torch.manual_seed(0)
    model = build()
    randomise(model)
    model.to(dtype).save_pretrained(directory, max_shard_size=shard_size)
    if name == "qwen2":
        write_character_tokenizer(directory)
    else:
        write_tokenizer(directory, wraps=name.startswith("bert"))
    (directory / "LICENSE").write_text("free to use\n")
    return directory


def randomise(model: nn.Module) -> None:
    """Makes weights large enough for every layer to matter, and biases that are not zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim < 2:
                parameter.add_(0.1 * noise)
            elif "embed" not in name:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
            else:
                parameter.copy_(0.3 * noise)


FACTORY_SOURCE = '''
import torch
from torch import nn


class Attention(nn.Module):
    """A block that mixes positions, padding left out."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(24, 24, bias=False) for _ in range(3))
        self.out = nn.Linear(24, 16)

    def forward(self, x, attention_mask):
        scores = self.query(x) @ self.key(x).mT / 5
        scores = scores.masked_fill(attention_mask[:, None, :] == 0, torch.finfo(scores.dtype).min)
        return self.out(scores.softmax(-1) @ self.value(x))


class WithIdle(nn.Module):
    """One layer is never reached, one has no influence on the output."""

    def __init__(self):
        super().__init__()
        self.used, self.idle = nn.Linear(24, 16), nn.Linear(24, 16)
        self.detached, self.head = nn.Linear(24, 16), nn.Linear(16, 16)

    def forward(self, x):
        return self.head(torch.relu(self.used(x)) + 0 * self.detached(x).detach())


class Pictures(nn.Module):
    """Convolutions of several kinds, with activations that change their outputs in place."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 12, 3, stride=2, padding=1, padding_mode="reflect", bias=False)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.second = nn.Conv2d(12, 16, (3, 1), padding="same", dilation=(2, 1))
        self.along = nn.Conv1d(16, 12, 3, padding=2)
        self.head = nn.Linear(12, 5)

    def forward(self, pixels):
        x = torch.relu_(self.first(pixels))
        x = torch.relu_(self.second(x + self.depthwise(x)))
        x = torch.relu_(self.along(x.mean(3)))
        return self.head(x.amax(2))


class Recurrent(nn.Module):
    """An LSTM in both directions, a GRU of two layers, and a projected LSTM, which stays dense."""

    def __init__(self):
        super().__init__()
        self.first = nn.LSTM(24, 16, bidirectional=True, batch_first=True)
        self.second = nn.GRU(32, 20, num_layers=2, bias=False)
        self.projected = nn.LSTM(20, 12, proj_size=4, batch_first=True)
        self.head = nn.Linear(24, 5)

    def forward(self, x, attention_mask):
        y, (h, c) = self.first(x * attention_mask[..., None])
        z, last = self.second(y.transpose(0, 1))
        z, _ = self.projected(z.transpose(0, 1))
        return self.head(torch.cat([z[:, -1], last[-1]], dim=-1)) + c.mean((0, 2))[:, None]


class Packed(nn.Module):
    """As sequences of given lengths: a GRU in both directions that never sees padding."""

    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(24, 16, bidirectional=True, batch_first=True)
        self.head = nn.Linear(32, 5)

    def forward(self, x, attention_mask):
        lengths = attention_mask.sum(1).cpu()
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, True, enforce_sorted=False)
        _, last = self.gru(packed)
        return self.head(last.transpose(0, 1).flatten(1))


class Padded(nn.Module):
    """An LSTM that runs over padding too, and is read at the last step that is none."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(24, 16, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x, attention_mask):
        y, _ = self.lstm(x)
        last = attention_mask.sum(1) - 1
        return self.head(y[torch.arange(len(y), device=y.device), last])


def mlp():
    layers = nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 8)
    return nn.Sequential(*layers)


def attention():
    return Attention()


def pictures():
    return Pictures()


def with_idle():
    return WithIdle()


def recurrent():
    return Recurrent()


def packed():
    return Packed()


def padded():
    return Padded()
'''


@dataclass(frozen=True, kw_only=True)
class PlainFolder:
    """Holds a working directory with factories, a checkpoint for each and calibration tensors."""

    path: Path

    def model(self, name: str) -> dict[str, Any]:
        """Returns changes that make a config use the checkpoint of the factory `name`."""
        masked = dict.fromkeys(("attention", "recurrent", "packed", "padded"), "masked")
        data = {"pictures": "pixels", **masked}.get(name, "rows")
        return {
            "model.path": str(self.path / f"{name}.safetensors"),
            "model.factory": f"pico_factories:{name}",
            "calibration.path": str(self.path / f"{data}.safetensors"),
            "calibration.num_sequences": 40,
            "evaluation": None,
        }


def write_plain(directory: Path) -> PlainFolder:
    """Writes pico_factories.py, its checkpoints, and tensors with and without a padding mask."""
    (directory / "pico_factories.py").write_text(FACTORY_SOURCE)
    namespace: dict[str, Any] = {}
    exec(FACTORY_SOURCE, namespace)
    generator = torch.Generator().manual_seed(5)
    for name in ("mlp", "attention", "pictures", "with_idle", "recurrent", "packed", "padded"):
        model = namespace[name]()
        randomise(model)
        save_file(model.state_dict(), directory / f"{name}.safetensors")
    colour = torch.randn(24, 24, generator=generator)
    rows = torch.randn(64, 24, generator=generator) @ colour
    save_file({"x": rows}, directory / "rows.safetensors")
    pixels = torch.randn(64, 3, 12, 10, generator=generator).cumsum(2).cumsum(3) / 10
    save_file({"pixels": pixels}, directory / "pixels.safetensors")
    lengths = torch.randint(3, 11, (64,), generator=generator)
    mask = (torch.arange(10)[None] < lengths[:, None]).long()
    x = torch.randn(64, 10, 24, generator=generator) @ colour
    save_file({"x": x, "attention_mask": mask}, directory / "masked.safetensors")
    return PlainFolder(path=directory)


def job(directory: Path, changes: dict[str, Any]) -> Path:
    """Writes `directory/job.yaml`: a small default job with dotted keys changed.

    The output is `directory/out` unless changed.
    """
    values: dict[str, Any] = {
        "calibration.num_sequences": 12,
        "calibration.sequence_length": LENGTH,
        "calibration.part": [0.0, 0.6],
        "output.path": str(directory / "out"),
        "runtime.dtype": "float32",  # what auto resolves to depends on the machine
        "compression.size": 0.6,
        **changes,
    }
    text = values.get("calibration.path")
    if str(text).endswith(".safetensors"):
        values["calibration.part"] = None
    elif "evaluation" not in values:
        values["evaluation"] = [
            {"name": "rest", "path": text, "part": [0.6, 1.0], "num_sequences": 4}
        ]
    if {"compression.max_layer_error", "compression.max_loss_increase"} & set(changes):
        values.pop("compression.size")
    tree: dict[str, Any] = {}
    for dotted, value in values.items():
        section, _, key = dotted.partition(".")
        if key:
            tree.setdefault(section, {})[key] = value
        else:
            tree[section] = value
    file = directory / "job.yaml"
    file.write_text(yaml.safe_dump(tree, sort_keys=False))
    return file


@dataclass(frozen=True, kw_only=True)
class Ended:
    """Says how a command ended."""

    code: int
    out: str
    err: str


def call(*arguments: object) -> Ended:
    """Runs `lrc` in this process, as its console script does."""
    out, err = io.StringIO(), io.StringIO()
    command = functools.partial(lrc, args=[str(argument) for argument in arguments])
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run_command(command)
    return Ended(code=code, out=out.getvalue(), err=err.getvalue())


def compressed(directory: Path, changes: dict[str, Any], *options: str) -> tuple[Path, Any]:
    """Runs a job that must succeed; returns the output directory and its report."""
    ended = call("compress", job(directory, changes), *options)
    assert ended.code == 0, ended.err
    output = Path(ended.out.strip())
    return output, json.loads((output / "report.json").read_text())


def read_state(path: Path) -> State:
    """Returns every tensor of a safetensors file, or of a directory's files."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    state: State = {}
    for file in files:
        with safe_open(file, framework="pt") as handle:
            state |= {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
    return state


def factorised_keys(state: Iterable[str]) -> list[str]:
    """Returns disk names of the factorised layers of a state."""
    return [key.removesuffix(".up.weight") for key in state if key.endswith(".up.weight")]


def rebuilt(state: State) -> State:
    """Returns the dense float32 state that a compressed state stands for, as in format.md."""
    dense = {key: tensor for key, tensor in state.items()}
    for layer in factorised_keys(state):
        # A parameter of a recurrent module keeps a name of its own.
        weight = f"{layer}.weight" if f"{layer}.weight" in dense else layer
        keys = {"weight": weight, "up.weight": f"{layer}.up.weight", "perm": f"{layer}.perm"}
        parts = {end: dense.pop(key) for end, key in keys.items() if key in dense}
        dense[weight] = multiply_out(parts)
    return {k: t.float() if t.is_floating_point() else t for k, t in dense.items()}
