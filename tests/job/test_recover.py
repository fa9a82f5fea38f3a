"""Tests of `recover`: factors are trained, measured again, certified, verified and resumed."""

import json
import signal
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from pico import Models, PlainFolder
from process_helpers import start
from recover_helpers import plain_and_trained

from lrc_cli.config import load_config
from lrc_cli.engine import training as training_module
from lrc_cli.engine.training import Training
from lrc_cli.job.recover import scope as scope_module
from lrc_cli.job.recover.model import OutputDivergence
from lrc_cli.job.run import compress
from lrc_cli.job.work import WorkDirectory
from lrc_cli.runtime.progress import Phase

TRAINED = {"recover.scope": "model", "recover.tokens": 8000}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "factors": ("llama", {"compression.storage": "factors"}),
    "interpolative": ("llama", {"compression.storage": "interpolative"}),
    "uniform": ("llama", {"compression.method": "frobenius", "compression.allocation": "uniform"}),
    "sequential": ("llama", {"compression.sequential": True, "compression.size": 0.5}),
    "embeddings": ("llama", {"compression.embeddings": True, "compression.exclude": []}),
    "fp16": ("llama-fp16", {}),
    "cast": ("llama", {"output.dtype": "float32"}),
    "biases": ("qwen2", {}),
    "masked tokens": ("bert-mlm", {}),
    "classes": ("bert-classifier", {}),
    "outputs": ("bert", {}),
    "own data": ("llama", {"recover.num_sequences": 20}),
    "norms": ("llama", {"recover.norms": True, "output.dtype": "float32"}),
    "norms with biases": ("bert-mlm", {"recover.norms": True}),
    "biases in bfloat16": ("opt", {"recover.norms": True}),
}


@pytest.fixture(scope="module", params=list(CASES))
def pair(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    checkpoint: Models,
    text: Path,
) -> tuple[Path, Any, Path, Any]:
    """The outputs and reports of a job without and with training."""
    name, changes = CASES[request.param]
    return plain_and_trained(
        tmp_path_factory, checkpoint(name), text, changes=changes, trained=TRAINED
    )


def test_training_gains_on_sequences_that_it_has_not_seen(
    pair: tuple[Path, Any, Path, Any],
) -> None:
    _, _, _, report = pair
    recovery = report["recovery"]
    assert recovery["after"] < recovery["before"]
    assert recovery["steps"] <= recovery["planned_steps"]
    assert recovery["num_held_out"] >= 1


def test_factors_biases_and_named_norms_move_and_nothing_else(
    pair: tuple[Path, Any, Path, Any],
) -> None:
    plain, before, trained, after = pair
    first, second = pico.read_state(plain), pico.read_state(trained)
    assert {k: (x.shape, x.dtype) for k, x in first.items()} == {
        k: (x.shape, x.dtype) for k, x in second.items()
    }
    moved = {key for key in first if not torch.equal(first[key], second[key])}
    factors = {
        f"{layer}.{name}"
        for layer in pico.factorised_keys(first)
        for name in ("weight", "up.weight")
    }
    biases = {f"{layer}.bias" for layer in pico.factorised_keys(first)} & first.keys()
    norms = set(after["recovery"].get("norms", ()))
    assert moved & factors and moved <= factors | biases | norms
    assert not biases or moved & biases
    asked = load_config(trained / "lrc.yaml").recover.norms
    assert norms == ({key for key in first if "norm" in key.lower()} if asked else set())
    assert not norms or moved & norms
    assert [x["rank"] for x in _layers(before)] == [x["rank"] for x in _layers(after)]
    assert before["size"] == after["size"]


def test_errors_are_those_of_the_trained_factors(pair: tuple[Path, Any, Path, Any]) -> None:
    _, before, trained, after = pair
    assert all(layer["trained"] is True for layer in _layers(after))
    assert not any("trained" in layer for layer in before["layers"])
    ended = pico.call("verify", trained, "--against", _source(after))
    assert ended.code == 0, ended.out
    for id in ("c1.metric", "c2.values", "c2.tolerances", "recovery.after", "recovery.data"):
        assert f"holds: {id}: " in ended.out, id


