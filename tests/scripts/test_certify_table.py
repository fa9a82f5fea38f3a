"""These tests run scripts/certify_table.py on a pico model, and coverage.py on its certificate."""

import importlib.util
import json
import sys
from pathlib import Path

import certify_table
import pytest
from certify_table import CHANGES, certified, copies_of, line
from copies import certified as written
from copies import copy_of
from pico import Models


def test_bad_copies_have_flags_and_good_ones_have_none(
    tmp_path: Path, checkpoint: Models, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("8 bits a row", "a constant projection", "two layers swapped", "one scale off by 2 %")
    monkeypatch.setattr(certify_table, "CHANGES", {name: CHANGES[name] for name in names})
    options = {"num_sequences": 8, "sequence_length": 16}
    original = checkpoint("llama-long")
    rows = [certified(original, copy, text, options) for copy in copies_of(original, tmp_path)]
    assert [row.copy.name for row in rows] == list(names)
    assert all(row.is_as_it_should for row in rows), list(map(line, rows))
    assert [len(row.record.weights.flags) for row in rows] == [0, 1, 2, 1]
    assert "constant: model.layers.2.mlp.up_proj.weight" in line(rows[1])


def test_bounds_cover_on_the_values_of_a_certificate(
    tmp_path: Path, checkpoint: Models, text: Path
) -> None:
    # The path is given, because `coverage` is also the name of a package.
    file = Path(certify_table.__file__).with_name("coverage.py")
    spec = importlib.util.spec_from_file_location("coverage_of_certificates", file)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    sys.modules["coverage_of_certificates"] = script
    spec.loader.exec_module(script)
    original = checkpoint("llama")
    copy = copy_of(original, tmp_path / "copy", CHANGES["4 bits a row"][0])
    written(original, copy, text, tmp_path / "out", "--num-sequences", "200")
    file = tmp_path / "out" / "certificate.json"
    rows = script.measure_certificate(file, 500)
    assert len(rows) == 7 and script.verdict([], rows) == 0
    assert all(row.missed <= 0.05 * 500 for row in rows)
    values = json.loads(file.read_text())["certificate"]["values"]["kl"]
    assert rows[0].target == pytest.approx(sum(values) / len(values), rel=0.2)
