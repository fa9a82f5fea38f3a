"""The file manifest.json lists the sha256 of every file and of every tensor's bytes."""

import hashlib
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any, TypeGuard

from lrc_cli.checkpoint.headers import open_tensors
from lrc_cli.errors import InputError
from lrc_cli.reading import read_json
from lrc_cli.runtime.files import hash_file, tensor_bytes

MANIFEST_NAME = "manifest.json"
PARTIAL_MARK = ".lrc-partial"
"""The name of the file that marks a directory as an output of lrc's that is not finished."""
ALWAYS_WRITTEN = frozenset({"lrc.yaml", "report.json"})
"""The files that every output of `lrc compress` has."""
ALWAYS_CERTIFIED = frozenset({"certify.yaml", "certificate.json"})
"""The files that every output of `lrc certify` has."""
_SHA256 = re.compile("[0-9a-f]{64}")


def build_manifest(directory: Path) -> dict[str, Any]:
    """Hashes every file of `directory` but the manifest itself, and every tensor of its weights.

    The mark of a directory that is not finished does not count either.

    Weights in subfolders belong to other networks and count as files only.

    Returns:
        {"files": {relative name: sha256}, "tensors": {key: sha256}}, both sorted.
    """
    names = sorted(
        file.relative_to(directory).as_posix()
        for file in directory.rglob("*")
        if file.is_file() and file not in _apart(directory)
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


def _apart(directory: Path) -> tuple[Path, Path]:
    return directory / MANIFEST_NAME, directory / PARTIAL_MARK


def is_own_output(directory: Path) -> bool:
    """Returns whether a directory is an output that lrc wrote: its manifest.json says so.

    A file of that name proves nothing: web applications have one. The content decides.
    """
    return _own_files(directory) is not None


def find_added(directory: Path) -> Path | None:
    """Returns the first file of an output of lrc's that its manifest does not name; else None.

    Raises:
        ValueError: the directory is no output of lrc's.
    """
    files = _own_files(directory)
    if files is None:
        raise ValueError(f"{directory} is no output of lrc's")
    added = (
        path
        for path in sorted(directory.rglob("*"))
        if (path.is_symlink() or not path.is_dir())
        and path not in _apart(directory)
        and path.relative_to(directory).as_posix() not in files
    )
    return next(added, None)


def find_changed(directory: Path) -> Path | None:
    """Returns the first file of an output of lrc's that has other bytes than lrc wrote; else None.

    The manifest is written last, so files with an earlier time are not read. Two changes within a
    tick of the system's clock have one time.

    Raises:
        ValueError: the directory is no output of lrc's.
    """
    files = _own_files(directory)
    if files is None:
        raise ValueError(f"{directory} is no output of lrc's")
    written = _last_change(directory / MANIFEST_NAME)
    later = (
        directory / name
        for name in sorted(files)
        if os.path.isfile(directory / name) and _last_change(directory / name) >= written
    )
    return next(
        (x for x in later if hash_file(x) != files[x.relative_to(directory).as_posix()]), None
    )


def _last_change(file: Path) -> int:
    """The time of the last change of a file's bytes or, as where a file is moved, of its names."""
    found = file.stat()
    return max(found.st_mtime_ns, found.st_ctime_ns)


def _own_files(directory: Path) -> dict[str, str] | None:
    """The files that the manifest of an output of lrc's names; None for any other directory."""
    file = directory / MANIFEST_NAME
    try:
        manifest = None if file.is_symlink() else read_json(file)
    except InputError:  # none, or none that lrc wrote
        return None
    if manifest is None or not isinstance(manifest.get("manifest_version"), int):
        return None
    files, tensors = manifest.get("files"), manifest.get("tensors")
    if not _are_hashes(files) or not _are_hashes(tensors) or not all(map(_is_inside, files)):
        return None
    is_own = any(files.keys() >= names for names in (ALWAYS_WRITTEN, ALWAYS_CERTIFIED))
    return files if is_own else None


def _are_hashes(value: Any) -> TypeGuard[dict[str, str]]:
    return isinstance(value, dict) and all(
        isinstance(x, str) and _SHA256.fullmatch(x) is not None for x in value.values()
    )


def _is_inside(name: str) -> bool:
    """Whether a name is one that `build_manifest` gives a file: it stays in its directory."""
    path = PurePosixPath(name)
    return str(path) == name and not path.is_absolute() and ".." not in path.parts


def matches_manifest(directory: Path) -> bool:
    """Returns whether every file that manifest.json names is there with the hash that it names.

    Raises:
        InputError: manifest.json is not JSON.
    """
    files = read_json(directory / MANIFEST_NAME).get("files")
    return isinstance(files, dict) and all(
        os.path.isfile(directory / name) and hash_file(directory / name) == sha256
        for name, sha256 in files.items()
    )
