"""Attacks of a stranger are refused by name, and doctored outputs are found out."""

from collections.abc import Callable

import pytest
from hostile.harness import Case
from hostile.strangers import CASES


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_strangers_attack(case: Case, attempt: Callable[[Case], None]) -> None:
    attempt(case)
