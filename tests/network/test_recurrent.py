"""The matrices of LSTM and GRU are layers, from statistics to files and back."""

from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import lrc_cli
from lrc_cli.network.low_rank.stored import stored_layers
from lrc_cli.network.recurrent import Recurrent, RecurrentMatrix, unroll

KINDS: dict[str, tuple[type[nn.RNNBase], dict[str, Any]]] = {
    "lstm": (nn.LSTM, {}),
    "gru": (nn.GRU, {}),
    "lstm, deep": (nn.LSTM, {"num_layers": 3, "batch_first": True, "bias": False}),
    "gru, deep": (nn.GRU, {"num_layers": 2, "dropout": 0.3}),
    "lstm, both ways": (nn.LSTM, {"num_layers": 2, "bidirectional": True, "dropout": 0.5}),
    "gru, both ways": (nn.GRU, {"num_layers": 2, "bidirectional": True, "batch_first": True}),
}
LENGTHS = torch.tensor([3, 7, 1, 7])
FORMS = ["batch", "alone", "packed", "packed, sorted", "packed, of one length"]


def both(name: str) -> tuple[Any, Any]:
    """Returns torch's module of KINDS (5 inputs, 6 hidden units), and the module with layers."""
    torch.manual_seed(1)
    kind, settings = KINDS[name]
    wrapped = nn.Sequential(kind(5, 6, **settings)).eval()
    dense = wrapped[0]
    unroll(wrapped)
    assert isinstance(wrapped[0], Recurrent)
    return dense, wrapped[0]


def given(dense: nn.RNNBase, form: str) -> tuple[Any, int]:
    """Returns inputs in a form that torch's modules take, and the number of sequences."""
    if form == "alone":
        return torch.randn(7, 5), 0
    if form in ("packed", "packed, of one length"):
        lengths = LENGTHS if form == "packed" else torch.full((4,), 7)
        x = torch.randn(4, 7, 5)
        return pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False), 4
    if form == "packed, sorted":
        return pack_padded_sequence(torch.randn(7, 4, 5), LENGTHS.sort(descending=True)[0]), 4
    return torch.randn(4, 7, 5) if dense.batch_first else torch.randn(7, 4, 5), 4


