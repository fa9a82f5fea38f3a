"""Tensors that no file holds are what the user's own code has, or the checkpoint is refused."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lrc_cli.errors import InputError
from lrc_cli.network.loading import load

WIDTH = 8
X = torch.linspace(-1, 1, 3 * WIDTH).view(3, WIDTH)


class Holder:
    """An object that is no module."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


class Net(nn.Module):
    """A linear layer between tensors that `make` gives to the module; `read` reads them."""

    def __init__(self, make: Callable[[nn.Module], None], read: Callable[[nn.Module], Tensor]):
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.read = read
        make(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.read(self)


def buffer(value: Callable[[], Tensor]) -> Callable[[nn.Module], None]:
    return lambda module: module.register_buffer("table", value(), persistent=False)


def attribute(value: Callable[[], object]) -> Callable[[nn.Module], None]:
    return lambda module: setattr(module, "table", value())


def of_parameters(module: nn.Module) -> None:
    module.register_buffer("table", module.layer.weight.detach()[0] * 2, persistent=False)


def by_init(module: nn.Module) -> None:
    module.register_buffer("table", torch.empty(WIDTH), persistent=False)
    nn.init.constant_(module.table, 3.0)


def seeded() -> Tensor:
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(5))


def reseeding() -> Tensor:
    torch.manual_seed(7)
    return torch.randn(WIDTH)


def mask() -> Tensor:
    return torch.full((WIDTH, WIDTH), float("-inf")).triu(1)


def a_table(module: nn.Module) -> Tensor:
    return module.table


Case = tuple[Callable[[nn.Module], None], Callable[[nn.Module], Tensor]]
SETTLED: dict[str, Case] = {
    "rotary": (buffer(lambda: 1.0 / 100 ** (torch.arange(WIDTH) / WIDTH)), a_table),
    "float64": (buffer(lambda: torch.arange(WIDTH, dtype=torch.float64)), a_table),
    "float16": (buffer(lambda: torch.ones(WIDTH, dtype=torch.float16) / 3), a_table),
    "positions": (buffer(lambda: torch.arange(WIDTH)), a_table),
    "a mask of truth": (buffer(lambda: torch.arange(WIDTH) > 3), a_table),
    "a mask of infinities": (buffer(mask), lambda m: m.table[-1]),
    "a NaN that is meant": (
        buffer(lambda: torch.tensor([1.0, float("nan")])), lambda m: m.table[0],
    ),
    "set by nn.init": (by_init, a_table),
    "of its own generator": (buffer(seeded), a_table),
    "of a seed that it sets": (buffer(reseeding), a_table),
    "from numpy": (buffer(lambda: torch.from_numpy(np.arange(8.0))), a_table),
    "an attribute": (attribute(lambda: torch.arange(WIDTH) / 3), a_table),
    "a list": (attribute(lambda: [torch.ones(WIDTH), torch.ones(1)]), lambda m: sum(m.table)),
    "a dictionary of tuples": (
        attribute(lambda: {"a": (torch.ones(WIDTH), 2)}), lambda m: m.table["a"][0],
    ),
    "a scalar": (buffer(lambda: torch.tensor(2.5)), a_table),
    "an empty one": (buffer(lambda: torch.empty(0)), lambda m: m.table.sum()),
    "an object": (
        attribute(lambda: Holder(torch.ones(WIDTH))), lambda m: m.table.value,
    ),
    "a second name of a module": (
        lambda m: setattr(m, "table", [m.layer]), lambda m: m.table[0].weight.sum(),
    ),
    "no tensor": (attribute(lambda: [1, "a", None]), lambda m: torch.zeros(1)),
}  # fmt: skip


@pytest.mark.parametrize("kind", SETTLED)
def test_a_factorys_tensors_are_the_constructors(kind: str, tmp_path: Path) -> None:
    make, read = SETTLED[kind]
    own = Net(make, read).eval()
    save_file(own.state_dict(), tmp_path / "net.safetensors")
    loaded = load(tmp_path / "net.safetensors", factory=lambda: Net(make, read))
    assert torch.equal(loaded(X), own(X))
    assert not torch.are_deterministic_algorithms_enabled()


