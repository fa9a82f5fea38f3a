"""A checkpoint as a network that runs, and its layers as hooks see them."""

from typing import Any, NamedTuple

from torch import nn

from lrc_cli.checkpoint.source import Source
from lrc_cli.errors import InputError
from lrc_cli.network.embeddings import merge_tables
from lrc_cli.network.experts import unfuse
from lrc_cli.network.fused_experts import take_apart
from lrc_cli.network.loading import load_source
from lrc_cli.network.recurrent import unroll
from lrc_cli.network.tensor_checks import copies


def token_embedding(module: nn.Module) -> Any:
    """What maps a transformers model's token ids to vectors; None where nothing does, or may."""
    getter = getattr(module, "get_input_embeddings", None)
    try:
        return None if getter is None else getter()
    except NotImplementedError:  # a model of several inputs may have no one table
        return None


def vocabulary_of(module: nn.Module) -> int:
    """Number of token ids a transformers model takes; 0 where it takes none or does not tell."""
    return int(getattr(token_embedding(module), "num_embeddings", 0))


class Opened(NamedTuple):
    """A checkpoint that was opened as a module."""

    module: nn.Module
    source: Source
    """The checkpoint as this module sees it: tied tensors once, fused experts apart."""


def open_module(source: Source, *, factory: str | None, trust_remote_code: bool = False) -> Opened:
    """Build the checkpoint's module on the CPU, its parameters views of the mapped files.

    Fused experts become lists of experts; where the checkpoint holds their matrices one by one,
    transformers has copied them. The matrices of LSTM and GRU become layers, and embeddings with
    one table, which do the same with it, one module. The source stays as it is.

    Raises:
        InputError: the checkpoint is not the module's, or its code cannot be run.
    """
    if source.config is None and factory is None:
        raise InputError(
            f"{source.path}: not a transformers directory (it has no config.json)",
            "set model.factory to the function that builds the module",
        )
    module = load_source(source, factory=factory, trust_remote_code=trust_remote_code)
    seen = source.without_copies(copies(module, source))
    unfuse(module)
    if factory is None:
        seen = seen.apart(take_apart(module, source.weights.tensors))
    unroll(module)
    merge_tables(module)
    return Opened(module, seen)
