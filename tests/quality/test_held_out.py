"""Measurements on certification data are held against a slow reference, end to end."""

import copy
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html import unescape
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from pico import Models
from safetensors.torch import save_file
from torch import Tensor, nn

import lrc_cli
from lrc_cli.checkpoint.source import open_source
from lrc_cli.config import load_config
from lrc_cli.data.draw import Purpose, Sequences, draw
from lrc_cli.data.processors import Processors
from lrc_cli.errors import RunError
from lrc_cli.execution.network import Network, make_network
from lrc_cli.job.plan import Plan, make_plan
from lrc_cli.network.layer import Layer
from lrc_cli.network.opening import open_module
from lrc_cli.quality import held_out
from lrc_cli.quality.compare import scoring
from lrc_cli.quality.held_out import ERRORS, Measured, measure
from lrc_cli.quality.per_sequence import ratio

NUMBER = 9
"""The number of certification sequences of the jobs below."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Holds a finished job with both of its networks."""

    name: str
    output: Path
    report: dict[str, Any]
    plan: Plan
    written: Network

    @property
    def layers(self) -> list[Layer]:
        stored = {x["name"]: x["storage"] for x in self.report["layers"]}
        return [layer for layer in self.plan.layers if stored[layer.name] != "dense"]

    def measured(self, **changes: Any) -> Measured:
        """Returns what `measure` says of the certification sequences."""
        sequences = self.plan.sequences["certification"]
        probe = next(sequences.batches(1))
        given: dict[str, Any] = {
            "before": self.plan.network,
            "after": self.written,
            "sequences": sequences,
            "layers": self.layers,
            "loss": scoring(self.plan.network, probe, self.plan.tokenizer),
            "seed": self.plan.config.runtime.seed,
        }
        return measure(**(given | changes))


def finished(directory: Path, name: str, changes: dict[str, Any]) -> Outcome:
    output, report = pico.compressed(directory, changes)
    plan = make_plan(load_config(output / "lrc.yaml"), force=True)
    source = open_source(output, factorised=True)
    module, source = open_module(source, factory=plan.config.model.factory)
    written = make_network(module, device=plan.device, dtype=plan.network.dtype)
    return Outcome(name=name, output=output, report=report, plan=plan, written=written)


NAMES = ("llama", "bert", "bert-mlm", "bert-classifier", "mlp", "attention")
UNMASKED = [name for name in NAMES if name != "bert-mlm"]
"""The networks whose inputs are the drawn ones, with nothing masked at random."""
PLAIN = ("mlp", "attention")


@pytest.fixture(scope="module")
def outcomes(
    tmp_path_factory: pytest.TempPathFactory,
    checkpoint: Models,
    text: Path,
    plain_folder: pico.PlainFolder,
) -> Iterator[Callable[[str], Outcome]]:
    done: dict[str, Outcome] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(plain_folder.path)

        def get(name: str) -> Outcome:
            if name not in done:
                changes = {"certification.num_sequences": NUMBER}
                if name in PLAIN:
                    changes |= plain_folder.model(name) | {"evaluation": []}
                    changes["compression.method"] = "frobenius"
                else:
                    changes |= {"model.path": str(checkpoint(name)), "evaluation": []}
                    changes |= {"calibration.path": str(text), "certification.part": [0.6, 1.0]}
                done[name] = finished(tmp_path_factory.mktemp(name), name, changes)
            return done[name]

        yield get


@pytest.fixture(params=NAMES)
def outcome(request: pytest.FixtureRequest, outcomes: Callable[[str], Outcome]) -> Outcome:
    return outcomes(request.param)


# ---------------------------------------------------------------- a slow reference


def one_sequence(outcome: Outcome, index: int) -> dict[str, Tensor]:
    """Returns the real tokens of one certification sequence, without padding."""
    inputs = outcome.plan.sequences["certification"].inputs
    row = {name: tensor[index : index + 1] for name, tensor in inputs.items()}
    mask = row.get("attention_mask")
    if mask is None:
        return row
    return {name: tensor[:, : int(mask.sum())] for name, tensor in row.items()}


