"""These checks compare the tensors in the files with a module's tensors, and find tied tensors."""

from collections.abc import Mapping

from torch import Tensor, nn

from lrc_cli.checkpoint.foreign import adapter_keys, unmerged
from lrc_cli.checkpoint.headers import TensorInfo, differ, has_same_bytes
from lrc_cli.checkpoint.source import Source
from lrc_cli.errors import InputError
from lrc_cli.network.disk_names import module_names
from lrc_cli.text import some_of

EXTRA_STATE = "_extra_state"
"""The name in a state dict under which torch puts the result of a module's `get_extra_state`."""


def check_keys(expected: Mapping[str, Tensor], headers: Mapping[str, TensorInfo]) -> list[str]:
    """Returns the names of the module's tensors that the files lack.

    Raises:
        InputError: the module has no place for a tensor, or a tensor has another shape.
    """
    unexpected = [key for key in headers if key not in expected]
    adapters = adapter_keys(unexpected)
    if adapters:
        raise unmerged(headers[adapters[0]].file, adapters[0], is_whole=True)
    if unexpected:
        raise InputError(
            f"the module has no place for {some_of(unexpected)}",
            "check that the factory is the right one",
        )
    found = {id(expected[key]) for key in headers}
    missing = [key for key, tensor in expected.items() if id(tensor) not in found]
    extra = [key for key in missing if key.endswith(EXTRA_STATE)]
    if extra:
        raise InputError(
            f"the module's get_extra_state returns {extra[0]}, which no file holds as a tensor",
            "let the factory build a module without get_extra_state",
        )
    for key, header in headers.items():
        if header.shape != tuple(expected[key].shape):
            raise InputError(
                f"{key} has shape {header.shape} in the files and {tuple(expected[key].shape)} "
                "in the module",
                "check that the factory is the right one",
            )
    return missing


def copies(model: nn.Module, source: Source) -> dict[str, str]:
    """Returns the keys of tensors that the model ties to another tensor, with the key that counts.

    transformers ties only tensors that are equal, even if the config ties others.

    Raises:
        InputError: the files hold other numbers for a copy than for the tensor that counts.
    """
    state = model.state_dict(keep_vars=True)
    sources = getattr(model, "all_tied_weights_keys", {}).values()
    found: dict[int, list[tuple[str, str]]] = {}
    for key, name in module_names(model, source.tensors).items():
        found.setdefault(id(state[name]), []).append((key, name))
    counting = (min(same, key=lambda pair: pair[1] not in sources) for same in found.values())
    kept = {id(state[name]): key for key, name in counting}
    copied = {
        key: kept[identity]
        for identity, same in found.items()
        for key, _ in same
        if key != kept[identity]
    }
    for key, other in copied.items():
        if not has_same_bytes(source.read(key), source.read(other)):
            raise differ(other, source.tensors[other].file, key, source.tensors[key].file)
    return copied


def check_copies(expected: Mapping[str, Tensor], source: Source) -> None:
    """Raises InputError where the files hold different numbers for one tensor of the module."""
    first: dict[int, str] = {}
    for key in source.tensors:
        other = first.setdefault(id(expected[key]), key)
        if other != key and not has_same_bytes(source.read(key), source.read(other)):
            raise InputError(
                f"{other} and {key} are one tensor of the module, and differ in the files",
                "untie them in the factory, or remove the wrong one from the files",
            )