UNSETTLED: dict[str, Callable[[nn.Module], None]] = {
    "random": buffer(lambda: torch.randn(WIDTH)),
    "random integers": buffer(lambda: torch.randint(0, 10**9, (WIDTH,))),
    "random signs": buffer(lambda: torch.rand(64) > 0.5),
    "not initialised": buffer(lambda: torch.empty(WIDTH)),
    "integers that are not initialised": buffer(lambda: torch.empty(WIDTH, dtype=torch.int64)),
    "an attribute": attribute(lambda: torch.randn(WIDTH)),
    "in an object": attribute(lambda: Holder(torch.randn(WIDTH))),
    "a module in a list": attribute(lambda: [nn.Linear(2, 2)]),
    "deep in an attribute": attribute(lambda: {"a": [torch.ones(2), (torch.randn(WIDTH),)]}),
    "by numpy": buffer(lambda: torch.from_numpy(np.random.rand(WIDTH))),
    "by Python": buffer(lambda: torch.tensor([random.random() for _ in range(WIDTH)])),
    "of parameters": of_parameters,
    "of a random length": buffer(lambda: torch.zeros(random.randrange(10**6))),
}


@pytest.mark.parametrize("kind", UNSETTLED)
def test_a_factorys_tensors_that_nobody_settles_are_refused(kind: str, tmp_path: Path) -> None:
    def build() -> nn.Module:
        return Net(UNSETTLED[kind], lambda m: torch.zeros(1))

    save_file(build().state_dict(), tmp_path / "net.safetensors")
    with pytest.raises(InputError, match=r"Net: table.* is in no file, .*persistent=True"):
        load(tmp_path / "net.safetensors", factory=build)


def test_a_second_name_of_a_parameter_is_refused(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return Net(lambda m: setattr(m, "table", [m.layer.weight]), lambda m: torch.zeros(1))

    save_file(build().state_dict(), tmp_path / "net.safetensors")
    with pytest.raises(InputError, match=r"Net: the attribute table\[0\] is a second name of"):
        load(tmp_path / "net.safetensors", factory=build)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_recurrent_modules_have_second_names_of_their_own(kind: str, tmp_path: Path) -> None:
    def build() -> nn.Module:
        return getattr(nn, kind)(WIDTH, WIDTH, batch_first=True)

    own = build().eval()
    save_file(own.state_dict(), tmp_path / "net.safetensors")
    loaded = load(tmp_path / "net.safetensors", factory=build)
    assert torch.allclose(loaded(X[None])[0], own(X[None])[0])


# ---------------------------------------------------------------- code that comes with a checkpoint

CONFIGURATION = """
from transformers import PretrainedConfig
class OwnConfig(PretrainedConfig):
    model_type = "own"
    def __init__(self, hidden_size=8, vocab_size=32, base=100.0, **more):
        self.hidden_size, self.vocab_size, self.base = hidden_size, vocab_size, base
        super().__init__(**more)
"""
MODEL = """
import math, torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from .configuration_own import OwnConfig
class Part(nn.Module):
    def __init__(self, config):
        super().__init__()
        n = config.hidden_size
        self.extra = 0.0
        PART
    def forward(self, x): return READ
class OwnForCausalLM(PreTrainedModel):
    config_class = OwnConfig
    CLASS
    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.parts = nn.ModuleList([Part(config), Part(config)])
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
    def _init_weights(self, module): pass
    def get_input_embeddings(self): return self.embed
    def forward(self, input_ids, attention_mask=None, **kwargs):
        x = self.embed(input_ids)
        for part in self.parts: x = part(x)
        return CausalLMOutput(logits=self.head(x.float()))
"""
FREQUENCIES = "1.0 / (config.base ** (torch.arange(n) / n))"
OWN_CODE = {
    "depends on the config": (
        f'self.register_buffer("t", {FREQUENCIES}, persistent=False)', "x + self.t", "",
    ),
    "float64": (
        'self.register_buffer("t", torch.arange(n).double() / 3, persistent=False)',
        "x + self.t", "",
    ),
    "positions": (
        'self.register_buffer("t", torch.arange(n).expand(1, -1), persistent=False)',
        "x + self.t", "",
    ),
    "an attribute": (f"self.t = {FREQUENCIES}", "x + self.t", ""),
    "a list": (f"self.t = [{FREQUENCIES}]", "x + self.t[0]", ""),
    "transformers' rotary table": (
        "from transformers import LlamaConfig\n"
        "        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding\n"
        "        own = LlamaConfig(hidden_size=16, num_attention_heads=1)\n"
        "        self.rotary = LlamaRotaryEmbedding(own)",
        "x + self.rotary(x, torch.arange(x.shape[1])[None])[1][..., :8]", "",
    ),
    "a recurrent module": (
        "self.t = torch.arange(8) / 3\n        self.r = nn.LSTM(n, n, batch_first=True)\n"
        "        for p in self.r.parameters(): nn.init.constant_(p, 0.1)",
        "self.r(x + self.t)[0]", r'_keys_to_ignore_on_load_missing = [r"\.r\."]',
    ),
    "a number read from a tensor": (
        "self.t = [float(x) for x in torch.linspace(0, 1, 8)]", "x + self.t[3]", "",
    ),
    "a buffer that may be missing": (
        'self.register_buffer("t", torch.arange(n) / 3)', "x + self.t",
        r'_keys_to_ignore_on_load_missing = [r"parts\.\d+\.t"]',
    ),
    "a parameter that may be missing": (
        "self.t = nn.Parameter(torch.arange(n) / 3, requires_grad=False)", "x + self.t",
        r'_keys_to_ignore_on_load_missing = [r"parts\.\d+\.t"]',
    ),
}  # fmt: skip


def write_own(directory: Path, part: str, read: str, more: str) -> None:
    """Writes a checkpoint with code of its own, whose tensors called `t` are in no file."""
    directory.mkdir()
    text = MODEL.replace("PART", part).replace("READ", read).replace("CLASS", more)
    (directory / "modeling_own.py").write_text(text)
    (directory / "configuration_own.py").write_text(CONFIGURATION)
    config = {
        "model_type": "own",
        "base": 50.0,
        "architectures": ["OwnForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_own.OwnConfig",
            "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
        },
    }
    (directory / "config.json").write_text(json.dumps(config))
    chance = torch.Generator().manual_seed(0)
    state = {"embed.weight": torch.randn(32, WIDTH, generator=chance),
             "head.weight": torch.randn(32, WIDTH, generator=chance)}  # fmt: skip
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})