def reference_networks(outcome: Outcome) -> tuple[nn.Module, nn.Module]:
    """Returns the dense network, and one of multiplied-out weights, in float64."""
    factory = outcome.plan.config.model.factory
    dense = lrc_cli.load(outcome.plan.source.path, factory=factory, dtype=torch.float64)
    rebuilt = copy.deepcopy(dense)
    state = pico.rebuilt(pico.read_state(outcome.output))
    rebuilt.load_state_dict({key: t.double() for key, t in state.items()}, strict=False)
    return dense, rebuilt


def run_watched(model: nn.Module, batch: dict[str, Tensor], names: list[str]) -> tuple[Any, Any]:
    """Returns the outputs and every named layer's input rows (t, n)."""
    seen: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _, inputs, __, name=name: seen.update({name: inputs[0].flatten(0, -2).clone()})
        )
        for name in names
    ]
    inputs = {k: t.double() if t.is_floating_point() else t for k, t in batch.items()}
    with torch.no_grad():
        outputs = model(**inputs) if len(inputs) > 1 or hasattr(model, "config") else None
        outputs = model(*inputs.values()) if outputs is None else outputs
    for handle in handles:
        handle.remove()
    return outputs, seen


def reference_layers(outcome: Outcome, index: int) -> dict[str, dict[str, float]]:
    """Returns every layer's four relative errors on one sequence, from the weights."""
    names = [layer.name for layer in outcome.layers]
    dense, rebuilt = reference_networks(outcome)
    batch = one_sequence(outcome, index)
    _, before = run_watched(dense, batch, names)
    _, after = run_watched(rebuilt, batch, names)
    found = {}
    for name in names:
        w = dense.get_submodule(name).weight
        z = rebuilt.get_submodule(name).weight
        x, x_after = before[name].T, after[name].T
        errors = {
            "deployed": w @ x - z @ x_after,
            "inherited": w @ (x - x_after),
            "new": (w - z) @ x_after,
            "same_input": (w - z) @ x,
        }
        found[name] = {kind: (e.norm() / (w @ x).norm()).item() for kind, e in errors.items()}
    return found


@pytest.mark.parametrize("name", UNMASKED)
def test_layer_errors_equal_a_slow_reference(name: str, outcomes: Callable[[str], Outcome]) -> None:
    outcome = outcomes(name)
    measured = outcome.measured().layers
    assert set(measured) == {layer.name for layer in outcome.layers} != set()
    for index in (0, NUMBER - 1):
        for layer, errors in reference_layers(outcome, index).items():
            for kind, expected in errors.items():
                value = measured[layer].relative(kind)[index].item()
                assert value == pytest.approx(expected, rel=2e-3, abs=2e-5), (layer, kind)


def reference_values(outcome: Outcome, index: int) -> dict[str, float]:
    """Returns the values of one sequence of networks that mask nothing at random."""
    batch = one_sequence(outcome, index)
    before, after = (run_watched(model, batch, [])[0] for model in reference_networks(outcome))
    if outcome.name == "llama":
        wanted = batch["input_ids"][0, 1:]
        sides = [side.logits[0, :-1].log_softmax(-1) for side in (before, after)]
        losses = [-side[range(len(wanted)), wanted].mean().item() for side in sides]
        return predictions(*sides) | {"loss_difference": losses[1] - losses[0]}
    logits = getattr(before, "logits", None)
    first = before if isinstance(before, Tensor) else before[0]
    second = after if isinstance(after, Tensor) else after[0]
    error = {"relative_output_error": ((second - first).norm() / first.norm()).item()}
    if logits is None:
        return error
    return error | predictions(first.log_softmax(-1), second.log_softmax(-1))


def predictions(old: Tensor, new: Tensor) -> dict[str, float]:
    changed = old.argmax(-1) != new.argmax(-1)
    kl = (old.exp() * (old - new)).sum(-1).mean().item()
    return {"kl": kl, "top1_disagreement": changed.double().mean().item()}


@pytest.mark.parametrize("name", UNMASKED)
def test_values_equal_a_slow_reference(name: str, outcomes: Callable[[str], Outcome]) -> None:
    outcome = outcomes(name)
    measured = outcome.measured().values
    for index in (0, NUMBER - 1):
        expected = reference_values(outcome, index)
        assert set(measured) == set(expected)
        for quantity, value in expected.items():
            assert measured[quantity][index] == pytest.approx(value, rel=2e-3, abs=2e-5), quantity


