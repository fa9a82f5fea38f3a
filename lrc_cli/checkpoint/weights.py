"""This module opens the tensors of weight files: one interface, and one class for each format."""

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch

from lrc_cli.checkpoint.choice import PICKLED, Form, check_index, forms_of
from lrc_cli.checkpoint.foreign import DEQUANTISE, explain_directory, explain_suffix, not_dense
from lrc_cli.checkpoint.headers import (
    DTYPES,
    TensorInfo,
    check_version,
    differ,
    file_headers,
    has_same_bytes,
    open_tensors,
    parse_record,
    read_headers,
)
from lrc_cli.checkpoint.pickles import PickledFiles
from lrc_cli.checkpoint.wrapped import KEY, bare
from lrc_cli.errors import InputError

PROGRAM = ".pt2"
"""The suffix of torch.export's programs: `PickledFiles` refuses them with other programs."""
ARCHIVED = (".pth.tar", ".pt.tar")
"""The names that many training loops give to files of torch.save, which are no archives of tar."""
READ = ".safetensors, .bin, .pt, .pth or .ckpt"
WEIGHT = re.compile(r"(^|_)q?weight(_|$)")
"""The last part of a weight's key (`weight`, `qweight`, `weight_packed`, `weight_int8`,
`in_proj_weight`, `weight_ih_l0`): such a matrix of whole numbers is quantised, unless it is a
mask."""


class Weights(Protocol):
    """The interface of stored tensors that are read one by one."""

    files: list[Path]
    """All files that hold the tensors, sorted."""
    place: Path
    """The file that readers look for: the only file, the index, or torch's metadata."""
    tensors: dict[str, TensorInfo]
    """Every stored tensor by its disk key, in file order; tied tensors count once."""

    def read(self, key: str) -> torch.Tensor:
        """Returns the tensor `key` on the CPU: a view of a mapped file where the format allows."""


class SafetensorsFiles:
    """The tensors of one or more mapped .safetensors files.

    Args:
        place: the file that readers look for: the index, or the first file if None.
        weight_map: the file name of each key, as an index states it; None without an index.

    Raises:
        InputError: a file cannot be read, two files hold other numbers for one key, or the index
            disagrees with the files.
    """

    def __init__(
        self,
        files: Sequence[Path],
        *,
        place: Path | None = None,
        weight_map: Mapping[str, str] | None = None,
    ) -> None:
        self.files = sorted(files)
        self.place = place or self.files[0]
        self.tensors = read_headers(self.files)
        if weight_map is not None:
            check_index(self.place, weight_map, {file: file_headers(file) for file in self.files})

    @cached_property
    def _handles(self) -> dict[Path, Any]:
        return {file: open_tensors(file) for file in self.files}

    def read(self, key: str) -> torch.Tensor:
        """Returns the stored tensor `key`, as a view of the mapped file on the CPU."""
        tensor: torch.Tensor = self._handles[self.tensors[key].file].get_tensor(key)
        return tensor

    def record(self) -> dict[str, Any]:
        """Reads what lrc noted in files that it wrote (version, layer table, factory); else empty.

        Raises:
            InputError: this version does not read the noted format version.
        """
        metadata = self._handles[self.files[0]].metadata() or {}
        record = parse_record(metadata, self.files[0])
        if record:
            check_version(record.get("format_version"), str(self.files[0]))
        return record


class RenamedWeights:
    """The tensors of other weights under other names, or without some.

    Args:
        weights: the tensors as the files name them.
        names: the new name of each tensor that gets one; None leaves a tensor out.

    Raises:
        InputError: two tensors get one name, and their numbers differ.
    """

    def __init__(self, weights: Weights, names: Mapping[str, str | None]) -> None:
        self.files, self.place = weights.files, weights.place
        self._weights = weights
        self._stored: dict[str, str] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for key, info in weights.tensors.items():
            name = names.get(key, key)
            if name is None:
                continue
            first = self._stored.setdefault(name, key)
            if first == key:
                self.tensors[name] = info
            elif not has_same_bytes(weights.read(first), weights.read(key)):
                raise differ(first, weights.tensors[first].file, key, info.file)

    def read(self, key: str) -> torch.Tensor:
        """Returns the tensor `key` on the CPU."""
        return self._weights.read(self._stored[key])


def open_weights(path: Path, named: object = None, state_dict: str | None = None) -> Weights:
    """Opens a file or a directory of safetensors, of torch.distributed.checkpoint or of torch.save.

    Other forms of the checkpoint in the directory must hold the same tensors.

    Args:
        path: the file or the directory.
        named: what config.json has for `transformers_weights`.
        state_dict: the keys that lead to the state dict in files of torch.save and of
            torch.distributed.checkpoint; None: the only state dict.

    Raises:
        InputError: there are no tensors that this version reads, two forms differ, or a state dict
            is chosen in safetensors, which hold none.
    """
    if path.is_file():
        weights = _open_file(path, state_dict)
    else:
        weights = _open_directory(path, named, state_dict)
    if state_dict is not None and isinstance(weights, SafetensorsFiles):
        raise InputError(
            f"{weights.place}: is safetensors, which hold no state dicts to choose from, and {KEY}"
            f" is {state_dict!r}",
            f"leave {KEY} out",
        )
    if not weights.tensors:
        raise InputError(f"{path}: the weight files hold no tensor", "save the checkpoint again")
    return weights


