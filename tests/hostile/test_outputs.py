"""Damaged outputs are found out, and damaged work directories are computed again."""

from collections.abc import Callable

import pytest
from hostile.harness import Case
from hostile.outputs import CASES, WORK

# pytestmark = pytest.mark.timeout(60)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_damaged_output(case: Case, attempt: Callable[[Case], None]) -> None:
    attempt(case)


@pytest.mark.parametrize("case", WORK, ids=str)
def test_a_damaged_work_directory(case: Case, attempt: Callable[[Case], None]) -> None:
    attempt(case)
