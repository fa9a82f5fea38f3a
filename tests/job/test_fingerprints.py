"""These tests show that whatever changes a number makes earlier statistics unusable."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pico
import pytest
import torch
from pico import Models

from lrc_cli.config import load_config
from lrc_cli.data.purposes import CALIBRATION
from lrc_cli.job import fingerprints
from lrc_cli.job.fingerprints import (
    FIGURES,
    NO_NUMBERS,
    NUMBERS,
    PACKAGE,
    code_hash,
    digest,
    sources_of,
    statistics_fingerprint,
)
from lrc_cli.job.plan import Plan, make_plan


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory, checkpoint: Models, text: Path) -> Plan:
    changes = {"model.path": str(checkpoint("bert-mlm")), "calibration.path": str(text)}
    return make_plan(load_config(pico.job(tmp_path_factory.mktemp("plan"), changes)))


def fields(plan: Plan, **changes: Any) -> dict[str, Any]:
    values = {
        "config": plan.config,
        "source": plan.source,
        "calibration": plan.sequences[CALIBRATION],
        "solvers": {name: x.solver for name, x in plan.planned.items()},
        "network": plan.network,
        "tokenizer": plan.tokenizer,
    }
    return statistics_fingerprint(**{**values, **changes})


def test_the_same_plan_has_the_same_fingerprint(plan: Plan) -> None:
    assert fields(plan) == plan.statistics_fingerprint
    assert digest(fields(plan)) == digest(plan.statistics_fingerprint)


@pytest.mark.parametrize(
    ("changed", "edit"),
    [
        ("mask token", lambda _: {"tokenizer": SimpleNamespace(mask_token_id=7)}),
        ("mask token", lambda _: {"tokenizer": None}),
        (
            "dtype",
            lambda plan: {
                "network": SimpleNamespace(dtype=torch.bfloat16, device=plan.network.device)
            },
        ),
    ],
)
def test_what_the_statistics_depend_on(
    changed: str, edit: Callable[[Plan], dict[str, Any]], plan: Plan
) -> None:
    before, after = fields(plan), fields(plan, **edit(plan))
    assert [name for name in before if before[name] != after[name]] == [changed]


def test_another_release_of_a_library_counts(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    before = fields(plan)
    monkeypatch.setattr(fingerprints, "version", lambda name: f"{name} 99")
    after = fields(plan)
    changed = [name for name in before if before[name] != after[name]]
    assert changed == ["torch version", "transformers version"]


# ---------------------------------------------------------------- sources


def test_every_part_of_the_package_is_on_one_side() -> None:
    """Whoever adds a folder says whether the folder makes numbers."""
    parts = {path.name for path in PACKAGE.iterdir() if path.is_dir() or path.suffix == ".py"}
    sides = [*NUMBERS, *FIGURES, *NO_NUMBERS]
    nested = [part for part in sides if "/" in part]
    assert sorted({*sides} - {*nested}) == sorted(parts - {"__pycache__"})
    assert len(set(sides)) == len(sides)
    # A file by itself stands on another side than its folder.
    assert all(part.partition("/")[0] in NO_NUMBERS and part not in NO_NUMBERS for part in nested)


@pytest.mark.parametrize("part", [*NUMBERS, *FIGURES, *NO_NUMBERS])
def test_every_side_has_sources(part: str) -> None:
    assert sources_of(PACKAGE / part)


def test_a_file_counts_and_a_name_without_sources_is_refused(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "empty").mkdir()
    for name in ("top.py", "deep/nested.py", "deep/other.py"):
        (tmp_path / name).write_text(f"# {name}\n")
        assert sources_of(tmp_path / name) == [tmp_path / name]
    alone, whole = code_hash(("deep/nested.py",), tmp_path), code_hash(("deep",), tmp_path)
    assert len({alone, whole, code_hash(("top.py",), tmp_path)}) == 3
    assert code_hash(("deep", "deep/nested.py"), tmp_path) == whole
    for name in ("gone.py", "empty"):
        with pytest.raises(FileNotFoundError, match="there are no sources"):
            sources_of(tmp_path / name)


def add(file: Path, text: str) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text((file.read_text() if file.exists() else "") + text)


@pytest.mark.parametrize(
    ("file", "work", "report"),
    [
        ("errors.py", True, True),
        ("commands/another.py", True, True),
        ("forecast/another.py", True, True),
        ("report/html.py", True, True),
        ("report/record.py", False, False),
        ("quality/compare.py", True, False),
        ("engine/linalg.py", False, False),
        ("engine/solvers/another.py", False, False),
        ("job/plan.py", False, False),
    ],
)
def test_which_sources_make_earlier_work_unusable(
    file: str, work: bool, report: bool, tmp_path: Path
) -> None:
    """Returns whether the work directory and the finished output may be used after an edit."""
    before, after = tmp_path / "before", tmp_path / "after"
    for copy in (before, after):
        shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    both = (*NUMBERS, *FIGURES)
    assert code_hash(root=before) == code_hash() and code_hash(both) == code_hash(both, before)
    add(after / file, '"""Another sentence."""\n')
    assert (code_hash(root=before) == code_hash(root=after)) is work
    assert (code_hash(both, before) == code_hash(both, after)) is report
