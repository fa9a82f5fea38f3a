"""`lrc verify`: what holds, what fails, and which damage is caught by what."""

import importlib
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
import verify_helpers as damage
from pico import Models
from safetensors.torch import save_file

from lrc_cli.config import Compression, canonical
from lrc_cli.verify import verify_directory
from lrc_cli.verify.command import Verified
from lrc_cli.verify.files.confidence_bounds import (
    binomial_tail,
    hypergeometric_tail,
    is_needed,
    log_capital,
    mean_problem,
    smallest_order,
)

FILES, ORIGINAL, PIN = "files", "original", "pin"
"""What catches a change whose manifest was rewritten: the files alone, the original, or the pin."""

FORBIDDEN = (
    *("engine", "job", "report.gates", "network.candidates.new_bias"),
    *("quality.compare", "quality.held_out", "quality.certificate", "quality.worst_case"),
)
"""Modules that made the output: verification may import none of them."""

MUTATIONS: dict[str, tuple[damage.Mutation, str]] = {
    "lowest bit of a factor": (damage.flip_a_bit, PIN),
    "a number of a factor": (damage.flip_a_high_bit, ORIGINAL),
    "a number of a kept tensor": (damage.change_a_kept_tensor, ORIGINAL),
    "a swapped permutation": (damage.swap_the_permutation, ORIGINAL),
    "no permutation": (damage.repeat_in_the_permutation, FILES),
    "a renamed key": (damage.rename_a_key, FILES),
    "a dropped shard": (damage.drop_a_shard, FILES),
    "a dropped shard, index rewritten": (damage.drop_a_shard_and_its_entries, FILES),
    "a rank in config.json": (damage.change_a_rank, FILES),
    "another key of config.json": (damage.change_the_heads, ORIGINAL),
    "a size": (damage.edit(damage.better_size), FILES),
    "a layer's errors": (damage.edit(damage.better_layer_error), ORIGINAL),
    "an error below its optimum": (damage.edit(damage.better_than_optimal), FILES),
    "a loss and its perplexity": (damage.edit(damage.better_quality), ORIGINAL),
    "a perplexity": (damage.edit(damage.better_perplexity), FILES),
    "a divergence": (damage.edit(damage.better_divergence), ORIGINAL),
    "a layer's held-out error": (damage.edit(damage.held_out_figure), ORIGINAL),
    "a certificate's bound": (damage.edit(damage.better_bound), FILES),
    "a certificate's value": (damage.edit(damage.better_values), FILES),
    "what the certificate's sentences call it": (damage.edit(damage.other_words), ORIGINAL),
    "a sentence of the certificate": (damage.edit(damage.better_sentence), FILES),
    "a sentence of README.md": (damage.edit_the_card, FILES),
    "a sentence of report.html": (damage.edit_the_page, FILES),
    "a key of lrc.yaml": (damage.edit_the_config, FILES),
    "a file more": (damage.add_a_file, FILES),
    "a side file": (damage.edit_the_licence, FILES),
}


class Made:
    """A finished output with its original."""

    def __init__(self, output: Path, original: Path) -> None:
        self.output, self.original = output, original
        self.pin = verify_directory(output).manifest_sha256


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, checkpoint: Models, text: Path) -> Made:
    """A sharded pico Llama with a certificate."""
    changes = {
        "model.path": str(checkpoint("llama")),
        "calibration.path": str(text),
        "certification.part": [0.6, 1.0],
        "certification.num_sequences": 40,
        "certification.sequence_length": 16,
        "output.shard_size": "60KB",
    }
    output, _ = pico.compressed(tmp_path_factory.mktemp("made"), changes)
    return Made(output, checkpoint("llama"))


def failed(found: Verified) -> list[str]:
    """The ids of what fails, with why."""
    return [f"{s.id}: {s.what}: {s.detail}" for s in found.findings.with_status("fails")]


def unchecked(found: Verified) -> set[str]:
    """The ids of what was not checked."""
    return {s.id for s in found.findings.with_status("not checked")}


