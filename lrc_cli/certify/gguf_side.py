"""A GGUF file becomes a copy with the original's names and order of rows, by the original's config.

The package gguf knows what its formats call a tensor. In which order a converter has put rows or
columns is tried out: the order that is nearer to the original counts, for all tensors of a kind
together. What is put back is said.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrc_cli.certify.sentences import kind_of
from lrc_cli.certify.sides import Side
from lrc_cli.checkpoint.gguf import GgufFile
from lrc_cli.checkpoint.headers import TensorInfo
from lrc_cli.errors import InputError
from lrc_cli.network.opening import open_module
from lrc_cli.text import count, some_of

Turn = Callable[[Tensor], Tensor]
TRIED = 3
"""The number of tensors of a kind on which an order is tried out."""
BETTER = 0.5
"""The share of the distance as stored that another order must reach to be taken."""
SUFFIXES = (".weight", ".bias")


class TurnedTensors:
    """A GGUF file's tensors under the original's names, in the original's order.

    Args:
        file: the file.
        names: the file's name of each tensor, by the original's name.
        turns: how tensors of a kind are put back, by kind.
    """

    def __init__(self, file: GgufFile, names: Mapping[str, str], turns: Mapping[str, Turn]) -> None:
        self.files, self.place = file.files, file.place
        self._file, self._names, self._turns = file, names, turns
        left = [name for name in file.tensors if name not in set(names.values())]
        self.tensors: dict[str, TensorInfo] = {}
        for key, name in (*names.items(), *((name, name) for name in left)):
            shape = torch.empty(file.tensors[name].shape, device="meta")
            turned = turns.get(kind_of(key), _as_stored)(shape)
            self.tensors[key] = replace(file.tensors[name], shape=tuple(turned.shape))

    def read(self, key: str) -> Tensor:
        """Returns the tensor in float32."""
        tensor = self._file.read(self._names.get(key, key))
        return self._turns.get(kind_of(key), _as_stored)(tensor)


def _as_stored(tensor: Tensor) -> Tensor:
    return tensor


def open_gguf(path: Path, original: Side) -> Side:
    """Opens a GGUF file as a copy of the original.

    Raises:
        InputError: the file cannot be read, or is of another architecture than the original.
    """
    file = GgufFile(path)
    source = original.source
    if source.config is None:
        raise InputError(
            f"{path}: a GGUF file is compared with a transformers checkpoint, and"
            f" {source.path} has no config.json",
            "give the checkpoint that the file was converted from",
        )
    names = _names(file, original)
    turns = _turns(file, names, original)
    weights = TurnedTensors(file, names, {kind: turn for kind, (_, turn) in turns.items()})
    view = replace(source, weights=weights, copies={}, fused={}, unwrapped={}, lacking=())
    module, view = open_module(view, factory=None)
    kinds = ", ".join(f"{name}: {number}" for name, number in sorted(file.kinds.items()))
    notes = [
        f"{words} of {kind} were put back into the original's order."
        for kind, (words, _) in turns.items()
    ]
    return Side(
        module=module,
        source=view,
        tokenizer=None,
        form=f"GGUF ({kinds})",
        path=path,
        files=(path,),
        num_bytes=file.num_bytes,
        notes=(*notes, *_tokens(file, original)),
    )


def _names(file: GgufFile, original: Side) -> dict[str, str]:
    """Returns the file's name of each of the original's tensors that the file has."""
    import gguf

    name = file.metadata.get("general.architecture")
    known = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}
    if name not in known:
        raise InputError(
            f"{file.place}: its architecture is {str(name)[:80]!r}, which gguf does not know",
            "upgrade gguf",
        )
    blocks = file.metadata.get(f"{name}.block_count")
    if not isinstance(blocks, int) or not 0 < blocks < 10_000:
        raise InputError(f"{file.place}: its block_count is {blocks!r}", "convert it again")
    names = gguf.get_tensor_name_map(known[name], blocks)
    keys = original.source.tensors
    found = {key: names.get_name(key, try_suffixes=SUFFIXES) for key in keys}
    here = {key: value for key, value in found.items() if value in file.tensors}
    if len(here) < len(keys) / 2:
        raise InputError(
            f"{file.place}: it is of architecture {name} and has {count(len(here))} of the"
            f" {count(len(keys))} tensors of {original.source.path}",
            "compare it with the checkpoint that it was converted from",
        )
    return here


def _turns(file: GgufFile, names: Mapping[str, str], original: Side) -> dict[str, tuple[str, Turn]]:
    """Returns for each kind that a converter has turned its words, and how to put it back."""
    groups: dict[str, list[str]] = {}
    for key in names:
        groups.setdefault(kind_of(key), []).append(key)
    config: Any = original.source.config or {}
    found: dict[str, tuple[str, Turn]] = {}
    for kind, keys in groups.items():
        tried = keys[:TRIED]
        pairs = [(original.source.read(key).float(), file.read(names[key])) for key in tried]
        base = _distance(pairs, _as_stored)
        best = BETTER * base
        for words, turn in _candidates(config):
            distance = _distance(pairs, turn)
            if distance < best:
                best, found[kind] = distance, (words, turn)
    return found


def _candidates(config: Mapping[str, Any]) -> list[tuple[str, Turn]]:
    """Returns the orders that converters are known to use, with words."""
    found: list[tuple[str, Turn]] = [
        ("The transposed matrices", lambda tensor: tensor.T if tensor.ndim == 2 else tensor),
        ("The numbers, one too large,", lambda tensor: tensor - 1),
    ]
    heads = {config.get("num_attention_heads"), config.get("num_key_value_heads")}
    for number in heads:
        if isinstance(number, int) and 0 < number < 100_000:
            found.append(("Pairs of rows", _paired(number)))
    return found


def _paired(heads: int) -> Turn:
    """Returns how rows (head, pair, half) become rows (head, half, pair) again."""

    def turn(tensor: Tensor) -> Tensor:
        if len(tensor) % (2 * heads):
            return tensor
        parts = tensor.reshape(heads, len(tensor) // heads // 2, 2, *tensor.shape[1:])
        return parts.swapaxes(1, 2).reshape(tensor.shape)

    return turn


def _distance(pairs: list[tuple[Tensor, Tensor]], turn: Turn) -> float:
    """Returns the sum of squared distances; infinite where shapes do not fit."""
    total = 0.0
    for one, other in pairs:
        turned = turn(other)
        if turned.shape != one.shape:
            return float("inf")
        total += float((turned - one).double().square().sum())
    return total


def _tokens(file: GgufFile, original: Side) -> list[str]:
    """Returns how the file's list of tokens differs from the original's, in sentences."""
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or original.tokenizer is None:
        return []
    known = {number: token for token, number in original.tokenizer.get_vocab().items()}
    other = [x for i, x in enumerate(tokens) if i in known and known[i] != x]
    if not other:
        return []
    return [
        f"{count(len(other))} of the file's {count(len(tokens))} tokens are others than the"
        f" original's, such as {some_of(map(str, other))}."
    ]
