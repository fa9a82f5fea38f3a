"""These tests show that `center: true` makes biases that are right, counted, carried or refused."""

from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from engine_helpers import gaussian
from pico import Models
from safetensors.torch import save_file
from torch import Tensor, nn

import lrc_cli
from lrc_cli.config import load_config
from lrc_cli.errors import InputError
from lrc_cli.job.run import compress
from lrc_cli.runtime.progress import Progress

CENTER = {"compression.center": True, "evaluation": []}


def refused(directory: Path, changes: dict[str, Any]) -> str:
    with pytest.raises(InputError) as caught:
        compress(load_config(pico.job(directory, changes)), progress=Progress(quiet=True))
    assert not list(directory.rglob("statistics"))
    return str(caught.value)


def factorised(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [layer for layer in report["layers"] if layer["storage"] != "dense"]


def num_bytes(state: dict[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


@pytest.fixture(scope="module")
def centred_llama(tmp_path_factory: pytest.TempPathFactory, checkpoint: Models, text: Path) -> Any:
    """Returns a job in which every layer is factorised. No layer had a bias."""
    job = {"model.path": str(checkpoint("llama")), "calibration.path": str(text), **CENTER}
    job |= {"compression.method": "frobenius", "compression.allocation": "uniform"}
    return pico.compressed(tmp_path_factory.mktemp("centred"), job)


def test_gained_biases_are_counted_to_the_byte(centred_llama: Any, checkpoint: Models) -> None:
    output, report = centred_llama
    before, after = pico.read_state(checkpoint("llama")), pico.read_state(output)
    layers, size = factorised(report), report["size"]
    assert len(layers) == 14
    assert "factors and a bias fitted with them" in (output / "README.md").read_text()
    for layer in layers:
        ends = ("weight", "up.weight", "perm", "bias")
        own = {e: after[f"{layer['name']}.{e}"] for e in ends if f"{layer['name']}.{e}" in after}
        assert own["bias"].shape == (layer["shape"][0],)
        assert layer["bytes_after"] == num_bytes(own) < layer["bytes_before"]
    weights = {f"{x['name']}.weight" for x in report["layers"]}
    rest = {key: tensor for key, tensor in after.items() if key in set(before) - weights}
    assert size["compressible_bytes"]["after"] == num_bytes(after) - num_bytes(rest)
    assert size["compressible_bytes"]["after"] == sum(x["bytes_after"] for x in report["layers"])
    assert size["compressible_bytes"]["before"] == sum(num_bytes({k: before[k]}) for k in weights)
    assert size["checkpoint_bytes"]["after"] == num_bytes(after)
    assert size["kept_compressible"] <= 0.6
    parameters = sum(t.numel() for key, t in after.items() if not key.endswith(".perm"))
    assert size["parameters"]["after"] == parameters


def test_a_gained_bias_loads_runs_and_is_saved_again(centred_llama: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    output, _ = centred_llama
    ids = torch.arange(5, 37)[None]
    models = [AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)]
    models[0].save_pretrained(tmp_path / "again")
    models.append(AutoModelForCausalLM.from_pretrained(tmp_path / "again"))
    models.append(lrc_cli.load(tmp_path / "again"))
    with torch.no_grad():
        first, *others = (model(ids).logits for model in models)
    assert all(torch.equal(first, other) for other in others)
    bias = models[2].get_submodule("model.layers.1.mlp.up_proj").bias
    stored = pico.read_state(output)["model.layers.1.mlp.up_proj.bias"]
    assert torch.equal(bias, stored.float()) and stored.any()


def test_the_written_network_is_closer_with_a_free_bias(
    plain_folder: pico.PlainFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ranks are equal and the inputs have a large mean. Layers and the network are compared."""
    monkeypatch.chdir(plain_folder.path)
    rows = 4 + torch.randn(200, 24, generator=torch.Generator().manual_seed(7))
    save_file({"x": rows}, tmp_path / "rows.safetensors")
    changes = {
        **plain_folder.model("mlp"),
        "calibration.path": str(tmp_path / "rows.safetensors"),
        "calibration.num_sequences": 200,
        "evaluation": [],
        "compression.size": 1.0,
        "compression.method": "frobenius",
        "compression.layers": {"*": {"rank": 4, "storage": "factors"}},
    }
    dense_mlp = lrc_cli.load(plain_folder.path / "mlp.safetensors", factory="pico_factories:mlp")
    first, differences = {}, {}
    for center in (False, True):
        own = {"compression.center": center, "output.path": str(tmp_path / f"center-{center}")}
        output, report = pico.compressed(tmp_path, changes | own)
        module = lrc_cli.load(output, factory="pico_factories:mlp")
        errors = {x["name"]: x["errors"]["output"]["stored"] for x in report["layers"]}
        with torch.no_grad():
            difference, scale = dense_mlp[0](rows) - module[0](rows), rows @ dense_mlp[0].weight.T
            differences[center] = (dense_mlp(rows) - module(rows)).norm().item()
        assert errors["0"] == pytest.approx((difference.norm() / scale.norm()).item(), rel=1e-3)
        first[center] = errors
    assert all(first[True][name] < first[False][name] for name in first[True])
    assert differences[True] < differences[False]


@pytest.mark.parametrize("method", ["frobenius", "curvature"])
def test_behind_compressed_layers_no_mean_is_left_in_the_difference(
    plain_folder: pico.PlainFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """b^ = b + W mean(x) - Z mean(x~): every layer's outputs keep their mean in the network that
    runs, although the inputs are no longer the dense network's."""
    monkeypatch.chdir(plain_folder.path)
    rows = 4 + torch.randn(1200, 24, generator=torch.Generator().manual_seed(7))
    save_file({"x": rows}, tmp_path / "rows.safetensors")
    changes = {
        **plain_folder.model("mlp"),
        **CENTER,
        "calibration.path": str(tmp_path / "rows.safetensors"),
        "calibration.num_sequences": 1200,
        "compression.method": method,
        "compression.sequential": True,
        "compression.correction": 1,  # the fit uses all rows
        "compression.layers": {"*": {"rank": 4, "storage": "factors"}},
        "compression.size": 1.0,
    }
    output, report = pico.compressed(tmp_path, changes)
    assert report["sequential"]["used"]
    paths = (plain_folder.path / "mlp.safetensors", output)
    networks = [lrc_cli.load(path, factory="pico_factories:mlp") for path in paths]
    with torch.no_grad():
        x, compressed = rows, rows
        for before, after in zip(*networks, strict=True):
            x, compressed = before(x), after(compressed)
            if isinstance(before, nn.Linear):
                left = (x - compressed).mean(dim=0).norm()
                assert left < 1e-5 * x.norm(dim=1).mean()
    assert (x - compressed).norm() > 0.05 * x.norm()


@pytest.mark.parametrize("method", ["frobenius", "curvature"])
def test_an_encoder_keeps_its_biases_in_number(
    checkpoint: Models, text: Path, tmp_path: Path, method: str
) -> None:
    job = {"model.path": str(checkpoint("bert-mlm")), "calibration.path": str(text), **CENTER}
    output, report = pico.compressed(tmp_path, job | {"compression.method": method})
    before, after = pico.read_state(checkpoint("bert-mlm")), pico.read_state(output)
    names = {key for key in before if key.endswith(".bias")}
    assert names == {key for key in after if key.endswith(".bias")}
    changed = {
        key.removesuffix(".bias") for key in names if not torch.equal(before[key], after[key])
    }
    assert changed == set(pico.factorised_keys(after))
    weights = sum(x["bytes_after"] for x in report["layers"])
    assert report["size"]["compressible_bytes"]["after"] == weights


def test_padding_has_no_part_in_the_mean(
    plain_folder: pico.PlainFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(plain_folder.path)
    changes = {**plain_folder.model("attention"), **CENTER, "compression.method": "frobenius"}
    forced = {"compression.size": 1.0, "compression.layers": {"*": {"rank": 5}}}
    output, report = pico.compressed(tmp_path, changes | forced)
    data, written = (
        pico.read_state(plain_folder.path / "masked.safetensors"),
        pico.read_state(output),
    )
    name = next(x["name"] for x in report["layers"] if x["name"] == "query")
    weight = pico.read_state(plain_folder.path / "attention.safetensors")[f"{name}.weight"]
    fitted = pico.rebuilt(written)[f"{name}.weight"]
    drawn = report["provenance"]["sequences"]["calibration"]["num_sequences"]
    assert drawn == 40
    # The bias belongs to the mean of some 40 of 64 sequences. This mean is near the mean of all
    # tokens, and far from the mean that would count padded rows as data.
    tokens = data["x"][data["attention_mask"].bool()]
    expected = (weight - fitted) @ tokens.mean(dim=0)
    assert (written[f"{name}.bias"] - expected).norm() < 0.5 * ((weight - fitted) @ tokens.T).norm(
        dim=0
    ).mean()


def test_a_bound_on_the_error_holds_and_needs_no_more_bytes(
    plain_folder: pico.PlainFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both errors are relative to the whole output, its mean included."""
    monkeypatch.chdir(plain_folder.path)
    rows = 4 + torch.randn(200, 24, generator=torch.Generator().manual_seed(7))
    save_file({"x": rows}, tmp_path / "rows.safetensors")
    changes = {
        **plain_folder.model("mlp"),
        "calibration.path": str(tmp_path / "rows.safetensors"),
        "compression.max_layer_error": 0.2,
        "compression.rank_multiple": 1,
        "compression.method": "frobenius",
        "evaluation": [],
    }
    kept = {}
    for center in (False, True):
        own = {"compression.center": center, "output.path": str(tmp_path / f"center-{center}")}
        _, report = pico.compressed(tmp_path, changes | own)
        assert report["target"]["met"]
        assert all(x["errors"]["output"]["stored"] <= 0.2 for x in factorised(report))
        kept[center] = report["size"]["kept_compressible"]
    assert kept[True] < kept[False]


@pytest.mark.parametrize(
    ("method", "why"), [("svd", "svd looks at no data"), ("relu", "relu fits a bias of its own")]
)
def test_methods_without_a_mean_to_correct_for_are_refused(
    llama_job: dict[str, Any], tmp_path: Path, method: str, why: str
) -> None:
    changes = {**llama_job, **CENTER, "compression.method": method}
    assert f"compression.center: {why}; set center: false" in refused(tmp_path, changes)


# ---------------------------------------------------------------- layers that cannot carry one

STRANGE = '''
import torch
from torch import nn


class Bare(nn.Linear):
    """Its bias is no parameter at all."""

    def __init__(self, *sizes):
        super().__init__(*sizes, bias=False)
        del self._parameters["bias"]
        self.__dict__["bias"] = None

    def forward(self, x):
        return x @ self.weight.T


def bare():
    return nn.Sequential(Bare(24, 16), nn.Linear(16, 16), nn.Linear(16, 12))


def shared():
    net = nn.Sequential(nn.Linear(24, 16), nn.Linear(16, 16), nn.Linear(16, 12))
    net[1].bias = net[0].bias
    return net
'''


@pytest.mark.parametrize(
    ("name", "layer"), [("bare", "0 (Bare)"), ("shared", "0 (Linear)"), ("fine", None)]
)
def test_layers_that_cannot_carry_a_bias_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, layer: str | None
) -> None:
    source = STRANGE + "\n\ndef fine():\n    return nn.Sequential(nn.Linear(24, 16, bias=False))\n"
    module = f"strange_{name}"
    (tmp_path / f"{module}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    namespace: dict[str, Any] = {}
    exec(source, namespace)
    network: nn.Module = namespace[name]()
    state = {k: t.clone() for k, t in network.state_dict().items()}
    if name == "shared":
        del state["1.bias"]
    save_file(state, tmp_path / "model.safetensors")
    save_file({"x": gaussian(64, 24, seed=0).float()}, tmp_path / "rows.safetensors")
    changes = {
        "model.path": str(tmp_path / "model.safetensors"),
        "model.factory": f"{module}:{name}",
        "calibration.path": str(tmp_path / "rows.safetensors"),
        "calibration.num_sequences": 40,
        "compression.method": "frobenius",
        "compression.size": 0.9,
        **CENTER,
    }
    if layer is None:
        output, _ = pico.compressed(tmp_path, changes)
        assert "0.bias" in pico.read_state(output)
        assert lrc_cli.load(output, factory=f"{module}:{name}")[0].bias is not None
        return
    message = refused(tmp_path, changes)
    assert f"compression.center: {layer} cannot carry a new bias" in message
    assert "set center: false or exclude it" in message
    pico.compressed(tmp_path, changes | {"compression.exclude": [layer[0], "1"]})