def test_limits_come_from_sequences_that_nothing_was_trained_on(
    pair: tuple[Path, Any, Path, Any],
) -> None:
    _, before, trained, after = pair
    asked = load_config(trained / "lrc.yaml").recover
    first, second = (x["certificate"]["selection"]["num_sequences"] for x in (before, after))
    assert first == 16
    assert second == (16 if asked.has_own_data else after["recovery"]["num_held_out"])


def _layers(report: Any) -> list[Any]:
    return [layer for layer in report["layers"] if layer["storage"] != "dense"]


def _source(report: Any) -> str:
    import yaml

    return str(yaml.safe_load(report["provenance"]["config"])["model"]["path"])


@pytest.mark.parametrize("name", ["mlp", "pictures", "recurrent", "attention"])
def test_plain_modules_are_trained_too(
    name: str, tmp_path: Path, plain_folder: PlainFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(plain_folder.path)
    changes = plain_folder.model(name) | TRAINED | {"compression.method": "svd"}
    _, report = pico.compressed(tmp_path, changes)
    recovery = report["recovery"]
    assert recovery["after"] <= recovery["before"]
    # A recurrent network on 35 short sequences may gain nothing; it is then written as it was.
    assert name == "recurrent" or recovery["after"] < recovery["before"]
    assert report["recovery"]["objective"].startswith("half the squared change")


@pytest.mark.parametrize("killed_after", [1, 3, 4, 7])
def test_a_killed_training_goes_on_with_the_same_bits(
    killed_after: int,
    tmp_path: Path,
    checkpoint: Models,
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changes = {"model.path": str(checkpoint("llama")), "calibration.path": str(text), **TRAINED}
    whole, _ = pico.compressed(tmp_path, changes | {"output.path": str(tmp_path / "whole")})
    monkeypatch.setattr(scope_module, "STORE_SECONDS", 0.0)
    steps = []
    run = Training.run

    def killed(training: Training) -> Any:
        for done in run(training):
            yield done
            steps.append(done)
            if len(steps) == killed_after:
                raise KeyboardInterrupt

    monkeypatch.setattr(Training, "run", killed)
    job = pico.job(
        tmp_path,
        changes | {"output.path": str(tmp_path / "again"), "runtime.work_dir": str(tmp_path / "w")},
    )
    with pytest.raises(KeyboardInterrupt):
        compress(load_config(job))
    states = list((tmp_path / "w").rglob("unfinished/state.safetensors"))
    assert len(states) == 1
    compress(load_config(job))
    assert len(steps) > killed_after
    first, second = pico.read_state(whole), pico.read_state(tmp_path / "again")
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())
    assert not list((tmp_path / "w").rglob("state.safetensors"))


def test_trained_factors_are_used_again(tmp_path: Path, checkpoint: Models, text: Path) -> None:
    changes = {"model.path": str(checkpoint("llama")), "calibration.path": str(text), **TRAINED}
    work = {"runtime.work_dir": str(tmp_path / "w")}
    _, first = pico.compressed(tmp_path, changes | work)
    _, again = pico.compressed(tmp_path, changes | work | {"output.path": str(tmp_path / "b")})
    assert "recover" in first["timing"] and "recover" not in again["timing"]
    assert first["recovery"] == again["recovery"]
    other = changes | work | {"recover.tokens": 2000, "output.path": str(tmp_path / "c")}
    _, third = pico.compressed(tmp_path, other)
    assert "recover" in third["timing"] and "factors" not in third["timing"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"compression.max_layer_error": 0.4}, "max_layer_error"),
        ({"compression.max_loss_increase": 0.4}, "max_loss_increase"),
        ({"compression.center": True}, "compression.center"),
        ({"compression.method": "relu", "model": "opt"}, "relu"),
        ({"recover.part": [0.0, 0.5]}, "recover.part"),
        ({"recover.tokens": 0}, "recover.tokens"),
        ({"recover.minutes": 3}, "recover.minutes"),
        ({"recover.tokens": "auto", "recover.minutes": 0}, "recover.minutes"),
        ({"recover.scope": "everything"}, "recover.scope"),
        ({"recover.path": "nowhere.txt"}, "nowhere.txt"),
        ({"calibration.num_sequences": 1}, "recover"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    changes: dict[str, Any], words: str, tmp_path: Path, checkpoint: Models, text: Path
) -> None:
    changes = dict(changes)
    model = checkpoint(changes.pop("model", "llama"))
    base = {"model.path": str(model), "calibration.path": str(text)}
    ended = pico.call("compress", pico.job(tmp_path, base | TRAINED | changes))
    assert ended.code == 2, ended.err
    assert words in ended.err
    assert not (tmp_path / "out").exists()


