"""A fixture shared by the tests of `compression.sequential`."""

from pathlib import Path
from typing import Any

import pytest
from pico import Models
from sequential_helpers import MANY, Changes


@pytest.fixture
def sequential_job(checkpoint: Models, text: Path) -> Any:
    """Changes for `pico.job` by the model's name."""

    def changes(name: str, **compression: Any) -> Changes:
        asked = {f"compression.{key}": value for key, value in compression.items()}
        paths = {"model.path": str(checkpoint(name)), "calibration.path": str(text)}
        return paths | MANY | asked

    return changes
