"""Fixtures of the hostile cases: one pristine room a session, and a copy of it a case."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hostile.harness import Case, Pristine, try_case


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Pristine:
    """Directories that nothing is wrong with; no test may change them."""
    return Pristine(tmp_path_factory.mktemp("pristine"))


@pytest.fixture
def attempt(tmp_path: Path, pristine: Pristine) -> Iterator[Callable[[Case], None]]:
    """Tries a case in a copy, which is deleted at the end."""
    yield lambda case: try_case(case, pristine, tmp_path / "room")
    shutil.rmtree(tmp_path, ignore_errors=True)
