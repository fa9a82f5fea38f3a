"""This module decides which files of a directory hold the checkpoint.

A directory may hold a checkpoint in several forms side by side: one file, shards with an index,
files of torch.save, shards of torch.distributed.checkpoint. transformers and lrc need the same
answer, so nothing else in the package chooses among files.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from lrc_cli.checkpoint.headers import INDEX_NAME, SINGLE_NAME
from lrc_cli.errors import InputError
from lrc_cli.reading import read_json

METADATA_NAME = ".metadata"
"""The file that a directory of torch.distributed.checkpoint has beside its shards."""
OLD_SINGLE, OLD_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
SAFE = (".safetensors",)
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
INDEX = ".index.json"
NAMED = "transformers_weights"
"""The key of config.json that tells transformers which file to read."""
SHARD = re.compile(r"-\d{5}-of-\d{5}$", re.IGNORECASE)
RESTORE = "restore the index that was saved with the shards"


@dataclass(frozen=True, kw_only=True)
class Form:
    """One form of a checkpoint: the files that hold its tensors."""

    place: Path
    """The file that readers look for: the only file, the index, or torch's metadata."""
    files: Sequence[Path]
    """The weight files, sorted; empty for torch.distributed.checkpoint, which knows its own."""
    weight_map: Mapping[str, str] | None = None
    """The index's file name of each key; None where there is no index."""
    is_partial: bool = False
    """Whether the file is a shard that no index names, so that most tensors are elsewhere."""
    is_optional: bool = False
    """Whether no reader would look for the place by its name, so that it may hold anything."""

    @property
    def is_safetensors(self) -> bool:
        """Whether the files are safetensors."""
        return bool(self.files) and _has_suffix(self.files[0], SAFE)


def forms_of(path: Path, named: object = None) -> list[Form]:
    """Returns every form of the checkpoint in a directory, in the order in which readers look.

    The order is transformers' (the named file, the safetensors file, its index, pytorch_model.bin,
    its index), with other indexes and torch.distributed.checkpoint in between. A file of any name
    counts where there is nothing else. The list is empty if there is no weight file.

    Args:
        path: the directory.
        named: what config.json has for `transformers_weights`.

    Raises:
        InputError: an index is damaged or names files that are missing or outside of the directory,
            `named` is wrong, or there are several files without an index.
    """
    safe = [*_named(path, named), *_single(path, SINGLE_NAME), *_indexes(path, SAFE, INDEX_NAME)]
    safe = safe or _only(path, SAFE)
    old = [*_single(path, OLD_SINGLE), *_indexes(path, PICKLED, OLD_INDEX)]
    sharded = (path / METADATA_NAME).is_file()
    if safe or old:  # another program may have a file of this name
        sharded = sharded and any(path.glob("*.distcp"))
    middle = [Form(place=path / METADATA_NAME, files=())] if sharded else []
    forms = [*safe, *middle, *(old or ([] if safe or middle else _only(path, PICKLED)))]
    unique = {form.place: form for form in reversed(forms)}
    forms = list(reversed(unique.values()))
    return [*forms, *_twins(path, forms)]


def transformers_place(path: Path, named: object = None) -> Path:
    """Returns the file for which transformers looks in a directory of safetensors."""
    if isinstance(named, str):
        return path / named
    single = path / SINGLE_NAME
    return single if single.is_file() else path / INDEX_NAME


def check_index(
    index: Path, weight_map: Mapping[str, str], keys: Mapping[Path, Collection[str]]
) -> None:
    """Raises InputError where an index and its files disagree.

    Args:
        index: the index.
        weight_map: the index's file name of each key.
        keys: the keys that each file holds.
    """
    for key, name in weight_map.items():
        file = index.parent / name
        if key not in keys[file]:
            holder = next((other for other, held in keys.items() if key in held), None)
            really = f"{holder} holds it" if holder else "no other file does"
            cause = f"{index} says that {file} holds {key}, which is not there ({really})"
            raise InputError(cause, RESTORE)
    for file, held in keys.items():
        stray = next((key for key in held if key not in weight_map), None)
        if stray is not None:
            raise InputError(f"{file} holds {stray}, which {index} does not name", RESTORE)


def _named(path: Path, named: object) -> list[Form]:
    """Returns the form that config.json names, if it names one."""
    if named is None:
        return []
    config, index = path / "config.json", f"{SAFE[0]}{INDEX}"
    if not isinstance(named, str) or not named.endswith((SAFE[0], index)):
        raise InputError(
            f"{config}: {NAMED} is {named!r}, which is no safetensors file and no index of any",
            "name one, or remove the key",
        )
    _check_inside(config, named)
    if not _is_file(path / named):
        raise InputError(f"{config}: {NAMED} names {path / named}, which is missing", "restore it")
    if named.endswith(INDEX):
        return [_indexed(path / named, _weight_map(path / named))]
    return [Form(place=path / named, files=[path / named])]


