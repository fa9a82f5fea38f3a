"""A certificate of a copy is edited, with a manifest that fits, and `lrc verify` must find it."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pico
import pytest
from command_helpers import assert_one_sentence
from copies import certified, copy_of, noisy
from pico import Models, State

from lrc_cli.certify.pages import RENDERED
from lrc_cli.certify.record import CERTIFICATE, read_record
from lrc_cli.checkpoint.manifest import MANIFEST_NAME, build_manifest
from lrc_cli.runtime.files import write_json, write_text

Edit = Callable[[dict[str, Any]], object]
CONSTANT = "model.layers.0.mlp.up_proj.weight"


@dataclass(frozen=True)
class Certified:
    """A certificate with all that it is about."""

    original: Path
    copy: Path
    data: Path
    directory: Path

    def verify(self, directory: Path | None = None, **places: Path) -> pico.Ended:
        """Runs `lrc verify` with both checkpoints."""
        found = {"against": self.original, "other": self.copy, **places}
        options = [x for name, path in found.items() for x in (f"--{name}", path)]
        return pico.call("verify", directory or self.directory, *options, "-q")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, checkpoint: Models, text: Path) -> Certified:
    root = tmp_path_factory.mktemp("certified")

    def spoiled(state: State) -> None:
        noisy(state)
        state[CONSTANT] = state[CONSTANT] * 0 + 0.5

    copy = copy_of(checkpoint("llama"), root / "copy", spoiled)
    options = ("--set", "gates.max_kl_mean=9", "--set", "data.part=[0.0, 0.5]")
    record = certified(checkpoint("llama"), copy, text, root / "out", *options)
    assert [flag.tensor for flag in record.weights.flags] == [CONSTANT]
    return Certified(checkpoint("llama"), copy, text, root / "out")


def test_a_certificate_holds_and_needs_both_checkpoints(made: Certified, tmp_path: Path) -> None:
    ended = made.verify()
    assert ended.code == 0 and "0 fails" in ended.out, ended.out
    pinned = ended.out.split()[-1]
    assert pico.call("verify", made.directory, "--manifest-sha256", pinned, "-q").code == 0
    assert pico.call("verify", made.directory, "--manifest-sha256", "0" * 64, "-q").code == 3
    half = pico.call("verify", made.directory, "--against", made.original)
    assert_one_sentence(half, 2, "the copy with --other")
    moved = shutil.copy(made.data, tmp_path / "elsewhere.txt")
    assert made.verify(data=Path(moved)).code == 0


EDITS: dict[str, Edit] = {
    "a bound": lambda x: x["statements"][0].update(bound=x["statements"][0]["bound"] / 2),
    "an observed mean": lambda x: x["statements"][0].update(observed=0.0),
    "a sentence": lambda x: x["statements"][0].update(text="It is perfect."),
    "a value": lambda x: x["values"]["kl"].__setitem__(3, 0.0),
    "all values": lambda x: x["values"].update(kl=[v / 2 for v in x["values"]["kl"]]),
    "a statement less": lambda x: x["statements"].pop(),
    "the confidence": lambda x: x.update(confidence=0.99),
    "a clipping limit": lambda x: x["clips"].update(kl=99.0),
    "the size of the population": lambda x: x["population"].update(size=100_000),
    "another population": lambda x: x["population"].update(description="all texts there are"),
    "the hash of the data": lambda x: x["population"].update(file_sha256="0" * 64),
    "the hash of the draw": lambda x: x.update(data_sha256="0" * 64),
    "the selection": lambda x: x["selection"].update(num_sequences=2),
    "the assumptions": lambda x: x["assumptions"].pop(),
    "the predictions": lambda x: x.update(predictions="predictions"),
}
WHOLE: dict[str, Edit] = {
    "the hash of the copy": lambda x: x["other"]["sha256"].update({"model.safetensors": "0" * 64}),
    "a file less of the copy": lambda x: x["other"]["sha256"].pop("model.safetensors"),
    "a file more of the copy": lambda x: x["other"]["sha256"].update({"../x": "0" * 64}),
    "the form of the copy": lambda x: x["other"].update(form="GGUF"),
    "the name of the original": lambda x: x["original"].update(name="gpt"),
    "the architecture": lambda x: x["other"].update(architecture="GptForCausalLM"),
    "the parameters": lambda x: x["other"].update(num_parameters=7),
    "a flag less": lambda x: x["weights"].update(flags=[]),
    "a flag more": lambda x: x["weights"]["flags"].append(
        {"tensor": "model.norm.weight", "kind": "constant", "text": "all entries are equal"}
    ),
    "a false flag": lambda x: x["weights"]["flags"].append(
        {"tensor": "model.norm.weight", "kind": "permuted", "text": "its entries are the others"}
    ),
    "an error": lambda x: x["weights"]["tensors"][2].update(error=1e-9),
    "a scale": lambda x: x["weights"]["tensors"][2].update(scale=1.1),
    "an error on inputs": lambda x: [t.update(input_error=0.5) for t in x["weights"]["tensors"]],
    "a tensor less": lambda x: x["weights"]["tensors"].pop(),
    "a gate less": lambda x: x.update(gates=[]),
    "a gate met": lambda x: x["gates"][0].update(measured=0.001),
    "the arithmetic": lambda x: x["arithmetic"].update(sentences=["It is exact."]),
    "a difference": lambda x: x.update(differences=["The copy is larger."]),
    "the worst sequence": lambda x: x["worst"][0].update(index=1),
    "the seed": lambda x: x.update(config=x["config"].replace("seed: 0", "seed: 1")),
    "the part": lambda x: x.update(config=x["config"].replace("- 0.5", "- 0.4")),
}


@pytest.mark.parametrize("name", [*EDITS, *WHOLE])
def test_an_edit_is_found(name: str, made: Certified, tmp_path: Path) -> None:
    directory = tmp_path / "edited"
    shutil.copytree(made.directory, directory)
    values = json.loads((directory / CERTIFICATE).read_text())
    if name in WHOLE:
        WHOLE[name](values)
    else:
        EDITS[name](values["certificate"])
    rewrite(directory, values)
    ended = made.verify(directory)
    assert ended.code == 3 and "fails: " in ended.out, ended.out


def rewrite(directory: Path, values: dict[str, Any]) -> None:
    """Writes the certificate again, with pages and a manifest that fit."""
    write_json(directory / CERTIFICATE, values)
    record = read_record(directory)
    write_text(directory / "certify.yaml", record.config)
    for page, render in RENDERED.items():
        write_text(directory / page, render(record))
    (directory / MANIFEST_NAME).unlink()
    write_json(directory / MANIFEST_NAME, build_manifest(directory))


@pytest.mark.parametrize(
    "name", ["certificate.md", "certificate.html", "badge.svg", "certify.yaml"]
)
def test_an_edited_page_is_found(name: str, made: Certified, tmp_path: Path) -> None:
    directory = tmp_path / "edited"
    shutil.copytree(made.directory, directory)
    text = (directory / name).read_text()
    (directory / name).write_text(text.replace("0", "1", 1))
    assert pico.call("verify", directory, "-q").code == 3
    (directory / MANIFEST_NAME).unlink()
    write_json(directory / MANIFEST_NAME, build_manifest(directory))
    assert pico.call("verify", directory, "-q").code == 3


def test_a_bit_of_the_copy_and_other_data_are_found(made: Certified, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(made.copy, copy)
    file = copy / "model.safetensors"
    bits = bytearray(file.read_bytes())
    bits[-7] ^= 1
    file.write_bytes(bits)
    ended = made.verify(other=copy)
    assert ended.code == 3 and "fails: checkpoints.hash" in ended.out
    (copy / "README.md").write_text("a new card")
    shutil.copy(made.copy / "model.safetensors", file)
    assert made.verify(other=copy).code == 0
    other = tmp_path / "words.txt"
    other.write_text(pico.words(6000, seed=2))
    ended = made.verify(data=other)
    assert ended.code == 3 and "fails: data.hash" in ended.out
    assert made.verify(against=made.copy).code == 3
