"""A config.json that asks for another size of network than the files hold is refused early.

transformers believes config.json: a billion layers are built one by one. What is built is compared
with what the files hold while it is built, on torch's meta device, where it takes no memory.
"""

import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from lrc_cli.checkpoint.source import Source
from lrc_cli.errors import InputError

COUNTS = ("layer", "block", "depth", "stage")
"""Parts of the keys of config.json that count layers."""
MOST_LAYERS = 10_000
"""So many layers may share the tensors of one."""
LABELS, MOST_LABELS = "num_labels", 1_000_000
"""The key of which transformers makes names of classes, and the most that it may be."""
WIDTHS = frozenset(
    {"hidden_size", "d_model", "n_embd", "intermediate_size", "ffn_dim", "d_ff", "n_inner",
     "encoder_ffn_dim", "decoder_ffn_dim", "moe_intermediate_size", "num_attention_heads",
     "num_heads", "n_head", "n_heads", "encoder_attention_heads", "decoder_attention_heads",
     "num_key_value_heads", "num_kv_heads", "head_dim", "d_kv", "vocab_size", "embedding_size",
     "max_position_embeddings", "n_positions", "type_vocab_size", "num_experts",
     "num_local_experts", "n_routed_experts", "num_channels", "image_size", "patch_size"}
)  # fmt: skip
"""Keys that say a size of tensors or a number of heads, which is never below zero."""
NEVER_ZERO = frozenset({"hidden_size", "d_model", "n_embd", "num_attention_heads", "n_head"})
"""Keys of which a network has one at least."""
SPARE_TENSORS, SPARE_TIMES, SPARE_NUMBERS = 20_000, 4, 200_000_000
"""The network may have so many more tensors than the files, so many times as many, and so many more
numbers: parts may share tensors, and buffers are not stored."""
REMEDY = "restore the config.json that was saved with the weights"


def check_counts(source: Source) -> None:
    """Raises InputError where config.json counts more layers than the files have tensors.

    Some classes of configs make lists of so many entries before any layer is built.
    """
    tensors = len(source.weights.tensors)
    for key, value in _numbers(source.config or {}):
        name = key.rpartition(".")[2]
        if name == LABELS:
            most, held = MOST_LABELS, f"at most {MOST_LABELS:,} are read"
        elif any(part in name for part in COUNTS):
            most, held = max(MOST_LAYERS, tensors), f"the files hold {tensors:,} tensors"
        else:
            continue
        # Some keys have -1 for "none" or "all"; a number of layers is no such key.
        if value > most or (value < 0 and name.startswith(("num_", "n_"))):
            raise InputError(f"{source.path}/config.json: {key} is {value}, and {held}", REMEDY)


def check_widths(source: Source) -> None:
    """Raises InputError where config.json has a width or a number of heads that no network has.

    Model classes fail on such numbers without the key: by a negative dimension, by a division.
    """
    for key, value in _numbers(source.config or {}):
        name = key.rpartition(".")[2]
        least = 1 if name in NEVER_ZERO else 0
        if name in WIDTHS and value < least:
            cause = f"{source.path}/config.json: {key} is {value}, and must be at least {least}"
            raise InputError(cause, REMEDY)


def check_lists(source: Source, model: nn.Module, strays: Collection[str]) -> None:
    """Raises InputError where the files hold more layers of a list than the network has.

    Args:
        source: the checkpoint.
        model: the network that config.json asks for.
        strays: the names of the tensors for which the network has no place, and that its class does
            not pass over.
    """
    lists = {name: x for name, x in model.named_modules() if isinstance(x, nn.ModuleList)}
    for key in sorted(strays):
        parts = key.split(".")
        for i, part in enumerate(parts):
            found = lists.get(".".join(parts[:i]))
            if part.isdecimal() and found is not None and int(part) >= len(found):
                length = len(found)
                counts = (k for k, n in _numbers(source.config or {}) if n == length)
                name = next(
                    (k for k in counts if any(x in k for x in COUNTS)), "the network's size"
                )
                raise InputError(
                    f"{source.path}/config.json: {name} gives {length} of"
                    f" {'.'.join(parts[:i])}, and the files hold {key}",
                    f"{REMEDY}, or remove the layers that are not used from the files",
                )


@contextmanager
def bounded_building(source: Source) -> Iterator[None]:
    """A context in which a module that is built by this thread may not outgrow the files by far.

    Raises:
        InputError: the module has many more tensors than the files, or a tensor with many more
            numbers; config.json is named, and its key where a key says the size.
    """
    infos = source.weights.tensors.values()
    most_tensors = SPARE_TIMES * len(infos) + SPARE_TENSORS
    most_numbers = SPARE_TIMES * sum(info.num_elements for info in infos) + SPARE_NUMBERS
    thread, registered = threading.get_ident(), 0

    def look(module: nn.Module, name: str, tensor: Tensor | None) -> None:
        nonlocal registered
        if threading.get_ident() != thread or not isinstance(tensor, Tensor):
            return
        registered += 1
        if registered > most_tensors:
            raise InputError(
                f"{source.path}/config.json asks for more than {most_tensors:,} tensors, and the"
                f" files hold {len(infos):,}",
                REMEDY,
            )
        if tensor.numel() > most_numbers:
            shape = tuple(tensor.shape)
            raise InputError(
                f"{source.path}/config.json: {_key_of(source.config or {}, shape)} a tensor {name}"
                f" of shape {shape}, and the files hold {sum(i.num_elements for i in infos):,}"
                " numbers in all",
                REMEDY,
            )

    hooks = [
        register_module_parameter_registration_hook(look),
        register_module_buffer_registration_hook(look),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _key_of(config: Mapping[str, Any], shape: tuple[int, ...]) -> str:
    """Returns the key that says the largest size of a shape, with the verb; "it asks for" if none
    does."""
    key = next((key for key, value in _numbers(config) if value == max(shape)), None)
    return "it asks for" if key is None else f"{key} asks for"


def _numbers(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Yields the whole numbers of a config by their keys, with dots for the configs in it."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from ((f"{key}.{name}", number) for name, number in _numbers(value))
        elif isinstance(value, int) and not isinstance(value, bool):
            yield key, value