def test_an_untouched_output_holds_at_every_level(made: Made) -> None:
    found = verify_directory(made.output, against=made.original, manifest_sha256=made.pin)
    assert failed(found) == []
    assert unchecked(found) == {"report.run"}
    ids = {statement.id for statement in found.findings.statements}
    assert {"c1.output", "c1.metric", "c2.values", "c2.layers", "quality.measured"} <= ids


def test_without_the_original_measured_figures_are_not_checked(made: Made) -> None:
    found = verify_directory(made.output)
    assert failed(found) == []
    wanted = {"manifest.pinned", "report.run", "original", "c1", "quality", "c2"}
    assert unchecked(found) == wanted


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_change_is_caught_by(made: Made, tmp_path: Path, name: str) -> None:
    mutate, level = MUTATIONS[name]
    output = damage.copied(made.output, tmp_path)
    mutate(output)
    plainly = failed(verify_directory(output))
    assert any(line.startswith(("files.", "tensors.hash")) for line in plainly)
    damage.rewrite_manifest(output)
    hidden = failed(verify_directory(output, manifest_sha256=made.pin))
    assert any(line.startswith("manifest.pinned") for line in hidden)
    assert (len(hidden) > 1) == (level == FILES), hidden
    if level != FILES:
        found = failed(verify_directory(output, against=made.original))
        assert bool(found) == (level == ORIGINAL), found


def test_the_documentation_has_the_same_table() -> None:
    text = (Path(__file__).parents[2] / "docs" / "verify.md").read_text(encoding="utf-8")
    words = {FILES: "`verify DIR`", ORIGINAL: "`--against`", PIN: "`--manifest-sha256`"}
    for name, (_, level) in MUTATIONS.items():
        assert f"| {name} | {words[level]} |" in text


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        ("llama", {"compression.size": 1.0}),
        ("llama", {"compression.method": "svd"}),
        ("llama", {"compression.method": "frobenius", "output.dtype": "float32"}),
        ("llama", {"runtime.dtype": "bfloat16"}),
        ("bert", {}),
        ("bert-mlm", {}),
        ("bert-classifier", {}),
    ],
)
def test_other_outputs_hold(
    tmp_path: Path, checkpoint: Models, text: Path, model: str, changes: dict[str, Any]
) -> None:
    job = {"model.path": str(checkpoint(model)), "calibration.path": str(text)}
    job |= {"certification.part": [0.6, 1.0], "certification.num_sequences": 20}
    output, _ = pico.compressed(tmp_path, job | {"certification.sequence_length": 16} | changes)
    found = verify_directory(output, against=checkpoint(model))
    assert failed(found) == []


def test_an_output_of_before_a_key_was_added_holds(
    tmp_path: Path, checkpoint: Models, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = canonical.plain

    def older(value: Any) -> Any:
        found = plain(value)
        if isinstance(value, Compression):
            del found["embeddings"]
        return found

    job = {"model.path": str(checkpoint("llama")), "calibration.path": str(text)}
    with monkeypatch.context() as before:
        before.setattr(canonical, "plain", older)
        output, _ = pico.compressed(tmp_path, job)
    assert "embeddings" not in (output / "lrc.yaml").read_text()
    assert failed(verify_directory(output, against=checkpoint("llama"))) == []


def test_an_error_below_the_rounding_of_the_outputs_holds(
    tmp_path: Path, checkpoint: Models, text: Path
) -> None:
    """As in a network with massive activations: bfloat16 rounds outputs, biases included."""
    original = tmp_path / "original"
    shutil.copytree(checkpoint("qwen2"), original)
    for key in ("q_proj", "k_proj", "v_proj"):
        name = f"model.layers.0.self_attn.{key}.bias"
        damage.edit_tensors(original, name, lambda bias: bias + 32)
    job = {"model.path": str(original), "calibration.path": str(text)}
    job |= {"certification.part": [0.6, 1.0], "certification.num_sequences": 20}
    job |= {"runtime.dtype": "bfloat16", "compression.size": 0.9}
    output, _ = pico.compressed(tmp_path, job | {"certification.sequence_length": 16})
    assert failed(verify_directory(output, against=original)) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"compression.sequential": True, "compression.size": 0.5},
        {"compression.sequential": True, "compression.method": "frobenius"},
        {"compression.sequential": True, "compression.correction": 0.5},
        {"compression.center": True},
        {"compression.method": "nuclear"},
    ],
)
def test_other_solvers_hold(
    tmp_path: Path, checkpoint: Models, text: Path, changes: dict[str, Any]
) -> None:
    job = {"model.path": str(checkpoint("llama")), "calibration.path": str(text)}
    output, report = pico.compressed(tmp_path, job | {"calibration.num_sequences": 60} | changes)
    found = verify_directory(output, against=checkpoint("llama"))
    assert failed(found) == []
    measured = [s for s in found.findings.with_status("holds") if s.id == "c1.metric"]
    assert len(measured) == sum(layer["storage"] != "dense" for layer in report["layers"])
    if "compression.sequential" in changes:
        assert report["sequential"]["used"]
        true = (output / "report.json").read_text()
        for change in (damage.better_layer_error, damage.other_correction, damage.other_share):
            (output / "report.json").write_text(true)
            damage.edit_report(output, change)
            found = verify_directory(output, against=checkpoint("llama"))
            wanted = "c1." if change is damage.better_layer_error else "c1.correction"
            assert any(line.startswith(wanted) for line in failed(found))