def test_masked_tokens_are_scored_where_they_are_masked(
    outcomes: Callable[[str], Outcome],
) -> None:
    outcome = outcomes("bert-mlm")
    measured = outcome.measured().values
    assert set(measured) == {"kl", "top1_disagreement", "loss_difference"}
    assert outcome.measured().values == measured
    assert outcome.measured(seed=1).values != measured


# ---------------------------------------------------------------- properties


def test_the_deployed_error_is_at_most_inherited_and_new(outcome: Outcome) -> None:
    for errors in outcome.measured().layers.values():
        deployed, inherited, new = map(errors.relative, ("deployed", "inherited", "new"))
        assert bool((deployed <= inherited + new + 1e-6).all())
        assert errors.overall("deployed") <= errors.overall("inherited") + errors.overall("new")


def test_an_unchanged_network_has_no_error_at_all(outcome: Outcome) -> None:
    plan = outcome.plan
    again, _ = open_module(plan.source, factory=plan.config.model.factory)
    network = make_network(again, device=plan.device, dtype=plan.network.dtype)
    measured = outcome.measured(after=network)
    assert all(value == 0.0 for values in measured.values.values() for value in values)
    for errors in measured.layers.values():
        assert all(errors.overall(kind) == 0.0 for kind in ERRORS)
        assert all(bool((errors.relative(kind) == 0).all()) for kind in ERRORS)


def test_the_micro_batch_does_not_matter(outcome: Outcome, monkeypatch: pytest.MonkeyPatch) -> None:
    together = outcome.measured()
    monkeypatch.setattr(held_out, "MICRO_BATCH_TOKENS", 1)
    alone = outcome.measured()
    for quantity, values in together.values.items():
        assert alone.values[quantity] == pytest.approx(values, rel=1e-3, abs=1e-5)
    for name, errors in together.layers.items():
        assert torch.allclose(
            alone.layers[name].relative("deployed"), errors.relative("deployed"), rtol=1e-3
        )


def test_padding_counts_nowhere(outcomes: Callable[[str], Outcome]) -> None:
    outcome = outcomes("attention")
    sequences = outcome.plan.sequences["certification"]
    noise = sequences.inputs["x"].clone()
    noise[sequences.inputs["attention_mask"] == 0] = 1e3
    inputs = {**sequences.inputs, "x": noise}
    other = Sequences(name="noise", inputs=inputs, population=NUMBER, sha256="")
    expected, found = outcome.measured(), outcome.measured(sequences=other)
    for quantity, values in expected.values.items():
        assert found.values[quantity] == pytest.approx(values, rel=1e-5)
    for name, errors in expected.layers.items():
        assert torch.allclose(found.layers[name].energy, errors.energy, rtol=1e-5)


def test_outputs_that_are_not_finite_stop_the_run(outcomes: Callable[[str], Outcome]) -> None:
    outcome = outcomes("mlp")
    broken = copy.deepcopy(outcome.written.module)
    with torch.no_grad():
        broken.get_submodule("4").bias.fill_(math.nan)
    network = make_network(broken, device=outcome.plan.device, dtype=outcome.plan.network.dtype)
    with pytest.raises(RunError, match=r"no finite|NaN or infinity"):
        outcome.measured(after=network)


# ---------------------------------------------------------------- end to end


def test_the_report_the_card_and_the_page_say_the_same(outcome: Outcome) -> None:
    certificate = outcome.report["certificate"]
    assert certificate["num_sequences"] == NUMBER and certificate["note"] is None
    card = (outcome.output / "README.md").read_text()
    page = unescape((outcome.output / "report.html").read_text())
    mean = next(s for s in certificate["statements"] if s["kind"] == "mean")
    assert mean["status"] == "certified"
    assert mean["text"] in card.replace("\\", "") and mean["bound"] > 0
    assert "cannot certify: N = 9 <" in card and "cannot certify: N = 9 <" in page
    assert mean["text"] in page
    assert certificate["data_sha256"] in card and certificate["data_sha256"] in page
    assert certificate["data_sha256"] == outcome.plan.sequences["certification"].sha256
    measured = outcome.measured()
    for quantity, values in measured.values.items():
        assert certificate["values"][quantity] == pytest.approx(values, rel=1e-6)
    for layer in outcome.report["layers"]:
        if layer["storage"] != "dense":
            found = layer["errors"]["held_out"]
            for kind in ERRORS:
                assert found[kind] == pytest.approx(measured.layers[layer["name"]].overall(kind))
            assert found["num_sequences"] == NUMBER and found["worst_sequence"] >= 0
            assert found["tolerance"] == certificate["tolerances"][layer["name"]]


