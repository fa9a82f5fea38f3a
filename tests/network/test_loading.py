"""These tests call `lrc_cli.load` on modules that are not transformers'."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_helpers import (
    FORMS,
    Form,
    layer_table,
    mapped_file,
    multiply_out,
    random_factors,
    with_factors,
)
from safetensors.torch import save_file
from torch import nn

from lrc_cli.errors import InputError
from lrc_cli.network.layouts import linear_shape
from lrc_cli.network.loading import load
from lrc_cli.network.low_rank.modules import LowRankModule
from lrc_cli.network.low_rank.stored import dense_weight, stored_layers

X = torch.linspace(-1, 1, 24 * 5).view(5, 24)


class Mlp(nn.Module):
    """Two linear layers around a layer that is used twice, with a tensor that no file holds."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(24, 32)
        self.shared = nn.Linear(32, 32)
        self.again = self.shared
        self.last = nn.Linear(32, 16, bias=False)
        self.register_buffer("scale", torch.full((16,), 0.5), persistent=False)
        self.register_buffer("offset", torch.zeros(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.again(torch.relu(self.shared(torch.relu(self.first(x)))))
        return self.last(x) * self.scale + self.offset


def plain() -> nn.Module:
    """Builds a module whose tensors are all in its checkpoint."""
    return nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 16))


def needs_values() -> nn.Module:
    """Builds a module; the construction reads a tensor's value."""
    return nn.Sequential(nn.Linear(24, int(torch.tensor(32.0))), nn.ReLU(), nn.Linear(32, 16))


def needs_argument(width: int) -> nn.Module:
    return nn.Linear(width, width)


def no_module() -> Any:
    return "no module"


def fails() -> nn.Module:
    return nn.Linear({}["width"], 4)


def write(directory: Path, form: Form, record: dict[str, Any] | None = None) -> Mlp:
    """Writes a factorised checkpoint of an Mlp, and returns the dense model that it must equal."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = Mlp().eval()
    state = {k: t.clone() for k, t in model.state_dict().items() if not k.startswith("again")}
    state["offset"] = torch.randn(16, generator=generator)
    factors = {
        "first": random_factors(32, 24, form, generator),
        "shared": random_factors(32, 32, form, generator),
        "last": random_factors(16, 32, form, generator),
    }
    note = {
        "format_version": 1,
        "layers": layer_table(factors, form),
        "factory": f"{__name__}:Mlp",
    }
    directory.mkdir(exist_ok=True)
    metadata = {"format": "pt", "lrc": json.dumps(note | (record or {}))}
    save_file(with_factors(state, factors), directory / "model.safetensors", metadata)
    products = {f"{name}.weight": multiply_out(parts) for name, parts in factors.items()}
    model.load_state_dict(state | products, strict=False)
    return model


@pytest.mark.parametrize("form", FORMS)
def test_factorised_module_equals_the_dense_one(tmp_path: Path, form: str) -> None:
    dense = write(tmp_path, FORMS[form])
    for factory in (Mlp, f"{__name__}:Mlp"):
        model = load(tmp_path, factory=factory)
        torch.testing.assert_close(model(X), dense(X), rtol=1e-4, atol=1e-5)
    assert {name for name, _ in stored_layers(model)} == {"first", "shared", "last"}
    assert model.again is model.shared and isinstance(model.shared, LowRankModule)
    assert not model.training
    for name, layer in stored_layers(model):
        torch.testing.assert_close(dense_weight(layer), dense.get_submodule(name).weight)


@pytest.mark.parametrize("factory", [plain, needs_values])
def test_dense_file_loads(tmp_path: Path, factory: Callable[[], nn.Module]) -> None:
    model = factory()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    for path in (tmp_path, tmp_path / "weights.safetensors"):
        loaded = load(path, factory=factory)
        assert torch.equal(loaded(X), model(X))
        for parameter in loaded.parameters():
            assert parameter.requires_grad
            assert mapped_file(parameter) == str(tmp_path.resolve() / "weights.safetensors")
    assert load(tmp_path, factory=factory, dtype=torch.float64)(X.double()).dtype == torch.float64


def test_shards_are_found_by_their_index(tmp_path: Path) -> None:
    model = plain()
    names = {"0": "a.safetensors", "2": "b.safetensors"}
    weight_map = {key: names[key[0]] for key in model.state_dict()}
    for file in names.values():
        part = {k: t for k, t in model.state_dict().items() if weight_map[k] == file}
        save_file(part, tmp_path / file)
    save_file({"stray": torch.zeros(1)}, tmp_path / "other.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert torch.equal(load(tmp_path, factory=plain)(X), model(X))


def tied() -> nn.Module:
    model = nn.ModuleDict({"embedding": nn.Embedding(8, 4), "head": nn.Linear(4, 8, False)})
    model["head"].weight = model["embedding"].weight
    return model


@pytest.mark.parametrize("twice", [False, True])
def test_tied_parameters_stay_tied(twice: bool, tmp_path: Path) -> None:
    table = torch.randn(8, 4)
    copy = {"head.weight": table.clone()} if twice else {}
    save_file({"embedding.weight": table} | copy, tmp_path / "model.safetensors")
    model = load(tmp_path, factory=tied)
    assert model["head"].weight is model["embedding"].weight
    assert torch.equal(model["head"].weight, table)


def test_tied_parameters_that_differ_in_the_files_are_refused(tmp_path: Path) -> None:
    state = {"embedding.weight": torch.randn(8, 4), "head.weight": torch.randn(8, 4)}
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"embedding.weight and head.weight are one tensor.*untie"):
        load(tmp_path, factory=tied)


class WithExtra(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"scale": 2.0}


def test_an_extra_state_is_refused_in_one_sentence(tmp_path: Path) -> None:
    save_file(nn.Linear(4, 4).state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"get_extra_state returns _extra_state.*let the factory"):
        load(tmp_path, factory=lambda: WithExtra(4, 4))


def test_a_recorded_factory_is_not_run_unasked(tmp_path: Path) -> None:
    write(tmp_path, FORMS["factors"])
    with pytest.raises(InputError, match=r"not run unasked.*factory=.*test_loading:Mlp"):
        load(tmp_path)


def test_factory_beside_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "from torch import nn\n\ndef build():\n    return nn.Linear(4, 4)\n"
    (tmp_path / "local_factory.py").write_text(code)
    save_file(nn.Linear(4, 4).state_dict(), tmp_path / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    assert isinstance(load(tmp_path, factory="local_factory:build"), nn.Linear)


@pytest.mark.parametrize(
    ("factory", "cause"),
    [
        ("no_colon", "has no colon"),
        ("no_such_package:build", "cannot be imported"),
        (f"{__name__}:absent", "cannot be imported"),
        (f"{__name__}:X", "is not callable"),
        (f"{__name__}:no_module", "returned str"),
        (f"{__name__}:needs_argument", "called without arguments"),
        (f"{__name__}:plain", "no place for"),
        (f"{__name__}:fails", "failed: KeyError: 'width'"),
        ("broken_factory:build", r"cannot be imported: SyntaxError: .*line 1"),
        ("leaving_factory:build", r"cannot be imported: SystemExit: 3"),
    ],
)
def test_wrong_factory_is_explained(
    tmp_path: Path, factory: str, cause: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_factory.py").write_text("def build(:\n")
    (tmp_path / "leaving_factory.py").write_text("raise SystemExit(3)\n")
    monkeypatch.syspath_prepend(tmp_path)
    write(tmp_path, FORMS["factors"])
    with pytest.raises(InputError, match=cause):
        load(tmp_path, factory=factory)


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    state = plain().state_dict()
    file = tmp_path / "model.safetensors"
    save_file({k: t for k, t in state.items() if k != "2.bias"}, file)
    with pytest.raises(InputError, match=r"lack 2\.bias"):
        load(file, factory=plain)
    save_file(state | {"2.bias": torch.zeros(3)}, file)
    with pytest.raises(InputError, match=r"2\.bias has shape \(3,\).*\(16,\)"):
        load(file, factory=plain)
    file.write_bytes(b"not safetensors")
    with pytest.raises(InputError, match="not a readable safetensors file"):
        load(file, factory=plain)
    file.unlink()
    with pytest.raises(InputError, match=r"neither a config\.json nor"):
        load(tmp_path, factory=plain)


def test_newer_version_and_contradicting_table_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "newer", FORMS["rows"], {"format_version": 2})
    with pytest.raises(InputError, match=r"version 2.*pip install --upgrade"):
        load(tmp_path / "newer", factory=Mlp)
    table = {"first": {"storage": "interpolative", "rank": 3, "block": 1}}
    write(tmp_path / "table", FORMS["rows"], {"layers": table})
    with pytest.raises(InputError, match=r"first.*rank 3.*16"):
        load(tmp_path / "table", factory=Mlp)


def test_linear_shape_knows_what_can_be_factorised() -> None:
    assert linear_shape(nn.Linear(3, 5)) == (5, 3)
    assert linear_shape(nn.Embedding(3, 5)) == (5, 3)  # of one-hot rows
    assert linear_shape(nn.Bilinear(3, 3, 5)) is None
    # MultiheadAttention multiplies by this weight itself.
    assert linear_shape(nn.MultiheadAttention(4, 2).out_proj) is None
