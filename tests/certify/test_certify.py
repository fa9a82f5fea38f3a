"""These tests run `lrc certify` on pico copies: what it states, writes, gates and refuses."""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pico
import pytest
import torch
from command_helpers import assert_one_sentence
from copies import FAST, certified, copy_of, noisy
from pico import Models
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from lrc_cli.certify.record import CopyRecord, read_record
from lrc_cli.config import parse_certify


def test_a_noisy_copy_is_certified_and_an_exact_one_has_no_distance(
    tmp_path: Path, checkpoint: Models, text: Path
) -> None:
    original = checkpoint("llama")
    exact = copy_of(original, tmp_path / "exact")
    record = certified(original, exact, text, tmp_path / "same", "--num-sequences", "100")
    assert not record.weights.flags and {x.error for x in record.weights.tensors} == {0.0}
    assert all(s.bound == 0 or s.kind == "mean" for s in record.certificate.statements)
    copy = copy_of(original, tmp_path / "copy", noisy)
    record = certified(original, copy, text, tmp_path / "out", "--num-sequences", "100")
    bounds = {s.id: s.bound for s in record.certificate.statements}
    assert all(bound is not None and bound > 0 for bound in bounds.values()) and len(bounds) == 6
    assert record.worst[0].value == record.certificate.statements[0].worst
    matrix = next(x for x in record.weights.tensors if x.name.endswith("0.mlp.up_proj.weight"))
    assert matrix.error == pytest.approx(0.02, rel=0.1)
    assert matrix.input_error == pytest.approx(0.02, rel=0.3)
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert files == {
        *("certificate.json", "certificate.md", "certificate.html", "badge.svg"),
        *("certify.yaml", "manifest.json"),
    }
    ElementTree.fromstring((tmp_path / "out" / "badge.svg").read_text())
    written = (tmp_path / "out" / "certify.yaml").read_text()
    assert parse_certify(written, "certify.yaml").other.path == str(copy)


def test_the_divergence_is_that_of_transformers_itself(
    tmp_path: Path, checkpoint: Models, text: Path
) -> None:
    original = checkpoint("llama")
    copy = copy_of(original, tmp_path / "copy", noisy)
    options = ("--num-sequences", "300", "--set", "data.part=[0.0, 0.2]")
    arguments = ("--against", original, "--data", text, "--output", tmp_path / "out", *FAST)
    ended = pico.call("certify", copy, *arguments, *options)
    assert ended.code == 2 and "300 were asked for" in ended.err
    record = certified(original, copy, text, tmp_path / "out", "--set", "data.part=[0.0, 0.2]")
    words = text.read_text().split()
    blocks = torch.tensor([pico.VOCABULARY.index(word) for word in words[:1200]]).split(16)
    dense, other = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for path in (original, copy)
    )
    found = []
    with torch.no_grad():
        for block in blocks:
            p, q = (model(block[None]).logits[0, :-1].log_softmax(-1) for model in (dense, other))
            found.append((p.exp() * (p - q)).sum(-1).mean().item())
    for value in record.certificate.values.quantities["kl"]:  # type: ignore[union-attr]
        assert min(abs(value - each) for each in found) < 1e-6


def test_too_few_sequences_certify_no_quantile(
    tmp_path: Path, checkpoint: Models, text: Path
) -> None:
    original = checkpoint("llama")
    copy = copy_of(original, tmp_path / "copy", noisy)
    record = certified(original, copy, text, tmp_path / "out", "--num-sequences", "20")
    quantile = next(s for s in record.certificate.statements if s.id == "kl.quantile")
    assert quantile.bound is None
    assert quantile.text == "cannot certify: N = 20 < 94 needed"


@pytest.mark.parametrize("name", ["bert", "bert-classifier", "bert-mlm", "opt"])
def test_other_networks_are_compared_by_what_they_return(
    name: str, tmp_path: Path, checkpoint: Models, text: Path
) -> None:
    original = checkpoint(name)
    copy = copy_of(original, tmp_path / "copy", noisy)
    record = certified(original, copy, text, tmp_path / "out")
    found = set(record.certificate.values.quantities)  # type: ignore[union-attr]
    assert (
        found
        == {
            "bert": {"relative_output_error"},
            "bert-classifier": {"relative_output_error", "kl", "top1_disagreement"},
            "bert-mlm": {"kl", "top1_disagreement", "loss_difference"},
            "opt": {"kl", "top1_disagreement", "loss_difference"},
        }[name]
    )


