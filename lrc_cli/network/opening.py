"""This module opens a checkpoint as a module that runs, with its layers as hooks see them."""

from typing import Any, NamedTuple

from torch import nn

from lrc_cli.checkpoint.source import Source
from lrc_cli.errors import InputError
from lrc_cli.network.embeddings import merge_tables
from lrc_cli.network.experts import unfuse
from lrc_cli.network.factories import beside
from lrc_cli.network.fused_experts import take_apart
from lrc_cli.network.loading import load_unwrapped
from lrc_cli.network.recurrent import unroll
from lrc_cli.network.tensor_checks import copies


def token_embedding(module: nn.Module) -> Any:
    """Returns the embedding of a transformers model's tokens, or None where there is none."""
    getter = getattr(module, "get_input_embeddings", None)
    try:
        return None if getter is None else getter()
    except NotImplementedError:  # a model with several inputs may have several tables
        return None


def vocabulary_of(module: nn.Module) -> int:
    """Returns the number of tokens that a transformers model knows, or 0 where it tells none."""
    return int(getattr(token_embedding(module), "num_embeddings", 0))


class Opened(NamedTuple):
    """An opened checkpoint: a module, and the source as the module sees it."""

    module: nn.Module
    source: Source
    """A view of the checkpoint for this module: tied tensors once, fused experts apart."""


def open_module(source: Source, *, factory: str | None, trust_remote_code: bool = False) -> Opened:
    """Builds the checkpoint's module on the CPU; its parameters are views of the mapped files.

    Fused experts become lists of experts; where the checkpoint holds their matrices one by one,
    transformers has copied the matrices. The matrices of LSTM and GRU become layers. Embeddings
    that do the same with one table become one module. The source stays as it is.

    Args:
        source: the checkpoint, or a view of it from another opening.
        factory: the name of the function that builds the module; None: transformers builds it.
        trust_remote_code: whether code that comes with the checkpoint may run.

    Raises:
        InputError: the checkpoint is not the module's, or its code cannot be run.
    """
    if source.config is None and factory is None:
        raise InputError(
            f"{source.path}: not a transformers directory (it has no config.json)",
            beside(source.path) or "set model.factory to the function that builds the module",
        )
    source = source.together()  # as the files, and a network that is not taken apart yet, have them
    module, source = load_unwrapped(source, factory=factory, trust_remote_code=trust_remote_code)
    seen = source.without_copies(copies(module, source))
    unfuse(module)
    if factory is None:
        seen = seen.apart(take_apart(module, source.weights.tensors))
    unroll(module)
    merge_tables(module)
    return Opened(module, seen)