@pytest.fixture
def rectified(tmp_path: Path, checkpoint: Models, text: Path) -> Path:
    """A pico OPT, its layers before a ReLU fitted to what is behind it."""
    job = {"model.path": str(checkpoint("opt")), "calibration.path": str(text)}
    job |= {"compression.method": "relu", "certification.part": [0.6, 1.0]}
    output, _ = pico.compressed(tmp_path, job | {"certification.num_sequences": 20})
    return output


def test_what_relu_says_is_measured_behind_the_relu(rectified: Path, checkpoint: Models) -> None:
    found = verify_directory(rectified, against=checkpoint("opt"))
    assert failed(found) == []
    assert unchecked(found) == {"c1.convex", "manifest.pinned", "report.run"}
    true = (rectified / "report.json").read_text()
    for change in (damage.better_metric, damage.other_simple_metric):
        (rectified / "report.json").write_text(true)
        damage.edit_report(rectified, change)
        found = verify_directory(rectified, against=checkpoint("opt"))
        assert any(line.startswith("c1.metric") for line in failed(found)), change


def test_a_bias_that_does_not_pay_behind_the_relu_is_found(
    rectified: Path, checkpoint: Models
) -> None:
    """Whatever the report says of the errors."""
    layer = next(x for x in damage.read_report(rectified)["layers"] if x["method"] == "relu")
    damage.edit_tensors(rectified, f"{layer['name']}.bias", lambda bias: bias + 1)
    found = verify_directory(rectified, against=checkpoint("opt"))
    assert any(line.startswith("c1.bias") for line in failed(found))


@pytest.mark.parametrize("form", [{"output.dtype": "bfloat16"}, {"compression.center": True}])
@pytest.mark.parametrize("has_bias", [True, False])
def test_the_worst_case_of_other_dtypes_and_gained_biases_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: dict[str, Any], has_bias: bool
) -> None:
    (tmp_path / "chains.py").write_text(
        "from torch import nn\n\n\ndef chain():\n"
        f"    first, second = (nn.Linear(24, 24, bias={has_bias}) for _ in range(2))\n"
        "    return nn.Sequential(first, nn.GELU(), nn.Sequential(second, nn.Tanh()))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    rows = torch.randn(64, 24, generator=torch.Generator().manual_seed(1)) + 1
    save_file({"x": rows}, tmp_path / "rows.safetensors")
    module = importlib.import_module("chains").chain()
    sys.modules.pop("chains")
    save_file(module.to(torch.bfloat16).state_dict(), tmp_path / "chain.safetensors")
    original = tmp_path / "chain.safetensors"
    job = {"model.path": str(original), "model.factory": "chains:chain", "evaluation": None}
    job |= {"calibration.path": str(tmp_path / "rows.safetensors")}
    job |= {"calibration.num_sequences": 40, "compression.size": 0.8}
    output, report = pico.compressed(tmp_path, job | form)
    assert report["worst_case"] is not None
    found = verify_directory(output, against=original, factory="chains:chain")
    assert failed(found) == []
    assert [s.status for s in found.findings.statements if s.id == "c3.worst_case"] == ["holds"]
    sys.modules.pop("chains", None)


@pytest.mark.parametrize(
    "change",
    [damage.better_worst_case, damage.better_measured_change, damage.better_amplification],
)
def test_the_worst_case_is_computed_again(
    tmp_path: Path,
    plain_folder: pico.PlainFolder,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[dict[str, Any]], None],
) -> None:
    monkeypatch.chdir(plain_folder.path)
    changes = plain_folder.model("mlp")
    output, _ = pico.compressed(tmp_path, changes)
    original, factory = Path(changes["model.path"]), changes["model.factory"]
    found = verify_directory(output, against=original, factory=factory)
    assert failed(found) == []
    assert [s.status for s in found.findings.statements if s.id == "c3.worst_case"] == ["holds"]
    assert "c3.worst_case" in unchecked(verify_directory(output))
    damage.edit_report(output, change)
    found = verify_directory(output, against=original, factory=factory)
    assert any(line.startswith("c3.worst_case") for line in failed(found))


