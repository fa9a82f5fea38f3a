"""These checks need the files only: manifest.json against every file and every tensor's bytes."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from lrc_cli.checkpoint.headers import INDEX_NAME, open_tensors
from lrc_cli.errors import InputError
from lrc_cli.reading import check_on_disk, open_regular, read_json, walk
from lrc_cli.verify.statements import Findings

MANIFEST = "manifest.json"
REPORT = "report.json"
OWN_FILES = frozenset(
    {MANIFEST, REPORT, "report.html", "README.md", "lrc.yaml", "config.json", INDEX_NAME}
)
"""The names of files that lrc writes beside the weight files."""


def open_manifest(directory: Path) -> dict[str, Any]:
    """Returns manifest.json of a finished output.

    Raises:
        InputError: there is no such directory, or no manifest.json that can be read in it.
    """
    if not directory.exists():
        raise InputError(f"{directory} does not exist", "check the path")
    if not directory.is_dir():
        raise InputError(f"{directory} is not a directory", "give the directory that lrc wrote")
    if not (directory / MANIFEST).is_file():
        raise InputError(
            f"{directory} is not a finished output of lrc: it has no {MANIFEST}",
            "give the directory that `lrc compress` printed",
        )
    return read_json(directory / MANIFEST)


def sha256_of(file: Path) -> str:
    """Returns sha256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open_regular(file) as handle:
        while chunk := handle.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def data_sha256(path: Path) -> str:
    """Returns a data file's sha256; a folder's is over the list that `sha256sum` makes of it.

    Raises:
        InputError: a file cannot be read, or as `walk`.
    """
    check_on_disk(path)
    if not path.is_dir():
        return sha256_of(path)
    files = (Path(folder, name) for folder, _, names in walk(path) for name in names)
    names = {file.relative_to(path): file for file in files if file.is_file()}
    visible = {
        name.as_posix(): file
        for name, file in names.items()
        if not any(part.startswith(".") for part in name.parts)
    }
    lines = (f"{sha256_of(visible[name])}  {name}\n" for name in sorted(visible))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def check_manifest(directory: Path, manifest: dict[str, Any], findings: Findings) -> None:
    """Every file and every tensor must be named in manifest.json, and no other may be."""
    what = "manifest.json lists the hashes of files and of tensors"
    files, tensors = manifest.get("files"), manifest.get("tensors")
    right = all(isinstance(table, dict) for table in (files, tensors))
    if not findings.judge("manifest.form", what, None if right else "its tables are missing"):
        return
    assert isinstance(files, dict) and isinstance(tensors, dict)
    with findings.guard("files.hash", "the files can be read"):
        _check_files(directory, files, findings)
    with findings.guard("tensors.hash", "the tensors can be read"):
        _check_tensors(directory, tensors, findings)


def _check_files(directory: Path, files: dict[str, str], findings: Findings) -> None:
    there = {
        file.relative_to(directory).as_posix(): file
        for file in sorted(directory.rglob("*"))
        if file.is_file() and file != directory / MANIFEST
    }
    for name, sha256 in files.items():
        what = f"{name} has the hash that manifest.json says"
        if name not in there:
            findings.judge("files.hash", what, "the file is missing")
            continue
        found = sha256_of(there[name])
        problem = None if found == sha256 else f"stated {sha256}, found {found}"
        findings.judge("files.hash", what, problem)
    # A link that leads nowhere, or a pipe, cannot be hashed and should not be there.
    odd = (x for x in directory.rglob("*") if x.is_symlink() or not (x.is_file() or x.is_dir()))
    extra = sorted({*there, *(x.relative_to(directory).as_posix() for x in odd)} - set(files))
    problem = f"{len(extra)} are not named: {', '.join(extra[:3])}" if extra else None
    findings.judge("files.known", "manifest.json names every file", problem)


def _check_tensors(directory: Path, tensors: dict[str, str], findings: Findings) -> None:
    found: dict[str, str] = {}
    for file in sorted(directory.glob("*.safetensors")):
        with (
            findings.guard("tensors.hash", f"{file.name} can be read"),
            open_tensors(file) as open_,
        ):
            for key in open_.keys():  # noqa: SIM118 (a handle is not a mapping)
                found[key] = tensor_sha256(open_.get_tensor(key))
    for key in sorted({*tensors, *found}):
        what = f"tensor {key} has the bytes that manifest.json says"
        stated, actual = tensors.get(key), found.get(key)
        problem = None
        if stated is None or actual is None:
            problem = "it is not in manifest.json" if stated is None else "the tensor is missing"
        elif stated != actual:
            problem = f"stated {stated}, found {actual}"
        findings.judge("tensors.hash", what, problem)


def check_origins(
    directory: Path, recorded: Mapping[str, str], weights: Iterable[str], findings: Findings
) -> None:
    """Every file must be written by lrc or be an unchanged file of the original.

    Args:
        recorded: sha256 of the original's files, as in the report.
        weights: names of the output's weight files.
    """
    own = {*OWN_FILES, *weights}
    names = sorted(
        file.relative_to(directory).as_posix() for file in directory.rglob("*") if file.is_file()
    )
    unknown = [name for name in names if name not in own and name not in recorded]
    problem = f"not so: {', '.join(unknown[:3])}" if unknown else None
    findings.judge("files.origin", "every file is lrc's or the original's", problem)
    for name, sha256 in recorded.items():
        if name in names and name not in own:
            found, what = sha256_of(directory / name), f"{name} is the original's, by its hash"
            problem = None if found == sha256 else f"stated {sha256}, found {found}"
            findings.judge("files.origin", what, problem)


def tensor_sha256(tensor: torch.Tensor) -> str:
    """Returns sha256 of a tensor's bytes, row-major."""
    data = tensor.contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(data.numpy().data).hexdigest()


def check_pin(directory: Path, expected: str | None, findings: Findings) -> str:
    """Checks the hash of manifest.json itself, which stands for the whole directory.

    Args:
        expected: the hash that the user got elsewhere, in hexadecimal; None: none.

    Returns:
        The actual hash.
    """
    found = sha256_of(directory / MANIFEST)
    what = "manifest.json has the hash that was given"
    if expected is not None:
        same = expected.strip().lower() == found
        problem = None if same else f"given {expected}, found {found}"
        findings.judge("manifest.pinned", what, problem)
    else:
        findings.not_checked(
            "manifest.pinned", what, "no --manifest-sha256 was given", by_design=True
        )
    return found


def check_hex(expected: str | None) -> None:
    """Raises InputError where --manifest-sha256 cannot be a sha256."""
    digits = (expected or "0" * 64).strip().lower()
    if len(digits) != 64 or set(digits) - set("0123456789abcdef"):
        raise InputError(
            f"--manifest-sha256 {expected}: not a sha256", "give its 64 hexadecimal digits"
        )


def is_inside(name: str) -> bool:
    """Returns whether the name of a recorded file stays inside its directory."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts
