"""These tests run `lrc compress` on tiny checkpoints and check what is written and reported."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
import transformers
from pico import Models
from safetensors import safe_open
from torch import Tensor, nn

import lrc_cli
from lrc_cli.config import load_config
from lrc_cli.execution.network import Network
from lrc_cli.job.plan import make_plan

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "svd-uniform-factors": (
        "llama",
        {"method": "svd", "allocation": "uniform", "storage": "factors"},
    ),
    "svd-relative": ("llama", {"method": "svd"}),
    "frobenius-uniform": ("llama", {"method": "frobenius", "allocation": "uniform"}),
    "frobenius-relative": ("llama", {"method": "frobenius", "storage": "factors"}),
    "frobenius-global": ("llama", {"method": "frobenius", "allocation": "global"}),
    "curvature-global": ("llama", {}),
    "curvature-uniform": ("llama", {"allocation": "uniform", "storage": "interpolative"}),
    "curvature-relative": ("llama", {"allocation": "relative", "storage": "factors"}),
    "of-checkpoint": ("llama", {"size": 0.75, "size_of": "checkpoint"}),
    "layer-error": ("llama", {"max_layer_error": 0.4}),
    "layer-error-frobenius": ("llama", {"method": "frobenius", "max_layer_error": 0.3}),
    "loss-increase": ("llama", {"max_loss_increase": 0.05}),
    "loss-increase-uniform": ("llama", {"max_loss_increase": 1.0, "allocation": "uniform"}),
    "loss-increase-relative": ("llama", {"max_loss_increase": 1.0, "allocation": "relative"}),
    "qwen2": ("qwen2", {}),
    "qwen2-frobenius": ("qwen2", {"method": "frobenius", "storage": "interpolative"}),
    "rows": ("qwen2", {"rank_multiple": 1, "storage": "interpolative"}),
    "bert": ("bert", {}),
    "bert-frobenius": ("bert", {"method": "frobenius"}),
    "bert-mlm": ("bert-mlm", {}),
    "bert-classifier": ("bert-classifier", {}),
}


class Outcome:
    """Runs a job and returns its source, its output and its report."""

    def __init__(self, source: Path, output: Path, report: Any, asked: dict[str, Any]) -> None:
        self.source, self.output, self.report, self.asked = source, output, report, asked
        self.before, self.after = pico.read_state(source), pico.read_state(output)
        self.factorised = pico.factorised_keys(self.after)
        self.layers = [layer for layer in report["layers"] if layer["storage"] != "dense"]


@pytest.fixture(scope="module", params=list(CASES))
def outcome(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    checkpoint: Models,
    text: Path,
) -> Outcome:
    name, asked = CASES[request.param]
    changes = {f"compression.{key}": value for key, value in asked.items()}
    changes |= {"model.path": str(checkpoint(name)), "calibration.path": str(text)}
    output, report = pico.compressed(tmp_path_factory.mktemp(request.param), changes)
    return Outcome(checkpoint(name), output, report, asked)


def num_bytes(state: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in state.values())


def test_the_size_is_what_the_report_says_to_the_byte(outcome: Outcome) -> None:
    size, asked = outcome.report["size"], outcome.asked
    weights = {f"{layer['name']}.weight" for layer in outcome.report["layers"]}
    rest = {key for key in outcome.before if key not in weights}
    compressible = {key: t for key, t in outcome.after.items() if key not in rest}
    assert size["checkpoint_bytes"] == {
        "before": num_bytes(outcome.before),
        "after": num_bytes(outcome.after),
    }
    assert size["compressible_bytes"]["after"] == num_bytes(compressible)
    assert size["kept_checkpoint"] == num_bytes(outcome.after) / num_bytes(outcome.before)
    assert size["kept_compressible"] == pytest.approx(
        num_bytes(compressible) / sum(outcome.before[key].nbytes for key in weights), rel=1e-12
    )
    parameters = sum(t.numel() for key, t in outcome.after.items() if not key.endswith(".perm"))
    assert size["parameters"]["after"] == parameters
    assert size["file_bytes"] == sum(
        file.stat().st_size for file in outcome.output.glob("*.safetensors")
    )
    assert outcome.factorised, "nothing was compressed"
    if "max_layer_error" not in asked and "max_loss_increase" not in asked:
        kept = size["kept_checkpoint" if "size_of" in asked else "kept_compressible"]
        assert kept <= asked.get("size", 0.6)
        # A step of the rank is up to a quarter of a small layer.
        slack = 0.25 if asked.get("allocation") == "uniform" else 0.06
        assert kept > asked.get("size", 0.6) - slack, "the budget is not used"


def test_every_layer_takes_the_bytes_that_the_report_says(outcome: Outcome) -> None:
    for layer in outcome.report["layers"]:
        ends = ("weight", "up.weight", "perm")
        keys = [f"{layer['name']}.{end}" for end in ends]
        stored = [outcome.after[key] for key in keys if key in outcome.after]
        assert layer["bytes_after"] == sum(tensor.nbytes for tensor in stored)
        assert layer["bytes_before"] == outcome.before[keys[0]].nbytes
        if layer["storage"] != "dense":
            assert layer["rank"] == len(stored[0]) and layer["bytes_after"] < layer["bytes_before"]
            assert (layer["storage"] == "interpolative") == (keys[2] in outcome.after)


def test_storage_and_rank_multiple_are_as_asked(outcome: Outcome) -> None:
    asked = outcome.asked.get("storage", "auto")
    for layer in outcome.layers:
        assert asked in ("auto", layer["storage"])
        assert layer["rank"] % 8 == 0 or outcome.asked.get("rank_multiple") == 1
    if outcome.asked.get("rank_multiple") == 1:
        assert any(layer["rank"] % 8 for layer in outcome.layers)


def test_uniform_gives_every_layer_the_same_share(outcome: Outcome) -> None:
    if outcome.asked.get("allocation") != "uniform":
        return
    shares = [layer["bytes_after"] / layer["bytes_before"] for layer in outcome.layers]
    assert max(shares) - min(shares) < 0.26


def test_what_is_not_factorised_is_byte_identical(outcome: Outcome) -> None:
    kept = set(outcome.before) - {f"{key}.weight" for key in outcome.factorised}
    assert kept and set(outcome.after) == {
        *kept,
        *(f"{key}.weight" for key in outcome.factorised),
        *(f"{key}.up.weight" for key in outcome.factorised),
        *(key for key in outcome.after if key.endswith(".perm")),
    }
    for key in kept:
        assert outcome.after[key].dtype == outcome.before[key].dtype
        assert bytes(outcome.after[key].flatten().view(torch.uint8).numpy()) == bytes(
            outcome.before[key].flatten().view(torch.uint8).numpy()
        )


def test_config_and_side_files_are_carried_over(outcome: Outcome) -> None:
    config = json.loads((outcome.output / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert config == json.loads((outcome.source / "config.json").read_text())
    assert quantization["quant_method"] == "lrc" and quantization["format_version"] == 1
    assert set(quantization["layers"]) == set(outcome.factorised)
    for layer in outcome.layers:
        entry = quantization["layers"][layer["name"]]
        assert (entry["storage"], entry["rank"]) == (layer["storage"], layer["rank"])
    for file in outcome.source.iterdir():
        if file.name != "config.json" and "safetensors" not in file.name:
            assert (outcome.output / file.name).read_bytes() == file.read_bytes()
    names = {path.name for path in outcome.output.iterdir()}
    assert {"LICENSE", "tokenizer.json", "lrc.yaml", "README.md", "report.html"} <= names
    assert sorted(outcome.output.parent.iterdir()) == [
        outcome.output.parent / name for name in (".lrc-work", "job.yaml", "out")
    ]


def test_stored_errors_are_at_or_above_the_optimum(outcome: Outcome) -> None:
    for layer in outcome.layers:
        metric, output = layer["errors"]["metric"], layer["errors"]["output"]
        high = 1.001 if layer["dtype"] == "float32" else 1.3
        floor = 2e-6 * metric["total"]  # Gram matrices are kept in float32
        assert metric["optimum"] - floor <= metric["stored"] <= metric["optimum"] * high + floor
        assert metric["optimum"] - floor <= metric["svd"]
        assert output["optimum"] ** 2 - 2e-6 <= output["stored"] ** 2 <= 1.5
        assert output["optimum"] ** 2 - 2e-6 <= output["svd"] ** 2
        assert metric["stored"] < metric["total"]
    if outcome.report["method"] != "svd":
        fitted = sum(layer["errors"]["metric"]["stored"] for layer in outcome.layers)
        assert fitted < sum(layer["errors"]["metric"]["svd"] for layer in outcome.layers)


def test_an_error_target_holds_and_is_not_overdone(outcome: Outcome) -> None:
    bound = outcome.asked.get("max_layer_error")
    if bound is not None:
        errors = [layer["errors"]["output"]["stored"] for layer in outcome.layers]
        assert max(errors) <= bound
        assert max(errors) > 0.7 * bound
    limit = outcome.asked.get("max_loss_increase")
    if limit is not None:
        predicted = sum(layer["errors"]["metric"]["stored"] for layer in outcome.layers)
        assert 0.2 * limit < predicted <= 1.05 * limit


def sample_inputs() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(5, 16, (2, 12))}


def dense_model(source: Path, state: dict[str, Tensor]) -> nn.Module:
    """Returns a model of the source's class with another dense state."""
    architecture = json.loads((source / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, architecture).from_pretrained(source, dtype=torch.float32)
    found = model.load_state_dict(state, strict=False)
    assert not found.unexpected_keys
    assert not set(found.missing_keys) & set(pico.read_state(source)), "only tied ones may be left"
    return model.eval()


def test_transformers_loads_what_the_written_tensors_stand_for(outcome: Outcome) -> None:
    expected = dense_model(outcome.source, pico.rebuilt(outcome.after))
    loaded = type(expected).from_pretrained(outcome.output, dtype=torch.float32).eval()
    inputs = sample_inputs()
    with torch.no_grad():
        ours, theirs = loaded(**inputs)[0], expected(**inputs)[0]
        dense = dense_model(outcome.source, pico.rebuilt(outcome.before))(**inputs)[0]
    scale = theirs.abs().max()
    assert (ours - theirs).abs().max() < 1e-4 * scale
    assert (ours - dense).abs().max() > 1e-3 * scale, "compression changed nothing"


FRESH = """
import sys, torch, lrc_cli.hf
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
inputs = tokenizer("w1 w2 w3", return_tensors="pt")
print(model.generate(**inputs, max_new_tokens=8, do_sample=False)[0].tolist())
"""


def test_a_fresh_process_generates(tmp_path: Path, llama_job: dict[str, Any]) -> None:
    output, _ = pico.compressed(tmp_path, llama_job)
    command = [sys.executable, "-c", FRESH, str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    expected = dense_model(Path(llama_job["model.path"]), pico.rebuilt(pico.read_state(output)))
    start = torch.tensor([[5 + i for i in (1, 2, 3)]])
    tokens = expected.generate(start, max_new_tokens=8, do_sample=False)[0].tolist()
    assert json.loads(done.stdout.splitlines()[-1]) == tokens


def naive_errors(weight: Tensor, stored: Tensor, inputs: Tensor) -> tuple[float, float, float]:
    """Returns relative output errors of a stored weight, its rank's optimum and plain SVD."""
    rank = int(torch.linalg.matrix_rank(stored.double(), rtol=1e-5))
    target = weight.double() @ inputs.double().T
    u, s, vt = torch.linalg.svd(weight.double(), full_matrices=False)
    plain = (u[:, :rank] * s[:rank]) @ vt[:rank]
    total = target.norm()
    best = torch.linalg.svdvals(target)[rank:].norm()
    difference = (weight - stored).double() @ inputs.double().T
    return (
        (difference.norm() / total).item(),
        (best / total).item(),
        ((weight.double() - plain) @ inputs.double().T).norm().div(total).item(),
    )


@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("svd", {"size": 0.5}),  # svd looks at no data, and so bounds no layer's output
        ("frobenius", {"size": 0.5}),
        ("curvature", {"size": 0.5}),
        ("frobenius", {"max_layer_error": 0.5}),
        ("curvature", {"max_layer_error": 0.5}),
    ],
)
def test_a_plain_module_and_its_reported_errors(
    method: str,
    target: dict[str, float],
    tmp_path: Path,
    plain_folder: pico.PlainFolder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(plain_folder.path)
    changes = plain_folder.model("mlp") | {"calibration.num_sequences": 64, "evaluation": []}
    changes |= {"compression.method": method, "compression.storage": "factors"}
    changes |= {f"compression.{key}": value for key, value in target.items()}
    output, report = pico.compressed(tmp_path, changes)
    before = pico.read_state(plain_folder.path / "mlp.safetensors")
    after = pico.rebuilt(pico.read_state(output))
    x = pico.read_state(plain_folder.path / "rows.safetensors")["x"]
    seen, factorised = x, 0
    for layer in report["layers"]:
        weight, bias = before[f"{layer['name']}.weight"], before[f"{layer['name']}.bias"]
        if layer["storage"] != "dense":
            factorised += 1
            stored, best, plain = naive_errors(weight, after[f"{layer['name']}.weight"], seen)
            errors = layer["errors"]["output"]
            if method != "svd":  # svd collects no data: its inputs count as white
                assert errors["stored"] == pytest.approx(stored, rel=1e-3)
                assert errors["optimum"] == pytest.approx(best, rel=1e-3, abs=1e-6)
                assert errors["svd"] == pytest.approx(plain, rel=1e-3)
                assert stored <= target.get("max_layer_error", 1) * (1 + 1e-4)
            if method == "frobenius":
                assert stored == pytest.approx(best, rel=1e-3)
        seen = torch.relu(seen @ weight.T + bias)
    assert factorised
    module = lrc_cli.load(output, factory="pico_factories:mlp")
    dense = lrc_cli.load(plain_folder.path / "mlp.safetensors", factory="pico_factories:mlp")
    dense.load_state_dict(after)
    with torch.no_grad():
        assert torch.allclose(module(x), dense(x), rtol=1e-4, atol=1e-4)


def test_overrides_of_single_layers(tmp_path: Path, llama_job: dict[str, Any]) -> None:
    changes = llama_job | {
        "compression.size": 0.75,
        "compression.method": "frobenius",
        "compression.storage": "interpolative",
        "compression.layers": {
            "*.0.self_attn.q_proj": {"rank": 13},
            "*.0.self_attn.o_proj": {"size": 0.3},
            "*.0.mlp.up_proj": {"method": "svd"},
            "*.0.mlp.down_proj": {"storage": "factors"},
            "model.layers.1.*": {"size": 1.0},
            "*.1.mlp.down_proj": {"rank": 24},
        },
    }
    _, report = pico.compressed(tmp_path, changes)
    layers = {layer["name"].removeprefix("model.layers."): layer for layer in report["layers"]}
    assert layers["0.self_attn.q_proj"]["rank"] == 13
    share = (
        layers["0.self_attn.o_proj"]["bytes_after"] / layers["0.self_attn.o_proj"]["bytes_before"]
    )
    assert 0.15 < share <= 0.3
    assert layers["0.mlp.up_proj"]["method"] == "svd"
    assert layers["0.mlp.gate_proj"]["method"] == "frobenius"
    assert layers["0.mlp.down_proj"]["storage"] in ("factors", "dense")
    assert layers["1.mlp.down_proj"]["rank"] == 24
    left = [layer for name, layer in layers.items() if name.startswith("1.self_attn")]
    assert len(left) == 4 and all(layer["storage"] == "dense" for layer in left)
    assert not any(layer["fallback"] for layer in left)
    assert report["size"]["kept_compressible"] <= 0.75


def test_the_order_of_overrides_counts(tmp_path: Path, llama_job: dict[str, Any]) -> None:
    first, second = {"*.q_proj": {"rank": 16}}, {"*.0.self_attn.q_proj": {"rank": 24}}
    ranks = []
    for layers in ({**first, **second}, {**second, **first}):
        changes = llama_job | {"compression.layers": layers, "compression.method": "svd"}
        _, report = pico.compressed(tmp_path, changes, "--force")
        ranks.append([x["rank"] for x in report["layers"] if x["name"].endswith("q_proj")])
    assert ranks == [[24, 16], [16, 16]]


def test_include_and_exclude_choose_layers_and_the_rest_is_named(
    tmp_path: Path, llama_job: dict[str, Any]
) -> None:
    changes = llama_job | {
        "compression.include": ["*.mlp.*"],
        "compression.exclude": ["re:.*layers\\.1\\..*"],
    }
    output, report = pico.compressed(tmp_path, changes)
    names = [layer["name"] for layer in report["layers"]]
    assert names == [f"model.layers.0.mlp.{kind}_proj" for kind in ("gate", "up", "down")]
    skipped = {entry["name"]: entry["reason"] for entry in report["skipped"]}
    before = pico.read_state(Path(llama_job["model.path"]))
    assert {*skipped, *(f"{name}.weight" for name in names)} == set(before)
    assert "include" in skipped["model.layers.1.mlp.up_proj.weight"]
    assert "embeddings is false" in skipped["model.embed_tokens.weight"]
    assert all(
        key.startswith("model.layers.0.mlp.")
        for key in pico.factorised_keys(pico.read_state(output))
    )


def test_output_dtype_and_shards(tmp_path: Path, llama_job: dict[str, Any]) -> None:
    changes = llama_job | {"output.dtype": "float32", "output.shard_size": "30KB"}
    output, report = pico.compressed(tmp_path, changes)
    index = json.loads((output / "model.safetensors.index.json").read_text())
    state = pico.read_state(output)
    assert set(index["weight_map"]) == set(state)
    assert index["metadata"]["total_size"] == num_bytes(state)
    files = sorted(output.glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == [file.name for file in files]
    assert len(files) > 2
    for file in files:
        with safe_open(file, framework="pt") as handle:
            assert set(handle.metadata()) == {"format", "lrc"}
            shard = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
        assert num_bytes(shard) <= 30_000 or len(shard) == 1
        assert all(index["weight_map"][key] == file.name for key in shard)
    assert {t.dtype for key, t in state.items() if not key.endswith(".perm")} == {torch.float32}
    assert (
        report["size"]["compressible_bytes"]["after"]
        <= 0.6 * report["size"]["compressible_bytes"]["before"]
    )
    loaded = transformers.AutoModelForCausalLM.from_pretrained(output)
    assert loaded.dtype == torch.float32


def test_the_manifest_pins_every_file_and_tensor(tmp_path: Path, llama_job: dict[str, Any]) -> None:
    output, _ = pico.compressed(tmp_path, llama_job)
    manifest = json.loads((output / "manifest.json").read_text())
    files = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in output.iterdir()}
    del files["manifest.json"]
    assert manifest["files"] == files
    tensors = {
        key: hashlib.sha256(bytes(t.flatten().view(torch.uint8).numpy())).hexdigest()
        for key, t in pico.read_state(output).items()
    }
    assert manifest["tensors"] == tensors


def test_quality_is_measured_in_the_stored_dtype(tmp_path: Path, llama_job: dict[str, Any]) -> None:
    output, report = pico.compressed(tmp_path, llama_job)
    (row,) = report["quality"]
    assert row["text"] == "rest" and row["num_sequences"] == 4
    assert row["num_scored"] == 4 * (pico.LENGTH - 1)
    # Transformers' own loss scores the same sequences.
    plan = make_plan(load_config(output / "lrc.yaml"), force=True)
    ids = plan.sequences["rest"].inputs["input_ids"]
    for path, side in ((Path(llama_job["model.path"]), "before"), (output, "after")):
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        with torch.no_grad():
            loss = model(input_ids=ids, labels=ids).loss.item()
        assert row[f"loss_{side}"] == pytest.approx(loss, rel=1e-4)
        assert row[f"perplexity_{side}"] == pytest.approx(torch.tensor(loss).exp().item(), rel=1e-3)
    assert row["kl"] > 0 and 0 <= row["top1_agreement"] <= 1


def test_an_output_that_does_not_compute_is_not_published(
    tmp_path: Path, llama_job: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Network.__call__

    def overflow(network: Network, batch: dict[str, Tensor]) -> Any:
        outputs = run(network, batch)
        if hasattr(network.module.config, "quantization_config"):
            outputs.logits[0, 0, 0] = float("inf")
        return outputs

    monkeypatch.setattr(Network, "__call__", overflow)
    ended = pico.call("compress", pico.job(tmp_path, llama_job))
    assert ended.code == 1 and "not finite" in ended.err
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lrc-work", "job.yaml"]
