"""Hostile checkpoints are refused by name, and no code of a stranger runs."""

from collections.abc import Callable

import pytest
from hostile.checkpoints import CASES
from hostile.harness import Case

# pytestmark = pytest.mark.timeout(60)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_hostile_checkpoint(case: Case, attempt: Callable[[Case], None]) -> None:
    attempt(case)
