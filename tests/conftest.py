"""Fixtures shared by all tests: tiny checkpoints, written once per session; long tests first."""

import signal
from pathlib import Path
from typing import Any

import pico
import pytest
import torch

# A failed assertion of these helpers shows its values, as one in a test does.
pytest.register_assert_rewrite("command_helpers", "sequential_helpers")

# A shell ignores these signals for jobs in the background, and what tests start would, too.
for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL)

# Threads cost more than they give at these sizes.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files come first, so that no worker ends alone with one."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six thousand words that every pico tokenizer knows."""
    file = tmp_path_factory.mktemp("text") / "words.txt"
    file.write_text(pico.words(6000))
    return file


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> pico.Models:
    """The directory of a model of pico.MODELS; tests must not change it."""
    root = tmp_path_factory.mktemp("models")
    return lambda name: (
        root / name if (root / name).exists() else pico.write_model(root / name, name)
    )


@pytest.fixture(scope="session")
def plain_folder(tmp_path_factory: pytest.TempPathFactory) -> pico.PlainFolder:
    """Checkpoints that are not transformers', with factories and calibration tensors."""
    return pico.write_plain(tmp_path_factory.mktemp("plain"))


@pytest.fixture
def llama_job(checkpoint: pico.Models, text: Path) -> dict[str, Any]:
    """Changes for `pico.job`: the pico Llama, fitted to the text."""
    return {"model.path": str(checkpoint("llama")), "calibration.path": str(text)}