def test_tolerances_are_the_largest_errors_on_calibration_sequences(
    outcomes: Callable[[str], Outcome],
) -> None:
    outcome = outcomes("llama")
    calibration = outcome.plan.sequences["calibration"]
    measured = outcome.measured(sequences=calibration)
    certificate = outcome.report["certificate"]
    assert certificate["selection"] == {
        "purpose": "calibration",
        "num_sequences": len(calibration),
        "num_tokens": calibration.num_tokens,
        "sha256": calibration.sha256,
    }
    for name, tolerance in certificate["tolerances"].items():
        largest = measured.layers[name].relative("same_input").max().item()
        assert tolerance == pytest.approx(largest)
    assert certificate["clips"]["kl"] == pytest.approx(4 * max(measured.values["kl"]))


def test_a_sequential_layer_is_held_to_its_deployed_error(
    tmp_path: Path, llama_job: dict[str, Any]
) -> None:
    changes = llama_job | {
        "calibration.num_sequences": 60,
        "certification.num_sequences": 5,
        "certification.part": [0.6, 1.0],
        "compression.sequential": True,
        "evaluation": [],
    }
    outcome = finished(tmp_path, "llama", changes)
    fitted = {x["name"]: x["sequential"] for x in outcome.report["layers"] if "errors" in x}
    assert any(fitted.values())
    measured = outcome.measured().layers
    for layer in outcome.report["layers"]:
        if "errors" in layer:
            kind = "deployed" if layer["sequential"] else "same_input"
            worst = measured[layer["name"]].relative(kind).max().item()
            assert layer["errors"]["held_out"]["worst_sequence"] == pytest.approx(worst)


def test_selection_data_are_as_long_as_a_certification_sequence(
    tmp_path: Path, llama_job: dict[str, Any]
) -> None:
    changes = llama_job | {
        "certification.num_sequences": 5,
        "certification.part": [0.6, 1.0],
        "certification.sequence_length": 8,
        "evaluation": [],
    }
    _, report = pico.compressed(tmp_path, changes)
    selection = report["certificate"]["selection"]
    assert selection["num_sequences"] == 12 and selection["num_tokens"] == 12 * 8
    assert report["certificate"]["unit"] == "sequence of 8 tokens"


def test_nothing_was_fitted_to_the_certification_data(outcomes: Callable[[str], Outcome]) -> None:
    outcome = outcomes("mlp")
    drawn = {name: s.inputs["x"] for name, s in outcome.plan.sequences.items()}
    distances = torch.cdist(drawn["calibration"], drawn["certification"])
    assert distances.min() > 1e-3
    population = outcome.report["certificate"]["population"]
    assert population["size"] == 64 - 40
    assert "24 rows of rows.safetensors" in population["description"]


def test_without_certification_the_report_says_that_there_is_none(
    tmp_path: Path, llama_job: dict[str, Any]
) -> None:
    output, report = pico.compressed(tmp_path, llama_job)
    assert report["certificate"]["statements"] == []
    assert "none was asked for" in report["certificate"]["note"]
    assert "There is no certificate" in (output / "README.md").read_text()
    assert not any("held_out" in layer.get("errors", {}) for layer in report["layers"])


