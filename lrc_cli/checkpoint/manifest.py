"""The file manifest.json lists the sha256 of every file and of every tensor's bytes."""

import hashlib
from pathlib import Path
from typing import Any

from lrc_cli.checkpoint.headers import open_tensors, read_json
from lrc_cli.runtime.files import hash_file, tensor_bytes

MANIFEST_NAME = "manifest.json"


def build_manifest(directory: Path) -> dict[str, Any]:
    """Hashes every file of `directory` but the manifest itself, and every tensor of its weights.

    Weights in subfolders belong to other networks and count as files only.

    Returns:
        {"files": {relative name: sha256}, "tensors": {key: sha256}}, both sorted.
    """
    names = sorted(
        file.relative_to(directory).as_posix()
        for file in directory.rglob("*")
        if file.is_file() and file != directory / MANIFEST_NAME
    )
    tensors: dict[str, str] = {}
    for name in names:
        if name.endswith(".safetensors") and "/" not in name:
            with open_tensors(directory / name) as handle:
                for key in handle.keys():  # noqa: SIM118 (a handle is not a mapping)
                    tensors[key] = hashlib.sha256(tensor_bytes(handle.get_tensor(key))).hexdigest()
    return {
        "manifest_version": 1,
        "files": {name: hash_file(directory / name) for name in names},
        "tensors": dict(sorted(tensors.items())),
    }


def matches_manifest(directory: Path) -> bool:
    """Returns whether every file that manifest.json names is there with the hash that it names.

    Raises:
        InputError: manifest.json is not JSON.
    """
    files = read_json(directory / MANIFEST_NAME).get("files")
    return isinstance(files, dict) and all(
        (directory / name).is_file() and hash_file(directory / name) == sha256
        for name, sha256 in files.items()
    )
