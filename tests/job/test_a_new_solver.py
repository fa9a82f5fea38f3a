"""These tests add a method from outside: one `Solver`, its entry and its name in the config."""

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from torch import Tensor
from verify_helpers import failed

import lrc_cli
from lrc_cli.config import json_schema
from lrc_cli.config.compression import METHODS, MethodRules
from lrc_cli.engine import (
    FROBENIUS,
    SOLVERS,
    Approximation,
    Errors,
    Factors,
    Given,
    Metric,
    Solution,
    Solver,
    Statistics,
    Survey,
)
from lrc_cli.engine.problem import required
from lrc_cli.engine.solvers.approximation import OnDenseInputs, tail
from lrc_cli.network.low_rank.modules import LowRankModule
from lrc_cli.verify import verify_directory

PACKAGE = Path(lrc_cli.__file__).parent
RUNS = ("job", "forecast", "execution", "commands", "network", "data", "quality", "runtime")
"""The folders in which no method has a name."""


def scales(statistics: Statistics) -> Tensor:
    """Returns the root mean square of every input: (n,) float64."""
    return required(statistics.gram, "gram").diagonal().sqrt().clamp(min=1e-12)


def diagonal(statistics: Statistics) -> Metric:
    """Returns the metric of the squared output error, as if the inputs were uncorrelated."""
    return Metric(gram=torch.diag(scales(statistics) ** 2))


def spectrum(weight: Tensor, statistics: Statistics) -> Tensor:
    return torch.linalg.svdvals(weight.double() * scales(statistics)) ** 2


def factorize(weight: Tensor, statistics: Statistics, rank: int) -> Factors:
    u, s, vt = torch.linalg.svd(weight.double() * scales(statistics), full_matrices=False)
    root = s[:rank].sqrt()
    return Factors(u[:, :rank] * root, root[:, None] * vt[:rank] / scales(statistics))


def survey(weight: Tensor, statistics: Statistics) -> Survey:
    found = spectrum(weight, statistics)
    return Survey(spectrum=found, output_curve=found.clone())


class OnScaledInputs(OnDenseInputs):
    """The best matrix of a rank in the inner product of the inputs' mean squares."""

    unit = "output error of uncorrelated inputs"
    made = 0
    """The number of problems that were made, which the test sets to 0."""

    def __init__(self, given: Given) -> None:
        super().__init__(given.weight, given.statistics)
        self.metric = diagonal(self.statistics)
        OnScaledInputs.made += 1

    @property
    def output_spectrum(self) -> Tensor:
        return FROBENIUS.spectrum(self.weight, self.statistics)

    def solve(self, rank: int) -> Solution:
        return Solution(factorize(self.weight, self.statistics, rank), self.weight)

    def errors(self, fitted: Tensor) -> Errors:
        difference = self.weight - fitted
        plain = Metric(gram=self.statistics.gram).error(difference)
        return Errors(self.metric.error(difference), plain)

    def optimum(self, rank: int) -> float:
        return tail(spectrum(self.weight, self.statistics), rank)

    @property
    def total(self) -> float:
        return spectrum(self.weight, self.statistics).sum().item()


def problems(given: Given) -> list[Approximation]:
    return [OnScaledInputs(given)]


SCALED = Solver(
    name="scaled",
    unit=OnScaledInputs.unit,
    needs=frozenset({"gram"}),
    metric=diagonal,
    spectrum=spectrum,
    factorize=factorize,
    survey=survey,
    problems=problems,
    no_center="scaled knows no mean",
    no_layer_error="scaled takes inputs to be uncorrelated",
)

Changes = dict[str, Any]


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch, llama_job: Changes) -> Iterator[Changes]:
    """Returns changes for `pico.job`. The engine and the config know the method."""
    monkeypatch.setitem(SOLVERS, SCALED.name, SCALED)
    monkeypatch.setitem(METHODS, SCALED.name, MethodRules())
    monkeypatch.setattr(OnScaledInputs, "made", 0)
    yield {**llama_job, "compression.method": SCALED.name}


def files_of(output: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in output.glob("*.safetensors")}


def test_it_compresses_and_what_is_written_loads(tmp_path: Path, job: Changes) -> None:
    output, report = pico.compressed(tmp_path, job)
    factorised = [row for row in report["layers"] if row["storage"] != "dense"]
    assert len(factorised) >= 10 and report["method"] == "scaled" and report["target"]["met"]
    assert OnScaledInputs.made == len(factorised)
    for row in factorised:
        metric = row["errors"]["metric"]
        assert row["method"] == "scaled" and metric["unit"] == OnScaledInputs.unit
        assert 0 < metric["optimum"] <= metric["stored"] < metric["total"]
        assert metric["stored"] < metric["svd"]
    network = lrc_cli.load(output)
    modules = [m for m in network.modules() if isinstance(m, LowRankModule)]
    assert len(modules) == len(factorised)
    with torch.no_grad():
        logits = network(torch.arange(5, 15)[None]).logits
    assert logits.isfinite().all()


