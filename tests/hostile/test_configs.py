"""Hostile configs and command lines are refused before anything else is looked at."""

from collections.abc import Callable

import pytest
from hostile.configs import CASES, VALUES
from hostile.harness import Case

# pytestmark = pytest.mark.timeout(60)


@pytest.mark.parametrize("case", VALUES, ids=str)
def test_a_hostile_value(case: Case, attempt: Callable[[Case], None]) -> None:
    attempt(case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_hostile_config(case: Case, attempt: Callable[[Case], None]) -> None:
    attempt(case)
