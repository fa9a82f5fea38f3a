"""A job runs without and with a training of its factors."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pico
import pytest


def plain_and_trained(
    folders: pytest.TempPathFactory,
    model: Path,
    text: Path,
    *,
    changes: Mapping[str, Any],
    trained: Mapping[str, Any],
) -> tuple[Path, Any, Path, Any]:
    """Returns the output and the report of a job, and of the same job with training.

    Args:
        changes: the job's settings; settings of `recover` count for the second job only.
        trained: the settings that turn training on.
    """
    job = {
        "model.path": str(model),
        "calibration.path": str(text),
        "calibration.num_sequences": 80,
        "certification": {"num_sequences": 12, "part": [0.6, 1.0]},
        **changes,
    }
    plain = {key: value for key, value in job.items() if not key.startswith("recover")}
    first = pico.compressed(folders.mktemp("plain"), plain)
    return (*first, *pico.compressed(folders.mktemp("trained"), {**job, **trained}))
