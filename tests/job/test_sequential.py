"""`compression.sequential` end to end: what it lowers, when it is on, what falls back, resuming."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from families import FAMILIES
from pico import Models
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModel

import lrc_cli
from lrc_cli.config import load_config
from lrc_cli.data.draw import Batch
from lrc_cli.engine import DENSE, SolveError
from lrc_cli.errors import RunError
from lrc_cli.execution.chain import find_chain
from lrc_cli.execution.hooks import hooked
from lrc_cli.execution.network import make_network
from lrc_cli.job.factors import sequential as fitting
from lrc_cli.job.factors.decide_sequential import decide
from lrc_cli.job.factors.two_networks import DriftSum, Streams
from lrc_cli.job.plan import Plan, make_plan
from lrc_cli.network.low_rank.modules import LowRankModule, low_rank_layers
from lrc_cli.verify import verify_directory

Changes = dict[str, Any]
MANY = {"calibration.num_sequences": 60, "evaluation": None}
"""1920 tokens, of which 1696 are fitted to: 15 for each input of every pico layer."""


@pytest.fixture
def job(checkpoint: Models, text: Path) -> Any:
    """Changes for `pico.job` by the model's name."""

    def changes(name: str, **compression: Any) -> Changes:
        asked = {f"compression.{key}": value for key, value in compression.items()}
        paths = {"model.path": str(checkpoint(name)), "calibration.path": str(text)}
        return paths | MANY | asked

    return changes


def factorised(report: Any) -> list[Any]:
    return [layer for layer in report["layers"] if layer["storage"] != "dense"]


def dense_layers(report: Any) -> list[Any]:
    return [layer for layer in report["layers"] if layer["storage"] == "dense"]