def test_a_layer_that_no_token_reaches_is_named_and_not_certified(
    tmp_path: Path, plain_folder: pico.PlainFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(plain_folder.path)
    changes = plain_folder.model("with_idle") | {"compression.method": "svd", "evaluation": []}
    changes |= {"certification.num_sequences": 5, "compression.size": 0.8}
    _, report = pico.compressed(tmp_path, changes)
    certificate = report["certificate"]
    assert certificate["not_covered"] == ["idle"]
    assert any("No statement covers idle" in line for line in certificate["assumptions"])
    assert "idle" not in certificate["tolerances"] and "used" in certificate["tolerances"]


def test_the_command_prints_the_certificate(tmp_path: Path, llama_job: dict[str, Any]) -> None:
    changes = llama_job | {"certification.num_sequences": 5, "certification.part": [0.6, 1.0]}
    ended = pico.call("compress", pico.job(tmp_path, changes))
    assert ended.code == 0, ended.err
    assert "certificate:\n- Together with the other statements at 95 % confidence" in ended.err


# ---------------------------------------------------------------- bounds on a whole population


def holds(statement: dict[str, Any], certificate: dict[str, Any], values: list[float]) -> bool:
    """Returns whether a statement is true of every sequence of the population."""
    if statement["kind"] == "mean":
        low, high = statement["clip"]
        clipped = [min(max(value, low), high) for value in values]
        return math.fsum(clipped) / len(clipped) <= statement["bound"]
    covered = sum(value <= statement["bound"] for value in values)
    return covered >= certificate["quantile"] * len(values)


def test_bounds_hold_on_the_whole_population_and_wrong_ones_do_not(
    tmp_path: Path, llama_job: dict[str, Any], text: Path
) -> None:
    changes = llama_job | {
        "certification.num_sequences": 45,
        "certification.part": [0.6, 1.0],
        "certification.confidence": 0.9,
        "certification.quantile": 0.9,
        "evaluation": [],
    }
    outcome = finished(tmp_path, "llama", changes)
    certificate = json.loads((outcome.output / "report.json").read_text())["certificate"]
    size = certificate["population"]["size"]
    purpose = Purpose(
        name="everything",
        path=text,
        part=(0.6, 1.0),
        sequence_length=pico.LENGTH,
        num_sequences=size,
        required=True,
    )
    everything = draw([purpose], processors=Processors(tokenizer=outcome.plan.tokenizer), seed=1)[
        "everything"
    ]
    measured = outcome.measured(sequences=everything)
    tolerances = certificate["tolerances"]
    ratios = [measured.layers[n].relative("same_input") / t for n, t in tolerances.items()]
    values = measured.values | {"all_layers": torch.stack(ratios).amax(0).tolist()}
    statements = [s for s in certificate["statements"] if s["status"] == "certified"]
    assert len(statements) == certificate["num_statements"] == 7
    for statement in statements:
        own = values[statement["quantity"]]
        assert holds(statement, certificate, own), statement["text"]
        planted = sorted(own)[size // 2] if statement["kind"] == "quantile" else min(own)
        assert not holds(statement | {"bound": planted}, certificate, own)


@pytest.mark.parametrize(
    ("error", "energy", "expected"),
    [(0.0, 0.0, 0.0), (4.0, 1.0, 2.0), (1e-30, 0.0, 2.0**24), (1.0, 1e-300, 2.0**24)],
)
def test_an_error_relative_to_nothing_counts_as_a_large_one(
    error: float, energy: float, expected: float
) -> None:
    """It is never infinite or NaN: `sorted` would call a NaN the smallest of a sample."""
    found = ratio(torch.tensor([error]).double(), torch.tensor([energy]).double())
    assert found.item() == pytest.approx(expected, rel=1e-12)
    assert math.isnan(ratio(torch.tensor([math.inf]), torch.tensor([1.0])).item())


def test_rows_whose_outputs_are_zero_are_certified_and_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a free bias the layers' outputs for rows of zeros are nothing but an error."""
    folder = pico.write_plain(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "pico_factories", raising=False)
    x = torch.randn(300, 24, generator=torch.Generator().manual_seed(0))
    x[::3] = 0
    save_file({"x": x}, tmp_path / "rows.safetensors")
    file = tmp_path / "mlp.safetensors"
    state = pico.read_state(file)
    # Nothing passes the first ReLU for a row of zeros, and no bias is added at the end.
    state |= {k: 0 * t for k, t in state.items() if k.endswith("bias")}
    state["0.bias"] = state["0.bias"] - 0.1
    save_file(state, file)
    changes = {"certification.num_sequences": 130, "compression.method": "frobenius"}
    changes |= folder.model("mlp") | {"compression.center": True}
    output, report = pico.compressed(tmp_path, changes)
    assert "Infinity" not in json.dumps(report) and "NaN" not in json.dumps(report)
    bounds = {s["id"]: s["bound"] for s in report["certificate"]["statements"]}
    assert bounds["all_layers.quantile"] > 0
    arguments = ("--against", file, "--factory", "pico_factories:mlp")
    ended = pico.call("verify", output, *arguments)
    assert ended.code == 0, ended.out
