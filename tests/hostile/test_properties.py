"""Properties of the readers hold for random inputs; `make fuzz` tries many more."""

import json
from typing import Any

import pytest
from hostile.harness import Pristine
from hostile.properties import properties
from hypothesis import HealthCheck, given, settings


@pytest.fixture(scope="session")
def report(pristine: Pristine) -> Any:
    """The report of a finished output."""
    return json.loads((pristine.done / "out/report.json").read_text())


@pytest.mark.parametrize("name", list(properties({"a": [1]})))
def test_a_property_holds(name: str, report: Any) -> None:
    inputs, holds = properties(report)[name]

    @settings(
        max_examples=60,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(inputs)
    def one(value: Any) -> None:
        holds(value)

    one()