def check_dense(weights: Weights) -> None:
    """Raises InputError where another tool than lrc has quantised a weight."""
    for key, info in weights.tensors.items():
        _check_dense(key, info)


def _open_file(file: Path, state_dict: str | None = None) -> Weights:
    if file.suffix.lower() not in (".safetensors", *PICKLED, PROGRAM) and not file.name.endswith(
        ARCHIVED
    ):
        raise explain_suffix(file, READ)
    return _open_form(Form(place=file, files=[file]), state_dict)


def _open_directory(path: Path, named: object, state_dict: str | None) -> Weights:
    forms = forms_of(path, named)
    if not forms:
        _refuse_directory(path)
    weights = _open_form(forms[0], state_dict)
    for form in forms[1:]:
        _check_equal(weights, form, state_dict)
    return weights


def _open_form(form: Form, state_dict: str | None) -> Weights:
    if form.is_safetensors:
        return SafetensorsFiles(form.files, place=form.place, weight_map=form.weight_map)
    if form.files:
        return PickledFiles(
            form.files, place=form.place, weight_map=form.weight_map, state_dict=state_dict
        )
    # This import takes a while, and most checkpoints do not need the module.
    from lrc_cli.checkpoint.distributed import DistributedFiles

    return DistributedFiles(form.place.parent, state_dict)


def _check_equal(weights: Weights, form: Form, state_dict: str | None) -> None:
    """Raises InputError where another form of the checkpoint holds another network.

    The tensors that both have must be equal, byte by byte. A weight that only one form has must be
    equal to another weight: a tied one may be stored once or twice. Buffers may be missing.
    """
    both = f"{weights.place} and {form.place} are two forms of one checkpoint"
    remedy = "move the wrong one out of the directory"
    try:
        other = _open_form(form, state_dict)
    except InputError as error:
        if form.is_optional:
            return
        raise InputError(f"{both}, and one cannot be read: {error.message}", remedy) from error
    first, second = _bare_names(weights), _bare_names(other)
    common = [name for name in first if name in second]
    if not common and form.is_optional:
        return
    if not common:
        raise InputError(f"{both}, and have no tensor in common", remedy)
    rounded = None
    for name in common:
        one, two = weights.read(first[name]), other.read(second[name])
        if has_same_bytes(one, two):
            continue
        if not _is_rounded(one, two):
            raise InputError(f"{both}, and their numbers differ in {name}", remedy)
        kinds = [str(x.dtype).removeprefix("torch.") for x in (one, two)]
        rounded = f"{name} is {kinds[0]} in {weights.place} and {kinds[1]} in {form.place}"
    extra = _find_extra(weights, first, other, second)
    if extra is None and not form.is_partial:
        extra = _find_extra(other, second, weights, first)
    if extra is not None:
        raise InputError(f"{both}, and only one holds {extra}", remedy)
    if rounded is not None:
        raise InputError(
            f"{both}, in two precisions: {rounded}",
            "move the precision that is not to be compressed out of the directory",
        )


def _is_rounded(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether rounding one tensor to the other's type of floating point gives the other."""
    if one.dtype == other.dtype or not (one.is_floating_point() and other.is_floating_point()):
        return False
    return has_same_bytes(one.to(other.dtype), other) or has_same_bytes(other.to(one.dtype), one)


def _bare_names(weights: Weights) -> dict[str, str]:
    """Returns each tensor's key by its name without wrappers."""
    return {bare(key): key for key in weights.tensors}


def _find_extra(
    weights: Weights, names: Mapping[str, str], other: Weights, others: Mapping[str, str]
) -> str | None:
    """Returns a weight's name that only the other form has, and that is no copy; else None."""
    shapes: dict[tuple[int, ...], list[str]] = {}
    for name, key in names.items():
        shapes.setdefault(weights.tensors[key].shape, []).append(name)
    for name, key in others.items():
        info = other.tensors[key]
        if name in names or not _is_weight(key, info) or not info.dtype.is_floating_point:
            continue
        tensor = other.read(key)
        same = shapes.get(info.shape, ())
        if not any(has_same_bytes(weights.read(names[x]), tensor) for x in same):
            return name
    return None


def _refuse_directory(path: Path) -> NoReturn:
    """Raises InputError for a directory without a weight file of a form that is read."""
    programs = sorted(path.glob(f"*{PROGRAM}"))
    if programs:
        _open_file(programs[0])
    raise explain_directory(path, READ)


def _check_dense(key: str, info: TensorInfo) -> None:
    """Raises InputError for numbers of which a quantised weight is made."""
    name = str(info.dtype).removeprefix("torch.")
    if info.dtype not in DTYPES.values():
        raise not_dense(info.file, key, name)
    # Masks and tables of positions are whole numbers too; a dense matrix of weights never is.
    # Packed weights have names such as `weight_packed` (compressed-tensors) or `qweight` (GPTQ).
    if _is_weight(key, info) and not info.dtype.is_floating_point:
        raise InputError(f"{info.file}: {key} is quantised: it holds {name} numbers", DEQUANTISE)


def _is_weight(key: str, info: TensorInfo) -> bool:
    """Returns whether a tensor is a matrix of weights by its name and shape."""
    last = key.rpartition(".")[2]
    return bool(WEIGHT.search(last)) and "mask" not in last and len(info.shape) > 1