@pytest.mark.parametrize("name", ["mlp", "attention"])
def test_a_plain_module_holds_with_its_factory(
    tmp_path: Path, plain_folder: pico.PlainFolder, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(plain_folder.path)
    changes = plain_folder.model(name) | {"certification.num_sequences": 20}
    output, _ = pico.compressed(tmp_path, changes)
    original, factory = Path(changes["model.path"]), changes["model.factory"]
    found = verify_directory(output, against=original, factory=factory)
    assert failed(found) == []
    ended = pico.call("verify", output, "--against", original, "-q")
    assert ended.code == 2
    assert f"--factory {factory}" in ended.err


def test_another_checkpoint_is_not_the_original(made: Made, checkpoint: Models) -> None:
    found = verify_directory(made.output, against=checkpoint("qwen2"))
    assert any(line.startswith("original.hash") for line in failed(found))
    assert {"c1", "quality", "c2"} <= unchecked(found)


def moved_job(tmp_path: Path, checkpoint: Models, text: Path) -> tuple[Path, Path]:
    """An output whose data file is then moved; returns both."""
    data = tmp_path / "data.txt"
    data.write_text(text.read_text())
    job = {"model.path": str(checkpoint("llama")), "calibration.path": str(data)}
    output, _ = pico.compressed(tmp_path, job)
    return output, data.rename(tmp_path / "elsewhere.txt")


def test_data_is_known_by_its_hash(tmp_path: Path, checkpoint: Models, text: Path) -> None:
    output, data = moved_job(tmp_path, checkpoint, text)
    without = verify_directory(output, against=checkpoint("llama"))
    assert failed(without) == []
    assert {"data.hash", "c1", "quality.measured"} <= unchecked(without)
    given = verify_directory(output, against=checkpoint("llama"), data=data)
    assert failed(given) == []
    assert "data.hash" not in unchecked(given)
    data.write_text(data.read_text() + " w1")
    changed = verify_directory(output, against=checkpoint("llama"), data=data)
    assert failed(changed) == []
    details = [s.detail for s in changed.findings.with_status("not checked")]
    assert any("another hash" in detail for detail in details)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "does not exist"),
        (["{original}"], "not a finished output"),
        (["{output}", "--against", "nowhere"], "does not exist"),
        (["{output}", "--against", "{output}"], "already quantised or compressed"),
        (["{output}", "--against", "{original}", "--data", "nowhere"], "no such file"),
        (["{output}", "--manifest-sha256", "abc"], "not a sha256"),
    ],
)
def test_wrong_use_is_said_in_one_line(made: Made, arguments: list[str], words: str) -> None:
    places = {"output": made.output, "original": made.original}
    ended = pico.call("verify", *(text.format(**places) for text in arguments), "-q")
    assert ended.code == 2
    assert words in ended.err
    assert ended.err.startswith("error: ") and ended.err.count("\n") == 1