def flat(value: Any) -> list[Tensor]:
    """Returns the tensors in a module's output."""
    if isinstance(value, Tensor):
        return [value]
    return [tensor for item in value if item is not None for tensor in flat(item)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", KINDS)
def test_computes_what_torchs_module_does(name: str, form: str) -> None:
    dense, ours = both(name)
    x, batch = given(dense, form)
    sides = dense.num_layers * (2 if dense.bidirectional else 1)
    shape = (sides, batch, 6) if batch else (sides, 6)
    h, c = torch.randn(shape), torch.randn(shape)
    for hx in (None, (h, c) if isinstance(dense, nn.LSTM) else h):
        wanted, got = dense(x, hx), ours(x, hx)
        assert isinstance(got[0], PackedSequence) == form.startswith("packed")
        for a, b in zip(flat(got), flat(wanted), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", KINDS)
def test_gradients_and_state_dicts_are_those_of_torchs_module(name: str) -> None:
    dense, ours = both(name)
    x, _ = given(dense, "batch")
    parameters = {k: nn.Parameter(t.clone()) for k, t in dense.state_dict().items()}
    torch.func.functional_call(dense, parameters, (x,))[0].square().sum().backward()
    ours(x)[0].square().sum().backward()
    state = ours.state_dict(keep_vars=True)
    assert state.keys() == parameters.keys()
    for key, parameter in parameters.items():
        assert parameter.grad is not None
        torch.testing.assert_close(state[key].grad, parameter.grad, rtol=1e-4, atol=1e-5)
    doubled = {key: 2 * tensor for key, tensor in ours.state_dict().items()}
    ours.load_state_dict(doubled)
    assert all(torch.equal(ours.state_dict()[key], doubled[key]) for key in doubled)


def test_dropout_acts_between_layers_in_training_only() -> None:
    dense, ours = both("gru, deep")
    x, _ = given(dense, "batch")
    assert torch.equal(ours(x)[0], ours(x)[0])
    ours.train()
    assert not torch.equal(ours(x)[0], ours(x)[0])


def test_what_is_not_torchs_own_stays() -> None:
    class Own(nn.LSTM):
        pass

    parts = [Own(3, 4), nn.RNN(3, 4), nn.LSTM(3, 4, proj_size=2), nn.Linear(3, 4)]
    model = nn.ModuleList(parts)
    unroll(model)
    assert list(model) == parts
    nn.utils.parametrizations.weight_norm(lstm := nn.LSTM(3, 4), "weight_hh_l0")
    unroll(wrapped := nn.Sequential(lstm))
    assert wrapped[0] is lstm


# ---------------------------------------------------------------- from a checkpoint to another


@pytest.fixture(autouse=True)
def in_folder(plain_folder: pico.PlainFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Factories are found from the working directory."""
    monkeypatch.chdir(plain_folder.path)


def outputs(model: nn.Module, folder: pico.PlainFolder) -> Tensor:
    data = pico.read_state(folder.path / "masked.safetensors")
    with torch.no_grad():
        y: Tensor = model.float()(data["x"], data["attention_mask"])
    return y


FIRST = {f"first.weight_{kind}_l0{way}" for kind in ("ih", "hh") for way in ("", "_reverse")}
SECOND = {f"second.weight_{kind}_l{layer}" for kind in ("ih", "hh") for layer in (0, 1)}
GRU = {name.replace("first", "gru") for name in FIRST}
EVEN = {"compression.allocation": "uniform", "compression.rank_multiple": 1}
LESS = {"compression.size": 0.3}  # bfloat16 alone halves what is stored in float32
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "curvature, certified": ("recurrent", {"certification.num_sequences": 16}),
    "curvature, sequential": (
        "recurrent",
        {
            "compression.sequential": True,
            "compression.correction": 1,
            "calibration.num_sequences": 64,
            # This layer's 32 inputs are too many for the tokens, and it has too much of the weights
            # to be passed over.
            "compression.layers": {"second.weight_ih_l0": {"method": "svd"}},
        },
    ),
    "frobenius, centred": (
        "recurrent",
        {"compression.method": "frobenius", "compression.center": True},
    ),
    "svd": ("recurrent", {"compression.method": "svd"}),
    "bfloat16": ("recurrent", {"output.dtype": "bfloat16"} | LESS),
    "packed": ("packed", {"certification.num_sequences": 16}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_recurrent_network_is_compressed_loaded_and_verified(
    plain_folder: pico.PlainFolder, tmp_path: Path, variant: str
) -> None:
    name, settings = VARIANTS[variant]
    factory, checkpoint = f"pico_factories:{name}", plain_folder.path / f"{name}.safetensors"
    output, report = pico.compressed(tmp_path, plain_folder.model(name) | EVEN | settings)
    matrices = {x["name"]: x for x in report["layers"] if x["kind"] == "RecurrentMatrix"}
    assert matrices.keys() == ((FIRST | SECOND) if name == "recurrent" else GRU)
    assert all(row["storage"] != "dense" for row in matrices.values())
    loaded = lrc_cli.load(output, factory=factory)
    assert {name for name, _ in stored_layers(loaded)} >= matrices.keys()
    dense = lrc_cli.load(checkpoint, factory=factory)
    assert not any(isinstance(part, Recurrent) for part in dense.modules())
    before, got = outputs(dense, plain_folder), outputs(loaded, plain_folder)
    state = pico.rebuilt(pico.read_state(output))
    if "second.bias_ih_l0" in state:
        unroll(dense)
        with_biases(dense)
    dense.load_state_dict(state)
    wanted = outputs(dense, plain_folder)
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item())
    assert (before - got).norm() > 1e-3 * before.norm()
    if variant == "curvature, sequential":
        several = "it runs several times in a pass, on several inputs"
        assert matrices["second.weight_ih_l1"]["sequential"] is True
        assert matrices["first.weight_hh_l0"]["sequential_reason"] == several
    if variant == "curvature, certified":
        assert report["certificate"]["statements"] and not report["certificate"]["not_covered"]
    ended = pico.call("verify", output, "--against", checkpoint, "--factory", factory)
    assert ended.code == 0, ended.out + ended.err


def with_biases(model: nn.Module) -> None:
    """Makes room for biases in matrices that have none."""
    for part in model.modules():
        if isinstance(part, RecurrentMatrix) and part.bias is None:
            part.bias = nn.Parameter(torch.zeros(part.out_features))


def test_errors_are_those_of_the_hidden_states(
    plain_folder: pico.PlainFolder, tmp_path: Path
) -> None:
    settings = {"compression.method": "frobenius", "compression.sequential": False} | EVEN
    changes = plain_folder.model("packed") | settings | {"calibration.num_sequences": 64}
    output, report = pico.compressed(tmp_path, changes)
    errors = {x["name"]: x["errors"]["output"]["stored"] for x in report["layers"]}
    dense = lrc_cli.load(plain_folder.path / "packed.safetensors", factory="pico_factories:packed")
    data = pico.read_state(plain_folder.path / "masked.safetensors")
    x, lengths = data["x"], data["attention_mask"].sum(1)
    # Each sequence goes through torch's own module alone: h_(t-1) is the output one step before.
    inputs: dict[str, list[Tensor]] = {name: [] for name in GRU}
    with torch.no_grad():
        for row, length in zip(x, lengths.tolist(), strict=True):
            y, _ = dense.get_submodule("gru")(row[:length])
            zeros = torch.zeros(1, 16)
            inputs["gru.weight_hh_l0"].append(torch.cat([zeros, y[:-1, :16]]))
            inputs["gru.weight_hh_l0_reverse"].append(torch.cat([y[1:, 16:], zeros]))
            for way in ("", "_reverse"):
                inputs[f"gru.weight_ih_l0{way}"].append(row[:length])
    state, before = pico.rebuilt(pico.read_state(output)), dense.state_dict()
    for name, rows in inputs.items():
        own, weight = torch.cat(rows), before[name]
        error = ((own @ (weight - state[name]).T).norm() / (own @ weight.T).norm()).item()
        assert errors[name] == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("method", ["frobenius", "curvature"])
def test_padded_steps_do_not_count(
    method: str, plain_folder: pico.PlainFolder, tmp_path: Path
) -> None:
    """States after a sequence's end reach neither statistics nor outputs."""
    source, factory = plain_folder.path / "masked.safetensors", "pico_factories:padded"
    data = pico.read_state(source)
    mask = data["attention_mask"].bool()
    checkpoint = plain_folder.path / "padded.safetensors"
    rows: dict[str, pico.State] = {}
    for behind in (0.0, 100.0):
        folder = tmp_path / str(behind)
        folder.mkdir()
        x = torch.where(mask[..., None], data["x"], behind)
        save_file({**data, "x": x}, folder / "masked.safetensors")
        changes = (
            plain_folder.model("padded")
            | EVEN
            | {
                "calibration.path": str(folder / "masked.safetensors"),
                "calibration.num_sequences": 48,
                "certification.num_sequences": 16,
                "compression.method": method,
                "compression.sequential": False,
            }
        )
        output, report = pico.compressed(folder, changes)
        rows[str(behind)] = pico.read_state(output)
        assert not report["certificate"]["not_covered"]
        ended = pico.call("verify", output, "--against", checkpoint, "--factory", factory)
        assert ended.code == 0, ended.out + ended.err
    first, second = rows.values()
    for key, tensor in first.items():
        torch.testing.assert_close(second[key], tensor, rtol=1e-4, atol=1e-5)


def test_saves_the_same_tensors_again(plain_folder: pico.PlainFolder, tmp_path: Path) -> None:
    factory = "pico_factories:recurrent"
    output, _ = pico.compressed(tmp_path, plain_folder.model("recurrent"))
    loaded = lrc_cli.load(output, factory=factory)
    state, first = loaded.state_dict(), pico.read_state(output)
    assert state.keys() == first.keys()
    assert all(torch.equal(state[key], first[key]) for key in first)
    save_file({k: t.clone() for k, t in state.items()}, tmp_path / "again.safetensors")
    again = lrc_cli.load(tmp_path / "again.safetensors", factory=factory)
    assert torch.equal(outputs(loaded, plain_folder), outputs(again, plain_folder))


def test_a_loader_without_lrc_fails(plain_folder: pico.PlainFolder, tmp_path: Path) -> None:
    output, _ = pico.compressed(tmp_path, plain_folder.model("recurrent"))
    dense = lrc_cli.load(
        plain_folder.path / "recurrent.safetensors", factory="pico_factories:recurrent"
    )
    with pytest.raises(RuntimeError, match=r"size mismatch for first\.weight_hh_l0"):
        dense.load_state_dict(pico.read_state(output), strict=False)


def test_inspect_shows_matrices_and_says_what_stays(plain_folder: pico.PlainFolder) -> None:
    checkpoint, factory = "recurrent.safetensors", "pico_factories:recurrent"
    ended = pico.call("inspect", checkpoint, "--factory", factory)
    assert ended.code == 0 and "weight_hh_l0" in ended.out
    assert "a matrix of LSTM with proj_size; not in this version" in ended.out