def fitted_data(plan: Plan) -> Batch:
    """The blocks that sequential layers are fitted to: all but an eighth."""
    inputs = plan.sequences["calibration"].inputs
    number = len(next(iter(inputs.values())))
    return {name: tensor[: number - number // 8] for name, tensor in inputs.items()}


def calibration_data(directory: Path) -> Batch:
    """The blocks that the job in `directory` was fitted to."""
    return fitted_data(make_plan(load_config(directory / "job.yaml"), force=True))


@torch.no_grad()
def hidden_error(source: Path, output: Path, batch: Batch) -> float:
    """The relative error of the last hidden states."""
    models = [AutoModel.from_pretrained(path, dtype=torch.float32) for path in (source, output)]
    expected, found = (model(**batch).last_hidden_state for model in models)
    return (torch.linalg.norm(expected - found) / torch.linalg.norm(expected)).item()


@pytest.mark.parametrize(
    ("name", "method"), [("llama", "curvature"), ("qwen2", "frobenius"), ("bert", "curvature")]
)
def test_it_lowers_the_error_of_the_whole_network(
    name: str, method: str, tmp_path: Path, job: Any
) -> None:
    errors = {}
    for sequential in (False, True):
        changes = job(name, method=method, size=0.3, sequential=sequential)
        output, report = pico.compressed(tmp_path, changes, "--force")
        assert report["sequential"]["used"] is sequential
        source = Path(changes["model.path"])
        errors[sequential] = hidden_error(source, output, calibration_data(tmp_path))
    assert errors[True] < 0.97 * errors[False]


@torch.no_grad()
def measured(plan: Plan, output: Path) -> dict[str, float]:
    """By layer, ||W x + b - Z x~ - b~|| / ||W x|| over the data, from what was written."""
    written = lrc_cli.load(output, factory=plan.config.model.factory)
    other = make_network(written, device=torch.device("cpu"), dtype=torch.float32)
    batch = fitted_data(plan)
    mask = batch.get("attention_mask")
    outputs: list[dict[str, Tensor]] = []
    for network in (plan.network, other):
        seen: dict[str, Tensor] = {}

        def look(layer: Any, _: Tensor, y: Tensor, seen: dict[str, Tensor] = seen) -> None:
            seen[layer.name] = y if mask is None else y[mask.bool()]

        with hooked(network, plan.layers, look):
            network(batch)
        outputs.append(seen)
    found = {}
    for name, y in outputs[0].items():
        bias = plan.network.module.get_submodule(name).bias
        energy = torch.linalg.norm(y if bias is None else y - bias)
        found[name] = (torch.linalg.norm(y - outputs[1][name]) / energy).item()
    return found


def assert_errors_as_written(directory: Path, report: Any) -> None:
    plan = make_plan(load_config(directory / "job.yaml"), force=True)
    found = measured(plan, directory / "out")
    layers = [layer for layer in report["layers"] if layer.get("sequential")]
    assert layers
    for layer in layers:
        errors = layer["errors"]
        expected = pytest.approx(found[layer["name"]], rel=1e-3, abs=1e-4)
        assert errors["output"]["stored"] == expected
        assert errors["output"]["inputs"] == "compressed"
        assert errors["output"]["optimum"] <= errors["output"]["stored"]
        metric = errors["metric"]
        assert 0 <= metric["inherited"] <= metric["optimum"] <= metric["stored"] <= metric["total"]
        assert metric["stored"] < metric["svd"]
        assert 0 <= layer["correction"] <= 1


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_the_report_has_the_errors_on_both_networks(name: str, tmp_path: Path, job: Any) -> None:
    """Measured again from the written files, with forward passes alone."""
    output, report = pico.compressed(tmp_path, job(name, sequential=True))
    assert report["sequential"]["used"] and "asked for" in report["sequential"]["reason"]
    assert_errors_as_written(tmp_path, report)
    page = (output / "report.html").read_text()
    assert "the compressed network&#x27;s inputs" in page and "on: asked for" in page
    assert "on: asked for" in (output / "README.md").read_text()


def test_ranks_come_from_the_original_network(tmp_path: Path, job: Any) -> None:
    """The statistics and the spectra are those of the plain run, and are used again."""
    _, plain = pico.compressed(tmp_path, job("llama", sequential=False, storage="factors"))
    changes = job("llama", sequential=True, storage="factors")
    _, first = pico.compressed(tmp_path, changes, "--force")
    assert "statistics" not in first["timing"] and "spectra" not in first["timing"]
    ranks = [[layer.get("rank") for layer in r["layers"]] for r in (plain, first)]
    assert ranks[0] == ranks[1]
    before = pico.read_state(tmp_path / "out")
    _, second = pico.compressed(tmp_path, changes | {"compression.ridge": 1.0}, "--force")
    assert "statistics" not in second["timing"] and "factors" in second["timing"]
    after = pico.read_state(tmp_path / "out")
    assert any(not torch.equal(before[key], after[key]) for key in before)


@dataclass
class Known:
    """A work directory that knows how many tokens reached every layer."""

    plan: Plan
    tokens: int

    def facts(self, stage: str, unit: str) -> dict[str, Any]:
        return {"layers": {x.name: {"tokens": self.tokens} for x in self.plan.layers}}


AUTO: dict[str, tuple[Changes, int, int, bool, str]] = {
    "strong": ({}, 8, 1631, True, "14 of 14 factorised layers"),
    "half-of-the-layers": (
        {"allocation": "relative", "layers": {"*self_attn*": {"method": "svd"}}},
        8,
        1631,
        False,
        "6 of 14 factorised layers",
    ),
    "weak": (
        {},
        40,
        1631,
        False,
        "84.7% of the bytes are kept, and it is on from 60% down",
    ),
    "few-tokens": ({}, 8, 1085, False, "0 of 14 factorised layers"),
    "enough-for-most": ({}, 8, 1086, False, "12 of 14 factorised layers"),
    "not-quite-enough": ({}, 8, 1629, False, "12 of 14 factorised layers"),
    "just-enough-tokens": ({}, 8, 1630, True, "14 of 14 factorised layers"),
    "nothing-held-back": ({"correction": 1}, 8, 1440, True, "14 of 14 factorised layers"),
    "svd": ({"method": "svd"}, 8, 1631, False, "0 of 14 factorised layers"),
    "layer-error": ({"max_layer_error": 0.5}, 8, 1631, False, "max_layer_error is about the dense"),
    "loss-increase": ({"max_loss_increase": 1}, 8, 1631, False, "max_loss_increase is about the"),
    "nothing": ({}, DENSE, 1631, False, "100.0% of the bytes are kept"),
}
"""Keys of compression, every layer's rank, the tokens, and what comes of it. Of 60 sequences 7 are
held back: of 1630 tokens, 190."""


@pytest.mark.parametrize("name", AUTO)
def test_auto_is_on_where_it_pays_and_says_why(name: str, tmp_path: Path, job: Any) -> None:
    asked, rank, tokens, used, reason = AUTO[name]
    config = load_config(pico.job(tmp_path, job("llama", **asked)))
    plan = make_plan(config)
    work: Any = Known(plan, tokens)
    decision = decide(plan, work, {layer.name: rank for layer in plan.layers})
    assert decision.used is used
    assert decision.reason.startswith("auto: ") and reason in decision.reason
    off = replace(config.compression, sequential=False)
    plain = replace(plan, config=replace(config, compression=off))
    decision = decide(plain, work, {layer.name: rank for layer in plan.layers})
    assert not decision.used and decision.reason == "compression.sequential is false"


def test_auto_is_said_in_the_log_and_in_the_report(tmp_path: Path, job: Any) -> None:
    ended = pico.call("compress", pico.job(tmp_path, job("llama", size=0.4)))
    assert ended.code == 0, ended.err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    found = report["sequential"]
    assert found["used"] and "39.7% of the bytes are kept" in found["reason"]
    assert f"compression.sequential: on: {found['reason']}" in ended.err.splitlines()
    assert all(layer["sequential"] for layer in factorised(report))


def test_auto_is_off_with_few_tokens(tmp_path: Path, job: Any) -> None:
    changes = job("llama", size=0.4) | {"calibration.num_sequences": 33}
    _, report = pico.compressed(tmp_path, changes)
    assert not report["sequential"]["used"]
    assert "0 of 13 factorised layers" in report["sequential"]["reason"]
    assert not any("sequential" in layer for layer in report["layers"])


def test_where_many_layers_have_few_tokens_none_is_fitted_sequentially(
    tmp_path: Path, job: Any
) -> None:
    """960 tokens are 15 for each of 64 inputs, not of the 96 of the last layer of a block."""
    changes = job("llama", size=0.4, sequential=True) | {"calibration.num_sequences": 34}
    _, report = pico.compressed(tmp_path, changes)
    assert not report["sequential"]["used"] and report["sequential"]["held_back"] == 0
    reason = report["sequential"]["reason"]
    assert "11 of 13" in reason and "2 have fewer tokens" in reason
    assert not any("sequential" in layer for layer in report["layers"])


def test_a_few_layers_with_few_tokens_are_fitted_plainly(tmp_path: Path, job: Any) -> None:
    """Of BERT's 13 layers the pooler alone reads one token of each sequence."""
    _, report = pico.compressed(tmp_path, job("bert", size=0.5, sequential=True))
    assert report["sequential"]["used"] and "12 of 13" in report["sequential"]["reason"]
    for layer in factorised(report):
        short = layer["name"].endswith("pooler.dense")
        assert layer["sequential"] is not short and not layer["fallback"]
        assert layer["errors"]["output"]["inputs"] == ("calibration" if short else "compressed")
        assert ("fewer than 15 for each" in (layer.get("sequential_reason") or "")) is short


def test_where_every_layer_falls_back_the_bytes_are_those_of_a_plain_run(
    tmp_path: Path, job: Any
) -> None:
    changes = job("llama", size=0.4, sequential=True) | {"calibration.num_sequences": 33}
    output, report = pico.compressed(tmp_path, changes)
    assert not report["sequential"]["used"]
    assert "asked for; 0 of 13" in report["sequential"]["reason"]
    state = pico.read_state(output)
    plain, _ = pico.compressed(tmp_path, changes | {"compression.sequential": False}, "--force")
    assert all(torch.equal(state[key], tensor) for key, tensor in pico.read_state(plain).items())


def test_other_methods_are_fitted_plainly(tmp_path: Path, job: Any) -> None:
    asked = {"size": 0.5, "allocation": "relative", "layers": {"*.up_proj": {"method": "svd"}}}
    _, report = pico.compressed(tmp_path, job("llama", sequential=True, **asked))
    for layer in report["layers"]:
        plain = layer["name"].endswith("up_proj")
        assert layer["sequential"] is not plain
        assert layer.get("sequential_reason") == ("not with method svd" if plain else None)


def test_a_bound_on_layer_errors_is_refused(tmp_path: Path, job: Any) -> None:
    changes = job("llama", max_layer_error=0.3, sequential=True)
    ended = pico.call("compress", pico.job(tmp_path, changes), "-q")
    assert ended.code == 2 and ended.err.count("\n") == 1
    assert "compression.sequential: max_layer_error bounds errors" in ended.err
    assert "sequential: false" in ended.err and not (tmp_path / ".lrc-work").exists()


@pytest.mark.parametrize("method", ["svd", "nuclear"])
def test_methods_without_a_form_on_two_networks_are_refused(
    method: str, tmp_path: Path, job: Any
) -> None:
    ended = pico.call(
        "compress", pico.job(tmp_path, job("llama", method=method, sequential=True)), "-q"
    )
    assert ended.code == 2 and not (tmp_path / ".lrc-work").exists()
    assert f"no layer has method frobenius or curvature, but {method}; set" in ended.err


def test_the_share_that_decides_counts_gained_biases(tmp_path: Path, job: Any) -> None:
    changes = job("llama", method="frobenius", center=True, size=0.4, storage="factors")
    _, report = pico.compressed(tmp_path, changes)
    share = report["size"]["kept_compressible"]
    assert report["sequential"]["reason"].startswith(f"auto: {share:.1%} of the bytes are kept")


def test_a_layer_whose_sequential_solve_fails_is_fitted_plainly(
    tmp_path: Path, job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    solve = fitting.Sequential

    def broken(weight: Tensor, *rest: Any, **options: Any) -> Any:
        if weight.shape == (96, 64):
            raise SolveError("the regularised Gram matrix is not positive definite")
        return solve(weight, *rest, **options)

    monkeypatch.setattr(fitting, "Sequential", broken)
    asked = pico.job(tmp_path, job("llama", size=0.4, sequential=True))
    ended = pico.call("compress", asked, "--strict", "--json")
    assert ended.code == 4 and "layers fell back" in ended.err
    for layer in factorised(json.loads(ended.out)):
        failed = layer["shape"] == [96, 64]
        assert layer["sequential"] is not failed and not layer["fallback"]
        assert ("could not be solved" in layer.get("sequential_reason", "")) == failed


def test_where_every_sequential_solve_fails_the_report_says_so(
    tmp_path: Path, job: Any, checkpoint: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise SolveError("the regularised Gram matrix is not positive definite")

    monkeypatch.setattr(fitting, "Sequential", broken)
    output, report = pico.compressed(tmp_path, job("llama", size=0.4, sequential=True))
    assert not report["sequential"]["used"] and report["sequential"]["held_back"] == 0
    assert "each of them was fitted plainly in the end" in report["sequential"]["reason"]
    found = verify_directory(output, against=checkpoint("llama"))
    assert found.findings.with_status("fails") == []


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, checkpoint: Models, text: Path
) -> Callable[[str], tuple[Changes, Path]]:
    """A model's job, and what it writes when nothing happens."""
    found: dict[str, tuple[Changes, Path]] = {}

    def run(name: str) -> tuple[Changes, Path]:
        if name not in found:
            paths = {"model.path": str(checkpoint(name)), "calibration.path": str(text)}
            changes = paths | MANY | {"compression.size": 0.4, "compression.sequential": True}
            found[name] = changes, pico.compressed(tmp_path_factory.mktemp(name), changes)[0]
        return found[name]

    return run


@pytest.mark.parametrize(
    ("name", "moment", "units"), [("llama", 3, 0), ("llama", 10, 1), ("bert", 12, 2)]
)
def test_a_stopped_run_goes_on_to_the_same_bytes(
    name: str,
    moment: int,
    units: int,
    tmp_path: Path,
    undisturbed: Callable[[str], tuple[Changes, Path]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stopped inside a block, inside the next one, and before the pooler behind the blocks."""
    changes, expected = undisturbed(name)
    install, done = Streams.install, []

    def stopping(*arguments: Any) -> None:
        if len(done) == moment:
            raise RunError("stopped by the test")
        done.append(arguments[1].name)
        install(*arguments)

    monkeypatch.setattr(Streams, "install", stopping)
    config = pico.job(tmp_path, changes)
    ended = pico.call("compress", config, "-q")
    assert ended.code == 1 and "stopped by the test" in ended.err
    monkeypatch.setattr(Streams, "install", install)
    stored = {f: f.stat().st_mtime_ns for f in tmp_path.glob(".lrc-work/*/factors/*/*.safetensors")}
    assert len(stored) == units
    assert pico.call("compress", config, "-q").code == 0
    assert all(file.stat().st_mtime_ns == time for file, time in stored.items())
    for file in expected.glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()
    reports = [json.loads((p / "report.json").read_text()) for p in (expected, tmp_path / "out")]
    assert reports[0]["layers"] == reports[1]["layers"]


@pytest.mark.parametrize("center", [False, True])
def test_what_is_written_is_what_the_second_network_ran_with(
    center: bool, tmp_path: Path, job: Any
) -> None:
    """In another dtype than the source's, biases and embeddings included."""
    changes = job("qwen2", size=0.4, sequential=True, center=center)
    _, report = pico.compressed(tmp_path, changes | {"output.dtype": "float16"})
    assert_errors_as_written(tmp_path, report)


FACTORIES = '''
import torch
from torch import nn


class Experts(nn.Module):
    """Each token goes through the expert that the router picks."""

    def __init__(self):
        super().__init__()
        self.first, self.router = nn.Linear(24, 24), nn.Linear(24, 2)
        self.left, self.right = nn.Linear(24, 24), nn.Linear(24, 24)
        self.last = nn.Linear(24, 16)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        picked = self.router(x).argmax(-1)
        y = torch.empty_like(x)
        y[picked == 0], y[picked == 1] = self.left(x[picked == 0]), self.right(x[picked == 1])
        return self.last(y)


class Twice(nn.Module):
    """One layer runs twice."""

    def __init__(self):
        super().__init__()
        self.first, self.again, self.last = (nn.Linear(24, 24) for _ in range(3))

    def forward(self, x):
        return self.last(self.again(torch.tanh(self.again(torch.tanh(self.first(x))))))


class Branching(nn.Module):
    """Two branches from one input, of which one goes down, up and past itself: a U."""

    def __init__(self):
        super().__init__()
        self.before, self.aside = nn.Linear(24, 32), nn.Linear(24, 16)
        self.down, self.bottom = nn.Linear(32, 20), nn.Linear(20, 20)
        self.up, self.across = nn.Linear(20, 32), nn.Linear(32, 16)
        self.last = nn.Linear(32, 16)

    def forward(self, x):
        top = torch.tanh(self.before(x))
        low = torch.tanh(self.down(top))
        low = torch.tanh(self.bottom(low)) + low
        top = torch.tanh(self.up(low)) + top
        return self.last(torch.cat([torch.tanh(self.across(top)), self.aside(x)], dim=-1))


def experts():
    return Experts()


def branching():
    return Branching()


def twice():
    return Twice()
'''


@pytest.fixture
def plain_job(
    plain_folder: pico.PlainFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Any:
    """Changes for networks that are not transformers', with 1200 calibration rows."""
    for name, source in (("more_factories", FACTORIES), ("pico_factories", pico.FACTORY_SOURCE)):
        (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    generator = torch.Generator().manual_seed(8)
    colour = torch.randn(24, 24, generator=generator)
    save_file(
        {"x": torch.randn(1200, 24, generator=generator) @ colour}, tmp_path / "x.safetensors"
    )

    def changes(name: str, factory: str = "more_factories", **compression: Any) -> Changes:
        namespace: dict[str, Any] = {}
        exec(FACTORIES + pico.FACTORY_SOURCE, namespace)
        torch.manual_seed(3)
        model = namespace[name]()
        pico.randomise(model)
        save_file(model.state_dict(), tmp_path / f"{name}.safetensors")
        return {
            "model.path": str(tmp_path / f"{name}.safetensors"),
            "model.factory": f"{factory}:{name}",
            "calibration.path": str(tmp_path / "x.safetensors"),
            "calibration.num_sequences": 1200,
            "evaluation": [],
            "compression.sequential": True,
            "compression.rank_multiple": 1,
            **{f"compression.{key}": value for key, value in compression.items()},
        }

    return changes


@pytest.mark.parametrize("method", ["frobenius", "curvature"])
def test_a_plain_network_runs_whole(method: str, tmp_path: Path, plain_job: Any) -> None:
    changes = plain_job("mlp", "pico_factories", method=method)
    _, report = pico.compressed(tmp_path, changes)
    assert [layer["sequential"] for layer in report["layers"][:2]] == [True, True]
    assert all(layer["sequential"] for layer in factorised(report))
    assert_errors_as_written(tmp_path, report)


def assert_verified(directory: Path, changes: Changes) -> None:
    factory = changes.get("model.factory")
    options = ["--factory", factory] if factory else []
    ended = pico.call("verify", directory / "out", "--against", changes["model.path"], *options)
    assert ended.code == 0, ended.out + ended.err


@pytest.mark.parametrize("method", ["frobenius", "curvature"])
def test_branches_that_meet_again(method: str, tmp_path: Path, plain_job: Any) -> None:
    """What a layer reads comes by several ways, all of them compressed before it."""
    changes = plain_job("branching", method=method, size=0.5, allocation="uniform")
    _, report = pico.compressed(tmp_path, changes)
    assert {x["name"] for x in report["layers"] if x["sequential"]} >= {"up", "across", "last"}
    assert all(x["storage"] != "dense" for x in report["layers"])
    assert_errors_as_written(tmp_path, report)
    assert_verified(tmp_path, changes)


@pytest.mark.parametrize("name", ["t5-headed", "bart-headed"])
@pytest.mark.parametrize("embeddings", [False, True])
def test_an_encoder_and_a_decoder(embeddings: bool, name: str, tmp_path: Path) -> None:
    """The decoder's layers read what the compressed encoder returns."""
    model = FAMILIES[name].build()
    pico.randomise(model)
    model.save_pretrained(tmp_path / "dense")
    generator = torch.Generator().manual_seed(6)
    ids = {
        "input_ids": torch.randint(4, 64, (96, 12), generator=generator),
        "decoder_input_ids": torch.randint(4, 64, (96, 10), generator=generator),
    }
    save_file(ids, tmp_path / "ids.safetensors")
    changes = {
        "model.path": str(tmp_path / "dense"),
        "calibration.path": str(tmp_path / "ids.safetensors"),
        "calibration.num_sequences": 96,
        "evaluation": None,
        "compression.sequential": True,
        "compression.embeddings": embeddings,
        "compression.size": 0.5,
        "compression.allocation": "uniform",
        "compression.rank_multiple": 1,
    }
    _, report = pico.compressed(tmp_path, changes)
    done = [layer["name"] for layer in report["layers"] if layer["sequential"]]
    cross = ("EncDecAttention.k", "encoder_attn.k_proj")
    assert any(name.endswith(cross) for name in done) and any("encoder." in x for x in done)
    assert_verified(tmp_path, changes)


def test_padding_does_not_count(tmp_path: Path, plain_job: Any) -> None:
    generator = torch.Generator().manual_seed(9)
    lengths = torch.randint(3, 11, (128,), generator=generator)
    mask = (torch.arange(10)[None] < lengths[:, None]).long()
    colour = torch.randn(24, 24, generator=generator)
    x = torch.randn(128, 10, 24, generator=generator) @ colour
    save_file({"x": x, "attention_mask": mask}, tmp_path / "masked.safetensors")
    changes = plain_job("attention", "pico_factories", method="frobenius", size=0.8)
    masked = {"calibration.path": str(tmp_path / "masked.safetensors")}
    changes |= masked | {"calibration.num_sequences": 128}
    _, report = pico.compressed(tmp_path, changes)
    assert report["sequential"]["used"]
    assert_errors_as_written(tmp_path, report)


def test_layers_that_are_not_reached_stay_dense(tmp_path: Path, plain_job: Any) -> None:
    changes = plain_job("with_idle", "pico_factories", method="frobenius", size=0.9)
    _, report = pico.compressed(tmp_path, changes)
    idle = next(layer for layer in report["layers"] if layer["name"] == "idle")
    assert idle["storage"] == "dense" and idle["fallback"] and not idle["sequential"]
    assert idle["sequential_reason"] == "the first calibration sequences do not reach it"
    assert any(layer["sequential"] for layer in report["layers"])


@pytest.mark.parametrize(
    ("name", "layers", "reason"),
    [
        ("experts", ["left", "right"], "the tokens that reach it depend on the layers before it"),
        ("twice", ["again"], "it runs several times in a pass, on several inputs"),
    ],
)
def test_layers_without_one_input_for_every_token_are_fitted_plainly(
    name: str, layers: list[str], reason: str, tmp_path: Path, plain_job: Any
) -> None:
    asked = {"method": "frobenius", "allocation": "uniform", "size": 0.5}
    # A lone row leaves an expert without a token: every storage must take that.
    asked |= {"exclude": ["router"], "storage": "interpolative"}
    _, report = pico.compressed(tmp_path, plain_job(name, **asked))
    assert report["sequential"]["used"]
    for layer in report["layers"]:
        assert layer["storage"] != "dense" and layer["sequential"] is (layer["name"] not in layers)
        assert layer.get("sequential_reason") == (None if layer["sequential"] else reason)


@pytest.mark.parametrize("center", [False, True])
def test_streamed_moments_are_those_of_all_tokens(center: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(300, 20, generator=generator) + 1
    compressed = x + 0.1 * torch.randn(300, 20, generator=generator)
    sums = DriftSum(20, torch.device("cpu"), center=center)
    for start in range(0, 300, 70):
        sums.add(x[start : start + 70], compressed[start : start + 70])
    drift, (a, b) = sums.mean(), (x.double(), compressed.double())
    means = [t.mean(dim=0) if center else torch.zeros(20) for t in (a, b)]
    a, b = a - means[0], b - means[1]
    for found, expected in (
        (drift.compressed, b.T @ b / 300),
        (drift.cross, (a - b).T @ b / 300),
        (drift.drift, (a - b).T @ (a - b) / 300),
        (drift.gram, a.T @ a / 300),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert drift.num_tokens == 300 and (drift.mean is not None) is center
    if drift.mean is not None and drift.mean_compressed is not None:
        torch.testing.assert_close(
            torch.stack([drift.mean, drift.mean_compressed]),
            torch.stack(means),
            rtol=1e-6,
            atol=1e-6,
        )


def test_streamed_moments_around_a_far_mean_keep_their_digits() -> None:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(300, 20, generator=generator) + 1e3
    compressed = x + 0.1 * torch.randn(300, 20, generator=generator) + 10
    sums = DriftSum(20, torch.device("cpu"), center=True)
    for start in range(0, 300, 70):
        sums.add(x[start : start + 70], compressed[start : start + 70])
    drift = sums.mean()
    a, b = (t.double() - t.double().mean(dim=0) for t in (x, compressed))
    for found, expected in (
        (drift.compressed, b.T @ b / 300),
        (drift.cross, (a - b).T @ b / 300),
        (drift.drift, (a - b).T @ (a - b) / 300),
    ):
        assert (found - expected).norm() < 1e-5 * expected.norm()


def test_the_second_network_holds_low_rank_layers(tmp_path: Path, job: Any) -> None:
    """Factors that a layer has are put in its place, and no other layer changes."""
    config = load_config(pico.job(tmp_path, job("llama", sequential=True)))
    plan = make_plan(config)
    batches = list(plan.sequences["calibration"].batches(4))
    streams = Streams(plan, find_chain(plan.network, batches[0]), batches)
    layer = plan.layers[0]
    weight = layer.weight(plan.source)
    streams.install(layer, {layer.keys.weight: weight[:8], layer.keys.up: weight[:, :8]})
    modules = streams.compressed.network.module
    assert isinstance(modules.get_submodule(layer.name), LowRankModule)
    assert not any(isinstance(m, LowRankModule) for m in plan.network.module.modules())
    other = plan.layers[1]
    streams.install(other, {layer.keys.weight: weight[:8]})
    assert not isinstance(modules.get_submodule(other.name), LowRankModule)


def test_factors_of_finished_layers_are_not_in_private_memory(
    tmp_path: Path, job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a deep network they would take as much as its checkpoint."""
    streams: list[Streams] = []

    def opened(*arguments: Any) -> Streams:
        streams.append(Streams(*arguments))
        return streams[-1]

    monkeypatch.setattr(fitting, "Streams", opened)
    pico.compressed(tmp_path, job("llama", size=0.4))
    modules = dict(low_rank_layers(streams[0].compressed.network.module))
    tensors = [tensor for part in modules.values() for tensor in part.state_dict().values()]
    mapped = Path("/proc/self/maps").read_text().splitlines()
    files = [line.split() for line in mapped if str(tmp_path) in line]
    spans = [tuple(int(x, 16) for x in span.split("-")) for span, *_ in files]
    assert len(modules) >= 13
    for tensor in tensors:
        assert any(first <= tensor.data_ptr() < last for first, last in spans)