def test_a_plain_module_and_an_output_of_lrcs(
    tmp_path: Path,
    plain_folder: pico.PlainFolder,
    llama_job: dict[str, Any],
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(plain_folder.path)
    state = pico.read_state(plain_folder.path / "mlp.safetensors")
    noisy(state)
    save_file(state, tmp_path / "mlp.safetensors")
    options = ("--factory", "pico_factories:mlp")
    original, data = plain_folder.path / "mlp.safetensors", plain_folder.path / "rows.safetensors"
    record = certified(original, tmp_path / "mlp.safetensors", data, tmp_path / "one", *options)
    assert set(record.certificate.values.quantities) == {"relative_output_error"}  # type: ignore[union-attr]
    output, _ = pico.compressed(tmp_path, llama_job)
    record = certified(Path(llama_job["model.path"]), output, text, tmp_path / "two")
    assert record.other.form == "low-rank factors of lrc" and not record.weights.flags
    errors = {x.name: x.error for x in record.weights.tensors}
    assert len(errors) == 20 and 0 < max(x for x in errors.values() if x is not None) < 1
    ended = pico.call("certify", llama_job["model.path"], "--against", output, "--data", text)
    assert_one_sentence(ended, 2, "run lrc on the dense checkpoint it came from")


def test_gates_accept_and_refuse(tmp_path: Path, checkpoint: Models, text: Path) -> None:
    original = checkpoint("llama")
    copy = copy_of(original, tmp_path / "copy", noisy)
    output, junit = tmp_path / "out", tmp_path / "junit.xml"
    certified(original, copy, text, output, "--set", "gates.max_kl_mean=5")
    arguments = ("--against", original, "--data", text, "--output", output, *FAST)
    strict = ("--set", "gates.max_kl_mean=0.00001", "--set", "gates.max_kl_quantile=9")
    more = ("--set", "gates.max_relative_output_error_mean=1", "--set", "gates.max_flags=0")
    ended = pico.call("certify", copy, *arguments, *strict, *more)
    assert_one_sentence(ended, 2, "give --force")
    ended = pico.call("certify", copy, *arguments, *strict, *more, "--force", "--junit", junit)
    assert ended.code == 3 and "gates.max_kl_mean: 1e-05 is missed" in ended.err
    assert "cannot certify: N = 24 < 94 needed" in ended.err
    assert "these networks have no such quantity" in ended.err
    gates = {gate.name: gate.met for gate in read_record(output).gates}
    assert gates == {
        "max_kl_mean": False,
        "max_kl_quantile": False,
        "max_relative_output_error_mean": False,
        "max_flags": True,
    }
    assert "3 gates missed" in (output / "badge.svg").read_text()
    suite = ElementTree.parse(junit).getroot()
    assert suite.get("failures") == "3" and suite.get("skipped") == "3"


def test_a_config_says_the_same_as_options(tmp_path: Path, checkpoint: Models, text: Path) -> None:
    original = checkpoint("llama")
    copy = copy_of(original, tmp_path / "copy", noisy)
    first = certified(original, copy, text, tmp_path / "one")
    file = tmp_path / "certify.yaml"
    file.write_text((tmp_path / "one" / "certify.yaml").read_text())
    output = str(tmp_path / "two")
    ended = pico.call("certify", file, "--output", output, "-q", "--json")
    found = CopyRecord.from_json(json.loads(ended.out), "stdout")
    assert found.certificate == first.certificate and found.weights == first.weights
    file.write_text(f"{file.read_text()}gate:\n  max_kl_mean: 1\n")
    ended = pico.call("certify", file, "--output", output)
    assert ended.code == 2 and "gate: unknown key; did you mean 'gates'?" in ended.err