def test_verification_says_that_it_does_not_know_the_method(tmp_path: Path, job: Changes) -> None:
    output, report = pico.compressed(tmp_path, job)
    names = {row["name"] for row in report["layers"] if row["storage"] != "dense"}
    against = job["model.path"]
    found = verify_directory(output, against=Path(against))
    assert failed(found) == []
    left = [s for s in found.findings.with_status("not checked") if s.id.startswith("c1.")]
    for id in ("c1.output", "c1.metric", "c1.bias"):
        own = [s for s in left if s.id == id]
        assert len(own) == len(names) and all(
            "nothing of the method scaled" in s.detail for s in own
        )
        assert all(any(name in s.what for name in names) for s in own)
    assert not [s for s in found.findings.with_status("holds") if s.id.startswith("c1.")]
    # Checks that do not depend on the method are made as for other methods.
    holds = {s.id for s in found.findings.with_status("holds")}
    assert {"tensors.hash", "original.tensors", "quality.measured", "config.method"} <= holds
    ended = pico.call("verify", output, "--against", against)
    assert ended.code == 0 and "knows nothing of the method scaled" in ended.out


def test_a_known_method_renamed_in_the_report_is_found(tmp_path: Path, llama_job: Changes) -> None:
    """Without this, none of the errors of a new method would be checked."""
    output, report = pico.compressed(tmp_path, {**llama_job, "compression.method": "frobenius"})
    for row in report["layers"]:
        row["method"] = "scaled"
    (output / "report.json").write_text(json.dumps(report))
    found = verify_directory(output)
    assert any(line.startswith("config.method") for line in failed(found))


def test_a_run_goes_on_from_its_work_directory(tmp_path: Path, job: Changes) -> None:
    output, _ = pico.compressed(tmp_path, job)
    first, made = files_of(output), OnScaledInputs.made
    output.rename(tmp_path / "aside")
    again, _ = pico.compressed(tmp_path, job)
    assert OnScaledInputs.made == made > 0, "the factors were there"
    assert first and files_of(again) == first
    fresh, _ = pico.compressed(tmp_path, job, "--force", "--restart")
    assert OnScaledInputs.made == 2 * made and files_of(fresh) == first


def test_a_layer_may_have_it_beside_other_methods(tmp_path: Path, job: Changes) -> None:
    changes = {
        **job,
        "compression.method": "frobenius",
        "compression.layers": {"*q_proj": {"method": "scaled"}},
    }
    _, report = pico.compressed(tmp_path, changes)
    methods = {row["name"].rpartition(".")[2]: row["method"] for row in report["layers"]}
    assert methods["q_proj"] == "scaled" and methods["k_proj"] == "frobenius"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("center", True, "compression.center: scaled knows no mean; set center: false"),
        (
            "max_layer_error",
            0.5,
            "max_layer_error: scaled takes inputs to be uncorrelated; use frobenius or curvature",
        ),
        ("sequential", True, "no layer has method frobenius or curvature, but scaled"),
        ("max_loss_increase", 0.5, "max_loss_increase: needs method curvature, not scaled"),
    ],
)
def test_what_it_cannot_do_is_said_in_its_own_words(
    tmp_path: Path, job: Changes, key: str, value: Any, message: str
) -> None:
    ended = pico.call("compress", pico.job(tmp_path, {**job, f"compression.{key}": value}))
    assert ended.code == 2 and message in ended.err


def test_the_config_knows_it(tmp_path: Path, job: Changes) -> None:
    compression = json_schema()["properties"]["compression"]["properties"]
    assert "scaled" in compression["method"]["enum"]
    ended = pico.call("compress", pico.job(tmp_path, {**job, "compression.method": "scald"}))
    assert ended.code == 2 and "did you mean 'scaled'?" in ended.err


def test_config_and_engine_say_the_same_of_every_method() -> None:
    solvers = {
        name: MethodRules(
            predicts_loss=solver.predicts_loss, takes_threshold=solver.rank_above is not None
        )
        for name, solver in SOLVERS.items()
    }
    assert solvers == METHODS
    assert all(name == solver.name for name, solver in SOLVERS.items())


def test_an_activation_and_what_stands_in_are_given_together() -> None:
    for solver in SOLVERS.values():
        assert (solver.followed_by is None) == (solver.stand_in is None)


def words_of(file: Path) -> Iterator[str]:
    """Returns the texts, names and imported names of a source file."""
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        match node:
            case ast.Constant(value=str(word)) | ast.Name(id=word) | ast.alias(name=word):
                yield word


@pytest.mark.parametrize("folder", RUNS)
def test_no_method_has_a_name_where_jobs_are_run(folder: str) -> None:
    names = {*METHODS, *(name.upper() for name in METHODS)}
    found = {
        f"{file.name}: {word}"
        for file in (PACKAGE / folder).rglob("*.py")
        for word in words_of(file)
        if word in names
    }
    # Reports compare every layer with plain SVD, so a key of the errors has the name.
    assert found - {"fit.py: svd"} == set()


def test_the_names_of_methods_are_seen() -> None:
    assert {"relu", "RELU", "FROBENIUS"} <= set(words_of(PACKAGE / "engine/solvers/relu.py"))