def test_evaluation_is_drawn_as_without_training(
    tmp_path: Path, checkpoint: Models, text: Path
) -> None:
    changes = {"model.path": str(checkpoint("llama")), "calibration.path": str(text)}
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    _, plain = pico.compressed(tmp_path / "a", changes)
    own = TRAINED | {"recover.num_sequences": 30}
    output, trained = pico.compressed(tmp_path / "b", changes | own)
    assert plain["quality"][0]["sha256"] == trained["quality"][0]["sha256"]
    assert trained["recovery"]["num_sequences"] + trained["recovery"]["num_held_out"] == 30
    assert json.loads((output / "report.json").read_text())["recovery"] == trained["recovery"]


SOURCE = """
import itertools, os, pico_factories
import torch
from torch import nn


class Net(nn.Module):
    in_training = 0

    def __init__(self):
        super().__init__()
        for name, part in pico_factories.mlp().named_children():
            self.add_module(name, part)

    def forward(self, x):
        for part in self.children():
            x = part(x)
        if torch.is_grad_enabled() and x.requires_grad:
            Net.in_training += 1
            if Net.in_training == AT:
                RAISE
        return x
"""

FAILURES: dict[str, tuple[str, str]] = {
    "ValueError": ("raise ValueError('worn out')", "ValueError: worn out, in module Net"),
    "SystemExit": ("raise SystemExit(0)", "SystemExit: 0, in module Net"),
    "RecursionError": ("raise RecursionError", "in module Net"),
    "MemoryError": ("raise MemoryError", "recover.scope: out of memory in the training"),
    "OSError": ("raise OSError(28, 'No space left on device')", "No space left on device"),
    "None": ("return None", "returns NoneType"),
    "fewer columns": ("return x[:, :3]", "outputs of the network Net cannot be compared"),
    "fewer rows": ("return x[:2]", "outputs of the network Net cannot be compared"),
    "no tensor": ("return ()", "outputs of the network Net cannot be compared"),
    "no gradient": ("return x.detach()", "outputs of the network Net cannot be compared"),
}