def constructed(model: nn.Module) -> nn.Module:
    """Returns the model as its own code builds it, with the loaded weights."""
    own = type(model)(type(model).config_class(base=50.0)).eval()
    own.load_state_dict(model.state_dict(), strict=False)
    return own


@pytest.mark.parametrize("kind", OWN_CODE)
def test_a_checkpoints_own_code_has_its_own_tensors(kind: str, tmp_path: Path) -> None:
    write_own(tmp_path / f"m{abs(hash(kind))}", *OWN_CODE[kind])
    model = load(tmp_path / f"m{abs(hash(kind))}", trust_remote_code=True)
    ids = torch.arange(6)[None]
    assert torch.equal(model(ids).logits, constructed(model)(ids).logits)


UNSETTLED_CODE = {
    "random": ('self.register_buffer("t", torch.randn(n), persistent=False)', ""),
    "not initialised": ('self.register_buffer("t", torch.empty(n), persistent=False)', ""),
    "a random attribute": ("self.t = [torch.randn(n)]", ""),
    "a random parameter that may be missing": (
        "self.t = nn.Parameter(torch.randn(n))",
        r'_keys_to_ignore_on_load_missing = [r"parts\.\d+\.t"]',
    ),
}


@pytest.mark.parametrize("kind", UNSETTLED_CODE)
def test_a_checkpoints_own_code_may_not_draw_lots(kind: str, tmp_path: Path) -> None:
    part, more = UNSETTLED_CODE[kind]
    write_own(tmp_path / f"m{abs(hash(kind))}", part, "x", more)
    with pytest.raises(InputError, match=r"OwnForCausalLM: parts.0.t.*, parts.1.t.* in no file"):
        load(tmp_path / f"m{abs(hash(kind))}", trust_remote_code=True)
