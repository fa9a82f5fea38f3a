"""A fixture shared by the tests of `lrc verify`."""

from pathlib import Path

import pico
import pytest
from pico import Models
from verify_helpers import Made


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, checkpoint: Models, text: Path) -> Made:
    """A sharded pico Llama with a certificate."""
    changes = {
        "model.path": str(checkpoint("llama")),
        "calibration.path": str(text),
        "certification.part": [0.6, 1.0],
        "certification.num_sequences": 40,
        "certification.sequence_length": 16,
        "output.shard_size": "60KB",
    }
    output, _ = pico.compressed(tmp_path_factory.mktemp("made"), changes)
    return Made(output, checkpoint("llama"))
