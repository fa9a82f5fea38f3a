"""These tests run scripts/coverage.py, which passes bounds that hold and finds one that fails."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "coverage.py"
NUM_DRAWS = 500


@pytest.fixture(scope="module")
def script() -> ModuleType:
    # The path is given, because `coverage` is also the name of a package.
    spec = importlib.util.spec_from_file_location("coverage_script", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["coverage_script"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def measured(script: ModuleType) -> Any:
    return script.measure(NUM_DRAWS)


def test_every_bound_holds_and_the_naive_interval_does_not(
    script: ModuleType, measured: Any
) -> None:
    quantities, rows = measured
    assert script.verdict(quantities, rows) == 0
    assert all(quantity.correlation >= 0.5 for quantity in quantities)
    naive = [row for row in rows if row.must_fail]
    assert len(naive) == len(quantities) and all(row.missed > NUM_DRAWS / 5 for row in naive)
    assert len(rows) == 14 and all(len(row.found) == NUM_DRAWS for row in rows)
    assert all(row.missed <= 0.05 * NUM_DRAWS for row in rows if not row.must_fail)
    table = script.table(rows)
    assert table.count("misses more |") == len(naive) and table.count("| holds |") == 11


def test_a_naive_interval_that_holds_proves_nothing(
    script: ModuleType, measured: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    quantities, _ = measured
    row = script.Row(quantity="x", bound="naive", target=0.0, found=[1.0] * 500, must_fail=True)
    assert script.verdict(quantities, [row]) == 1
    assert "naive does not fail" in capsys.readouterr().err


def test_tokens_that_are_not_correlated_prove_nothing(
    script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = script.make_population(0)[0][0].tokens.flatten().sort().values.view(-1, 1000).T
    assert script.verdict([script.Quantity(name="x", tokens=tokens, upper=1.0)], []) == 1
    assert "not correlated enough" in capsys.readouterr().err


def test_the_binomial_test(script: ModuleType) -> None:
    assert script.binomial_tail(4, 3, 0.5) == pytest.approx(5 / 16)
    assert script.binomial_tail(500, 0, 0.05) == pytest.approx(1)


@pytest.mark.parametrize("draws", ["499", "many"])
def test_too_few_draws_are_refused(
    draws: str,
    script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["coverage.py", "--draws", draws])
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 2 and "--draws" in capsys.readouterr().err


def test_a_bound_that_misses_more_than_nominal_turns_the_exit_code(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["coverage.py", "--draws", str(NUM_DRAWS)])
    monkeypatch.setattr(script, "betting", lambda *_: script.tokenwise)
    with pytest.raises(SystemExit) as ended:
        script.main()
    told = capsys.readouterr()
    assert ended.value.code == 1 and told.out.count("misses more |") == 7
    assert "mean, betting misses more than nominal" in told.err