def _single(path: Path, name: str) -> list[Form]:
    file = path / name
    return [Form(place=file, files=[file])] if _is_file(file) else []


def _only(path: Path, suffixes: Sequence[str]) -> list[Form]:
    """Returns the only file with one of the suffixes, whatever its name.

    The first is returned of several whose names differ only in case and suffix.

    Raises:
        InputError: there are several with other names.
    """
    files = sorted(x for x in path.iterdir() if _has_suffix(x, suffixes) and x.is_file())
    if len({file.stem.casefold() for file in files}) > 1:
        index = INDEX_NAME if suffixes is SAFE else OLD_INDEX
        raise InputError(
            f"{path}: several {files[0].suffix} files and no {index}",
            "add the index, or give the one file that holds the weights",
        )
    return [Form(place=file, files=[file]) for file in files[:1]]


def _indexes(path: Path, suffixes: Sequence[str], standard: str) -> list[Form]:
    """Returns the forms that indexes name, the standard name first; others are known by content."""
    others = sorted(
        file
        for file in path.iterdir()
        if file.name.lower().endswith(INDEX) and file.name not in _STANDARD
    )
    forms = []
    for index in [path / standard, *others]:
        if not index.exists() and not index.is_symlink():
            continue
        content = read_json(index)
        if index.name != standard and not isinstance(content.get("weight_map"), dict):
            continue
        form = _indexed(index, _checked_map(index, content))
        if _has_suffix(form.files[0], suffixes) or index.name == standard:
            forms.append(form)
    return forms


_STANDARD = frozenset({INDEX_NAME, OLD_INDEX})


def _weight_map(index: Path) -> dict[str, str]:
    return _checked_map(index, read_json(index))


def _checked_map(index: Path, content: Mapping[str, Any]) -> dict[str, str]:
    weight_map = content.get("weight_map")
    is_map = isinstance(weight_map, dict) and all(isinstance(x, str) for x in weight_map.values())
    if not is_map or not weight_map:
        raise InputError(f"{index}: weight_map does not name a file by tensor", "restore it")
    return dict(weight_map)


def _indexed(index: Path, weight_map: Mapping[str, str]) -> Form:
    """Returns the form that an index names, after a look at the names.

    Raises:
        InputError: a file is missing, lies outside of the directory, or has another suffix than the
            first.
    """
    names = sorted(set(weight_map.values()))
    for name in names:
        _check_inside(index, name)
        if not _is_file(index.parent / name):
            raise InputError(
                f"{index} names {index.parent / name}, which is missing", "copy all shards"
            )
    files = sorted({index.parent / name for name in names})
    safe = {_has_suffix(file, SAFE) for file in files}
    if len(safe) > 1 or not all(_has_suffix(file, (*SAFE, *PICKLED)) for file in files):
        kinds = " and ".join(sorted({file.suffix or "no suffix" for file in files}))
        raise InputError(f"{index} names files of several kinds ({kinds})", RESTORE)
    return Form(place=index, files=files, weight_map=weight_map)


def _check_inside(where: Path, name: str) -> None:
    """Raises InputError for a name that leads out of the directory of `where`.

    A link inside of the directory may lead out: a cache of the Hugging Face hub is made of links.
    """
    parts = (*PurePosixPath(name).parts, *PureWindowsPath(name).parts)
    is_absolute = PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor
    if ".." in parts or is_absolute or not PurePosixPath(name).parts:
        raise InputError(
            f"{where} names {name!r}, which is outside of {where.parent}",
            "keep the weight files beside it, and name them without a folder",
        )


def _is_file(file: Path) -> bool:
    try:
        return file.is_file()
    except OSError:  # the name is too long
        return False


def _twins(path: Path, forms: Sequence[Form]) -> list[Form]:
    """Returns files that may hold another form of the checkpoint, which no reader looks for first.

    Such a file has a suffix of weights and the name of a form, or a name that transformers gives.
    The case of letters does not count, and neither do the numbers of a shard: an older save may
    have left it, or a file system that takes both cases for one name.
    """
    used = {file for form in forms for file in form.files}
    if not used:
        return []
    stems = {_stem(file) for file in used} | {_stem(Path(SINGLE_NAME)), _stem(Path(OLD_SINGLE))}
    return [
        Form(place=file, files=[file], is_partial=_is_shard(file), is_optional=True)
        for file in sorted(path.iterdir())
        if file not in used and _has_suffix(file, (*SAFE, *PICKLED)) and _stem(file) in stems
        if _is_file(file)
    ]


def _is_shard(file: Path) -> bool:
    return bool(SHARD.search(file.stem))


def _stem(file: Path) -> str:
    """Returns a name without its suffix and the numbers of a shard, in small letters."""
    return SHARD.sub("", file.stem).casefold()


def _has_suffix(file: Path, suffixes: Collection[str]) -> bool:
    return file.suffix.lower() in suffixes
