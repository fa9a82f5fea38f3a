"""These tests take a form from outside the package, without factors, all the way of a job.

The form keeps W in steps of a scale per row, two whole numbers in a byte. No spectrum tells the
error of the form.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
import transformers
from pico import Models, PlainFolder
from torch import Tensor, nn

import lrc_cli
from lrc_cli.config.compression import STORAGES as ALLOWED
from lrc_cli.engine import STORAGES, Choice, Errors, Metric, Predicted, Storage, Stored
from lrc_cli.errors import InputError
from lrc_cli.forms import FORMS, Form, Packed
from lrc_cli.network.low_rank.stored import FormLayer, dense_weight, stored_layers

NAME, ENDS = "nibbles", ("weight", "scale", "zero")


def steps(weight: Tensor) -> dict[str, Tensor]:
    """Returns codes 0..15, two inputs a byte (m, n / 2 rounded up), scales and zero points."""
    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    scale = ((high - low) / 15).clamp(min=1e-8).float()
    zero = (-low / scale).round().to(torch.int32)
    codes = (weight / scale + zero).round().clamp(0, 15).to(torch.uint8)
    codes = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2))
    return {"weight": codes[:, ::2] * 16 + codes[:, 1::2], "scale": scale, "zero": zero}


class Nibbles(Form):
    name = NAME
    tensors = ENDS
    table_keys = ("bits",)

    def dense(self, packed: Packed) -> Tensor:
        codes = packed.tensors["weight"]
        pairs = torch.stack([codes // 16, codes % 16], dim=2).flatten(1)[:, : packed.shape[1]]
        return (pairs.double() - packed.tensors["zero"]) * packed.tensors["scale"].double()


class StoreNibbles(Storage):
    name = NAME
    is_measured = True

    def __init__(self) -> None:
        self.measurements = 0

    def choices(
        self,
        shape: tuple[int, int],
        itemsize: int,
        predicted: Predicted,
        *,
        rank_multiple: int,
        extra: int = 0,
    ) -> list[Choice]:
        m, n = shape
        error = 0.0 if predicted.measured is None else predicted.measured[0].item()
        return [Choice(NAME, None, m * (-(-n // 2) + 8) + extra, error)]

    def measure(self, weight: Tensor, metric: Metric, dtype: torch.dtype) -> Sequence[Errors]:
        self.measurements += 1
        return [Errors(*metric.errors(weight - FORMS[NAME].dense(packed(weight))))]

    def pack(
        self, problem: Any, choice: Choice, dtype: torch.dtype, *, rank_multiple: int = 1
    ) -> Stored:
        aim = problem.solve(min(problem.weight.shape)).aim
        found = packed(aim)
        errors = problem.errors(FORMS[NAME].dense(found))
        return Stored(packed=found, errors=errors, reason="nibbles as asked for")


def packed(weight: Tensor) -> Packed:
    m, n = weight.shape
    return Packed(form=NAME, shape=(m, n), tensors=steps(weight), parameters={"bits": 4})


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[StoreNibbles]:
    storage = StoreNibbles()
    monkeypatch.setitem(FORMS, NAME, Nibbles())
    monkeypatch.setitem(STORAGES, NAME, storage)
    ALLOWED.append(NAME)
    yield storage
    ALLOWED.remove(NAME)


def changes(
    model: str, checkpoint: Models, text: Path, plain_folder: PlainFolder
) -> dict[str, Any]:
    asked: dict[str, Any] = {
        "compression.storage": NAME,
        "compression.size": 0.6,
        "compression.sequential": False,
    }
    if model == "llama":
        return asked | {"model.path": str(checkpoint(model)), "calibration.path": str(text)}
    # Some layers are stored as factors, because forms can be mixed.
    mixed = {"compression.layers": {"*head*": {"storage": "auto"}}}
    return asked | mixed | plain_folder.model(model) | {"compression.method": "frobenius"}


def rebuilt(state: dict[str, Tensor], layers: dict[str, Any], shapes: Any) -> dict[str, Tensor]:
    """Returns the dense state that the module's docstring describes."""
    dense = pico.rebuilt({k: t for k, t in state.items()})
    for layer, entry in layers.items():
        if entry["storage"] != NAME:
            continue
        tensors = {end: dense.pop(f"{layer}.{end}") for end in ENDS}
        codes = state[f"{layer}.weight"].long()
        shape = shapes[f"{layer}.weight"].shape
        pairs = torch.stack([codes // 16, codes % 16], dim=2).flatten(1)
        matrix = (pairs[:, : shape[1:].numel()] - tensors["zero"]) * tensors["scale"]
        dense[f"{layer}.weight"] = matrix.reshape(shape).float()
    return dense


@pytest.mark.parametrize("model", ["llama", "pictures"])
def test_it_is_written_loaded_verified_resumed_and_saved_again(
    model: str,
    tmp_path: Path,
    checkpoint: Models,
    text: Path,
    plain_folder: PlainFolder,
    registered: StoreNibbles,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = changes(model, checkpoint, text, plain_folder)
    if model == "pictures":
        monkeypatch.chdir(plain_folder.path)
    output, report = pico.compressed(tmp_path, asked)
    rows = {x["name"]: x for x in report["layers"] if x["storage"] == NAME}
    assert rows and registered.measurements == len(report["layers"])
    for row in rows.values():
        errors = row["errors"]
        assert row["parameters"] == {"bits": 4} and "rank" not in row
        assert errors["metric"]["optimum"] is None and errors["output"]["svd"] is None
        assert 0 < errors["output"]["stored"] < 0.5
    assert report["target"]["met"]

    # Every loader gives the outputs of the matrices that the tensors stand for.
    state = pico.read_state(output)
    source = pico.read_state(Path(asked["model.path"]))
    factory = asked.get("model.factory")
    loaded = lrc_cli.load(output, factory=factory, dtype="float32")
    dense = lrc_cli.load(asked["model.path"], factory=factory, dtype="float32")
    table = layer_table(output)
    assert {k for k, entry in table.items() if entry["storage"] == NAME} == set(rows)
    missing = dense.load_state_dict(rebuilt(state, table, source), strict=False)
    assert not missing.unexpected_keys
    assert_alike(model, loaded, dense)
    found = {name: x for name, x in stored_layers(loaded) if isinstance(x, FormLayer)}
    assert found.keys() == rows.keys()
    for name, layer in found.items():
        assert layer.table_entry() == {"storage": NAME, "bits": 4}
        matrix = dense.get_submodule(name).get_parameter("weight").flatten(1)
        torch.testing.assert_close(dense_weight(layer), matrix)

    # Verify has no reader for the form, so its tensors are not checked and nothing fails.
    against = ["--against", asked["model.path"]]
    against += ["--factory", factory] if factory else []
    for options in ([], against):
        ended = pico.call("verify", output, *options, "--json")
        statements = json.loads(ended.out)["statements"]
        told = [x for x in statements if NAME in x["detail"]]
        assert ended.code == 0, [x for x in statements if x["status"] == "fails"]
        assert {x["status"] for x in told} == {"not checked"}
        assert {"table", "layers.shape", "size"} <= {x["id"] for x in told}

    # A second run finds all units, and measures nothing again.
    before = registered.measurements
    shutil.rmtree(output)
    again, _ = pico.compressed(tmp_path, asked)
    assert registered.measurements == before
    assert all(torch.equal(state[key], t) for key, t in pico.read_state(again).items() if t.dim())


def layer_table(output: Path) -> dict[str, Any]:
    config = output / "config.json"
    if config.exists():
        return json.loads(config.read_text())["quantization_config"]["layers"]
    from safetensors import safe_open

    with safe_open(output / "model.safetensors", framework="pt") as handle:
        return json.loads(handle.metadata()["lrc"])["layers"]


def assert_alike(model: str, one: nn.Module, other: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        if model == "llama":
            ids = torch.randint(5, 90, (2, 12), generator=generator)
            pair = one(ids).logits, other(ids).logits
        else:
            pixels = torch.randn(2, 3, 12, 10, generator=generator)
            pair = one(pixels), other(pixels)
    torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-4)


TARGETS: dict[str, dict[str, Any]] = {
    "sequential": {
        "compression.size": 0.35,
        "compression.sequential": True,
        "calibration.num_sequences": 60,
    },
    "layer error": {"compression.size": None, "compression.max_layer_error": 0.2},
    "tied table": {
        "compression.size": 0.35,
        "compression.embeddings": True,
        "compression.exclude": [],
    },
}


@pytest.mark.parametrize("target", TARGETS)
def test_other_targets_take_it(
    target: str, tmp_path: Path, checkpoint: Models, text: Path, plain_folder: PlainFolder
) -> None:
    asked = changes("llama", checkpoint, text, plain_folder) | TARGETS[target]
    _, report = pico.compressed(tmp_path, asked)
    stored = [x for x in report["layers"] if x["storage"] == NAME]
    assert len(stored) >= 12 and report["target"]["met"]
    assert any(x.get("sequential") for x in stored) is (target == "sequential")
    ended = pico.call("verify", tmp_path / "out", "--against", asked["model.path"])
    assert ended.code == 0, ended.out
    ended = pico.call("plan", tmp_path / "job.yaml")
    assert ended.code == 0 and "layers stay dense" in ended.out, ended.err


def test_transformers_loads_saves_and_multiplies_it_out(
    tmp_path: Path, checkpoint: Models, text: Path, plain_folder: PlainFolder
) -> None:
    output, _ = pico.compressed(tmp_path, changes("llama", checkpoint, text, plain_folder))
    model = transformers.AutoModelForCausalLM.from_pretrained(output)
    parts = [x for _, x in stored_layers(model)]
    dtypes = {name: x.dtype for name, x in parts[0].packed().tensors.items()}
    assert dtypes == {"weight": torch.uint8, "scale": torch.float32, "zero": torch.int32}
    model.save_pretrained(tmp_path / "again")
    state, saved = pico.read_state(output), pico.read_state(tmp_path / "again")
    assert state.keys() == saved.keys()
    assert all(torch.equal(state[key], tensor) for key, tensor in saved.items())
    ids = torch.arange(5, 17)[None]
    with torch.no_grad():
        wanted = model(ids).logits
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
        assert torch.equal(again(ids).logits, wanted)
        plain_model = model.dequantize()
        assert not list(stored_layers(plain_model))
        torch.testing.assert_close(plain_model(ids).logits, wanted, rtol=0.05, atol=0.05)


def test_a_form_that_is_not_known_is_one_sentence(
    tmp_path: Path,
    checkpoint: Models,
    text: Path,
    plain_folder: PlainFolder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output, _ = pico.compressed(tmp_path, changes("llama", checkpoint, text, plain_folder))
    monkeypatch.delitem(FORMS, NAME)
    with pytest.raises(InputError, match=r"is stored as nibbles, .*knows factors and") as e:
        lrc_cli.load(output)
    assert "upgrade" in e.value.remedy


def test_its_numbers_are_not_trained(
    tmp_path: Path,
    checkpoint: Models,
    text: Path,
    plain_folder: PlainFolder,
    registered: StoreNibbles,
) -> None:
    asked = changes("llama", checkpoint, text, plain_folder) | {"recover.scope": "model"}
    ended = pico.call("compress", pico.job(tmp_path, asked))
    assert ended.code == 2 and f"compression.storage: {NAME} cannot be trained" in ended.err


def test_a_form_of_the_dense_shape_is_refused(
    tmp_path: Path,
    checkpoint: Models,
    text: Path,
    plain_folder: PlainFolder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another loader would take the codes for weights."""
    monkeypatch.setattr(
        Nibbles, "on_disk", lambda *_: {"weight": torch.zeros(_[1].shape, dtype=torch.uint8)}
    )
    asked = changes("llama", checkpoint, text, plain_folder)
    ended = pico.call("compress", pico.job(tmp_path, asked))
    assert ended.code == 1 and "would take for the dense weight" in ended.err