def test_the_command_says_what_fails_first_and_what_to_pin(made: Made, tmp_path: Path) -> None:
    fine = pico.call("verify", made.output, "-q")
    assert fine.code == 0
    assert fine.out.rstrip().endswith(made.pin)
    assert "holds: tensors.hash: " in fine.out
    output = damage.copied(made.output, tmp_path)
    damage.edit_the_card(output)
    ended = pico.call("verify", output, "-q")
    assert ended.code == 3
    assert ended.out.startswith("fails: files.hash: README.md")
    found = json.loads(pico.call("verify", output, "--json", "-q").out)
    assert found["failed"] is True
    keys = {key for statement in found["statements"] for key in statement}
    assert keys == {"id", "what", "status", "detail"}


@pytest.mark.parametrize("name", ["report.json", "lrc.yaml", "config.json", "manifest.json"])
def test_a_damaged_file_is_never_a_traceback(made: Made, tmp_path: Path, name: str) -> None:
    output = damage.copied(made.output, tmp_path)
    for content in ("", "{}", "[1, 2]", '{"files": 3}', "\x00\xff"):
        (output / name).write_text(content, encoding="latin-1")
        assert pico.call("verify", output, "-q").code in (2, 3), content


@pytest.mark.parametrize("key", ["size", "layers", "provenance", "certificate", "quality"])
def test_a_report_of_another_form_is_a_failed_statement(
    made: Made, tmp_path: Path, key: str
) -> None:
    output = damage.copied(made.output, tmp_path)
    for value in (None, {}, [{}], "text", {"statements": [{}]}):
        damage.edit_report(output, lambda report, value=value: report.update({key: value}))
        assert pico.call("verify", output, "-q").code == 3, value
    ended = pico.call("verify", output, "--against", made.original, "-q")
    assert ended.code == 3, ended.err


@pytest.mark.parametrize("change", ["delete", "text", "negative"])
def test_a_figure_that_is_no_figure_is_a_failed_statement(
    made: Made, tmp_path: Path, change: str
) -> None:
    output = damage.copied(made.output, tmp_path)

    def spoil(report: dict[str, Any]) -> None:
        errors = damage.first_factorised(report)["errors"]
        if change == "delete":
            del errors["metric"]
        errors["output"]["stored"] = "small" if change == "text" else -1

    damage.edit_report(output, spoil)
    damage.rewrite_manifest(output)
    assert pico.call("verify", output, "--against", made.original, "-q").code == 3


def test_verification_imports_nothing_of_the_run() -> None:
    script = "import sys, lrc_cli.verify; print(*[m for m in sys.modules if m.startswith('lrc')])"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    loaded = done.stdout.split()
    assert "lrc_cli.verify.command" in loaded
    for name in FORBIDDEN:
        own = f"lrc_cli.{name}"
        assert not [m for m in loaded if m == own or m.startswith(f"{own}.")], own


# ---------------------------------------------------------------- the mathematics


def test_tails_are_sums_over_all_draws() -> None:
    share = Fraction(3, 10)
    ways = [math.comb(6, k) * share**k * (1 - share) ** (6 - k) for k in range(7)]
    assert [binomial_tail(6, share, k) for k in range(7)] == [sum(ways[k:]) for k in range(7)]
    assert hypergeometric_tail(2, 3, 5, 2) == Fraction(3, 10)
    assert hypergeometric_tail(3, 2, 9, 3) == 0


@pytest.mark.parametrize(
    ("drawn", "delta", "order"),
    [(58, 0.05, None), (59, 0.05, 59), (92, 0.05, 92), (93, 0.05, 92), (128, 0.05, 126)],
)
def test_the_smallest_order_that_serves(drawn: int, delta: float, order: int | None) -> None:
    assert smallest_order(drawn, 0.95, delta, 10**9) == order


def test_how_many_are_needed() -> None:
    wanted = {0.05: 59, 0.05 / 7: 97, 0.05 / 217: 164}
    for delta, number in wanted.items():
        assert is_needed(number, 0.95, delta)
        assert not is_needed(number - 1, 0.95, delta) and not is_needed(number + 1, 0.95, delta)


