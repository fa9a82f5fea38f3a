"""A command ends as it should in any surrounding: streams, limits, permissions, names, clocks."""

from pathlib import Path

import pytest
from hostile.harness import Pristine
from hostile.surroundings import CASES, Surrounding, try_surrounding


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_hostile_surrounding(case: Surrounding, pristine: Pristine, tmp_path: Path) -> None:
    try_surrounding(case, pristine.done if case.is_done else pristine.job, tmp_path / "room")
