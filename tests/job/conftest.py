"""The tests of `compression.sequential` share the fixture that is made here."""

from pathlib import Path
from typing import Any

import pytest
from pico import Models
from sequential_helpers import MANY, Changes


@pytest.fixture
def sequential_job(checkpoint: Models, text: Path) -> Any:
    """Returns a function from a model's name to changes for `pico.job`."""

    def changes(name: str, **compression: Any) -> Changes:
        asked = {f"compression.{key}": value for key, value in compression.items()}
        paths = {"model.path": str(checkpoint(name)), "calibration.path": str(text)}
        return paths | MANY | asked

    return changes