def test_betting_bounds_cover_and_wrong_bounds_are_found() -> None:
    generator = torch.Generator().manual_seed(3)
    population = torch.rand(200, generator=generator).square()
    mean = population.mean().item()
    misses = 0
    for _ in range(100):
        drawn = population[torch.randperm(200, generator=generator)[:60]].tolist()
        limits: dict[str, Any] = {"lower": 0.0, "upper": 1.0, "delta": 0.1, "population": 200}
        misses += log_capital(drawn, mean, **limits) >= -math.log(0.1)
        low, high = sum(drawn) / 60, 1.0
        while high - low > 1e-9:
            middle = (low + high) / 2
            rejected = log_capital(drawn, middle, **limits) >= -math.log(0.1)
            low, high = (low, middle) if rejected else (middle, high)
        assert mean_problem(drawn, high, **limits) is None
        assert mean_problem(drawn, high * 0.999, **limits) is not None
        assert mean_problem(drawn, min(high * 1.01, 0.999), **limits) is not None
    assert misses <= 18  # of 100 at a risk of 0.1: more has a probability below 0.01


def test_changes_that_are_too_small_to_matter_are_not_failures(made: Made, tmp_path: Path) -> None:
    """Another machine rounds differently: C1 and C2 allow for it, the manifest does not."""
    output = damage.copied(made.output, tmp_path)

    def change(report: dict[str, Any]) -> None:
        for layer in report["layers"]:
            if layer["storage"] != "dense":
                for kind in ("metric", "output"):
                    for key in ("stored", "optimum", "svd"):
                        layer["errors"][kind][key] *= 1 + 1e-5

    damage.edit_report(output, change)
    damage.rewrite_pages(output)
    damage.rewrite_manifest(output)
    assert failed(verify_directory(output, against=made.original)) == []


def test_plain_svd_in_the_solvers_place_is_found(
    made: Made, tmp_path: Path, checkpoint: Models
) -> None:
    """Factors that are not what the report says of them, although every hash fits."""
    output = damage.copied(made.output, tmp_path)
    key = damage.factor_key(output)
    weight = pico.read_state(checkpoint("llama"))[f"{key}.weight"].double()
    state = pico.read_state(output)
    rank, rows = len(state[f"{key}.weight"]), len(weight)
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    simple = (u[:, :rank] * s[:rank]) @ vt[:rank]
    blocks = len(state[f"{key}.perm"])
    # Rows in the order that the permutation undoes: the chosen ones first.
    slabs = simple.view(blocks, rows // blocks, -1)
    ordered = slabs[state[f"{key}.perm"].argsort()].reshape(rows, -1)
    chosen, others = ordered[:rank], ordered[rank:]
    coefficients = torch.linalg.lstsq(chosen.T, others.T).solution.T
    replaced: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        f"{key}.weight": lambda old: chosen.to(old.dtype),
        f"{key}.up.weight": lambda old: coefficients.to(old.dtype),
    }
    for name, change in replaced.items():
        damage.edit_tensors(output, name, change)
    damage.rewrite_manifest(output)
    assert failed(verify_directory(output)) == []
    found = failed(verify_directory(output, against=made.original))
    assert any(line.startswith("c1.output") for line in found)


@pytest.mark.parametrize("key", ["purpose", "note", "not_covered", "unit"])
def test_words_that_no_figure_has_are_checked(made: Made, tmp_path: Path, key: str) -> None:
    output = damage.copied(made.output, tmp_path)

    def change(report: dict[str, Any]) -> None:
        certificate = report["certificate"]
        place = {"purpose": certificate["selection"], "unit": certificate["statements"][0]}
        place.get(key, certificate)[key] = ["x"] if key == "not_covered" else "x"
        damage.restate(certificate)

    damage.edit(change)(output)
    damage.rewrite_manifest(output)
    assert {s.split(":")[0] for s in failed(verify_directory(output))} & {
        "certificate.header",
        "certificate.statement",
    }


def test_deep_or_dangling_or_unreadable_things_are_said(made: Made, tmp_path: Path) -> None:
    output = damage.copied(made.output, tmp_path)
    (output / "link").symlink_to("nowhere")
    assert any("link" in line for line in failed(verify_directory(output)))
    (output / "link").unlink()
    damage.edit_report(output, lambda report: report["provenance"].update(config="a: b: ["))
    assert verify_directory(output).findings.failed
    (output / "manifest.json").write_text("[" * 100_000)
    ended = pico.call("verify", output)
    assert ended.code == 2 and "is not JSON" in ended.err
