"""Hostile networks are refused by name, and no code of a stranger runs."""

from collections.abc import Callable

import pytest
from hostile.harness import Case
from hostile.networks import CASES

# pytestmark = pytest.mark.timeout(60)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_hostile_network(case: Case, attempt: Callable[[Case], None]) -> None:
    attempt(case)