@pytest.mark.parametrize("at", [1, 30])
@pytest.mark.parametrize("kind", FAILURES)
def test_a_network_that_fails_in_training_ends_in_a_sentence_and_the_job_goes_on(
    kind: str, at: int, tmp_path: Path, plain_folder: PlainFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    error, said = FAILURES[kind]
    monkeypatch.syspath_prepend(plain_folder.path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(scope_module, "STORE_SECONDS", 0.0)
    name = f"trained_{kind.replace(' ', '_')}_{at}"
    (tmp_path / f"{name}.py").write_text(SOURCE.replace("AT", str(at)).replace("RAISE", error))
    changes = plain_folder.model("mlp") | TRAINED | {"compression.method": "svd"}
    job = pico.job(tmp_path, changes | {"model.factory": f"{name}:Net"})
    ended = pico.call("compress", job, "-q")
    assert ended.code == 1 and ended.err.count("error: ") == 1, ended.err
    assert said in ended.err and "Traceback" not in ended.err and "raised in" not in ended.err
    assert not (tmp_path / "out").exists()
    # The failure has passed: the same command goes on, and ends as a calm run does.
    assert pico.call("compress", job, "-q").code == 0
    found = pico.read_state(tmp_path / "out")
    other = pico.job(
        tmp_path,
        changes
        | {
            "model.factory": f"{name}:Net",
            "output.path": str(tmp_path / "calm"),
            "runtime.work_dir": str(tmp_path / "w"),
        },
    )
    assert pico.call("compress", other, "-q").code == 0
    calm = pico.read_state(tmp_path / "calm")
    assert all(torch.equal(tensor, calm[key]) for key, tensor in found.items())


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("at", [1, 30])
def test_a_step_that_is_not_finite_ends_the_training_with_the_best(
    at: int, value: str, tmp_path: Path, plain_folder: PlainFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(plain_folder.path)
    monkeypatch.syspath_prepend(tmp_path)
    name = f"trained_{value}_{at}"
    text = SOURCE.replace("== AT", f">= {at}").replace("RAISE", f"return x * float('{value}')")
    (tmp_path / f"{name}.py").write_text(text)
    changes = plain_folder.model("mlp") | TRAINED | {"compression.method": "svd"}
    job = pico.job(tmp_path, changes | {"model.factory": f"{name}:Net"})
    ended = pico.call("compress", job, "-q")
    assert ended.code == 0, ended.err
    recovery = json.loads((tmp_path / "out" / "report.json").read_text())["recovery"]
    assert recovery["after"] <= recovery["before"]
    assert all(x.isfinite().all() for x in pico.read_state(tmp_path / "out").values())


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("asked", ["tokens", "minutes"])
def test_a_start_that_is_not_finite_is_one_sentence(
    value: str,
    asked: str,
    tmp_path: Path,
    plain_folder: PlainFolder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(plain_folder.path)
    monkeypatch.setattr(OutputDivergence, "held_out", lambda _: float(value))
    length = {"tokens": TRAINED, "minutes": {"recover.scope": "model", "recover.minutes": 0.1}}
    changes = plain_folder.model("mlp") | length[asked] | {"compression.method": "svd"}
    ended = pico.call("compress", pico.job(tmp_path, changes), "-q")
    assert ended.code == 1 and ended.err.count("error: ") == 1, ended.err
    assert "is not finite before the training; set runtime.dtype: float32" in ended.err
    assert not (tmp_path / "out").exists()


def test_a_state_that_cannot_be_stored_ends_the_run_as_any_unit_does(
    tmp_path: Path, plain_folder: PlainFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(plain_folder.path)
    monkeypatch.setattr(scope_module, "STORE_SECONDS", 0.0)
    put, failed = WorkDirectory.put, []

    def full(work: WorkDirectory, stage: str, unit: str, *rest: Any) -> None:
        if unit == scope_module.STATE and not failed:
            failed.append(stage)
            raise OSError(28, "No space left on device", str(work.root))
        put(work, stage, unit, *rest)

    monkeypatch.setattr(WorkDirectory, "put", full)
    changes = plain_folder.model("mlp") | TRAINED | {"compression.method": "svd"}
    job = pico.job(tmp_path, changes)
    ended = pico.call("compress", job, "-q")
    assert ended.code == 1 and "No space left on device; make room on the disk" in ended.err
    assert not (tmp_path / "out").exists()
    assert pico.call("compress", job, "-q").code == 0


def test_a_training_that_gains_nothing_is_said_to_and_moves_nothing(
    tmp_path: Path, checkpoint: Models, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {
        "model.path": str(checkpoint("opt")),
        "calibration.path": str(text),
        "compression.method": "frobenius",
        "certification": {"num_sequences": 12, "part": [0.6, 1.0]},
    }
    (tmp_path / "plain").mkdir()
    plain, _ = pico.compressed(tmp_path / "plain", changes)
    take = Training.take
    monkeypatch.setattr(Training, "take", lambda self, step, rate: take(self, step, 0.0))
    output, report = pico.compressed(tmp_path, changes | TRAINED | {"recover.norms": True})
    recovery = report["recovery"]
    assert recovery["after"] == recovery["before"] and "norms" not in recovery
    assert not any("trained" in layer for layer in report["layers"])
    first, second = pico.read_state(plain), pico.read_state(output)
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())
    assert "did not lower" in (output / "README.md").read_text()
    ended = pico.call("verify", output, "--against", changes["model.path"])
    # The factors are as they were before, so the objective before the training is measured too.
    assert ended.code == 0 and "recovery.before" not in ended.out, ended.out


def test_half_precision_trains_as_well_as_single_precision(
    tmp_path: Path, checkpoint: Models, text: Path
) -> None:
    """Gradients of single tokens are lost in float16 unless they are scaled."""
    changes = {
        "model.path": str(checkpoint("llama-fp16")),
        "calibration.path": str(text),
        "compression.method": "frobenius",
        **TRAINED,
    }
    gained = {}
    for dtype in ("float32", "float16"):
        (tmp_path / dtype).mkdir()
        _, report = pico.compressed(tmp_path / dtype, changes | {"runtime.dtype": dtype})
        gained[dtype] = report["recovery"]["after"] / report["recovery"]["before"]
    assert gained["float16"] < 1 and abs(gained["float16"] - gained["float32"]) < 0.1, gained


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
def test_a_training_by_minutes_that_is_stopped_goes_on_and_is_repeated_by_tokens(
    number: signal.Signals, tmp_path: Path, checkpoint: Models, text: Path
) -> None:
    """The length is measured once and stored; the machine may be faster when the run goes on."""
    changes = {
        "model.path": str(checkpoint("llama")),
        "calibration.path": str(text),
        "compression.method": "frobenius",
        "recover.scope": "model",
        "recover.minutes": 0.1,
        "runtime.work_dir": str(tmp_path / "w"),
    }
    job = pico.job(tmp_path, changes)
    running = start(["compress", job], tmp_path / "log")
    code = running.stop_when(lambda: any((tmp_path / "w").rglob("state.safetensors")), number)
    assert code == (130 if number == signal.SIGINT else 128 + number)
    assert not (tmp_path / "out").exists()
    report = compress(load_config(job))
    recovery = report["recovery"]
    assert recovery["planned_tokens"] > 0 and report["target"]["met"]
    again = {
        "recover.minutes": None,
        "recover.tokens": recovery["planned_tokens"],
        "runtime.work_dir": None,
        "output.path": str(tmp_path / "again"),
    }
    repeated = compress(load_config(pico.job(tmp_path, changes | again)))
    assert repeated["recovery"] == recovery
    first, second = pico.read_state(tmp_path / "out"), pico.read_state(tmp_path / "again")
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())


@pytest.mark.parametrize("trials", [1, 3, 6])
def test_the_display_comes_to_its_end_whatever_the_search_takes(
    trials: int, tmp_path: Path, plain_folder: PlainFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(plain_folder.path)
    shown: dict[str, tuple[float, float]] = {}
    close = Phase.close

    def closed(phase: Phase) -> None:
        shown[phase.name] = phase.done, phase.cost
        close(phase)

    monkeypatch.setattr(Phase, "close", closed)
    monkeypatch.setattr(Training, "_places", lambda _: iter(range(trials)))
    monkeypatch.setattr(training_module, "PATIENCE", 100)
    changes = plain_folder.model("mlp") | TRAINED | {"compression.method": "svd"}
    report = compress(load_config(pico.job(tmp_path, changes)))
    assert report["recovery"]["steps"] == report["recovery"]["planned_steps"]
    done, cost = shown["recover"]
    assert done == pytest.approx(cost, rel=0.15)
