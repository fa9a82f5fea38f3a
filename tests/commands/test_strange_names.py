"""File names that are not UTF-8 are refused before any work, with the name in readable letters."""

import os
import shutil
from pathlib import Path

import pico
import pytest
from command_helpers import Changes, assert_nothing_left, assert_one_sentence

from lrc_cli.errors import InputError
from lrc_cli.reading import check_file_name
from lrc_cli.runtime.files import hash_path

STRANGE = b"caf\xe9"


def put(folder: Path, name: bytes) -> None:
    """Makes an empty file with a name of any bytes."""
    place = os.path.join(os.fsencode(folder), name)
    os.makedirs(os.path.dirname(place), exist_ok=True)
    open(place, "wb").close()


@pytest.mark.parametrize("name", [STRANGE, STRANGE + b".txt", b"sub/" + STRANGE, STRANGE + b"/x"])
def test_a_side_file(name: bytes, tmp_path: Path, llama_job: Changes) -> None:
    model = Path(shutil.copytree(llama_job["model.path"], tmp_path / "model"))
    put(model, name)
    job = pico.job(tmp_path, llama_job | {"model.path": str(model)})
    assert_one_sentence(pico.call("compress", job, "-q"), 2, r"caf\xe9", "not UTF-8", "rename")
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize("name", [b".hidden-" + STRANGE, b"onnx/" + STRANGE])
def test_a_file_that_is_not_carried_over_does_not_matter(
    name: bytes, tmp_path: Path, llama_job: Changes
) -> None:
    model = Path(shutil.copytree(llama_job["model.path"], tmp_path / "model"))
    put(model, name)
    assert pico.call("inspect", model).code == 0


def test_hashes_and_names(tmp_path: Path) -> None:
    put(tmp_path, STRANGE + b".png")
    with pytest.raises(InputError, match=r"caf\\xe9\.png: the name is not UTF-8"):
        hash_path(tmp_path)
    check_file_name(tmp_path / "café.png")
