"""Some checkpoints lack tensors that their network has: an unused pooler, a mask token, a head.

Nothing is ever filled with random numbers. What the files lack is filled with NaN, so that whatever
depends on it shows. A command that runs the network refuses if the outputs depend on it.
"""

import inspect
import sys
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lrc_cli.checkpoint.source import Source
from lrc_cli.errors import InputError
from lrc_cli.network.disk_names import module_names
from lrc_cli.text import some_of

POOLER = "add_pooling_layer"
"""The argument with which transformers builds a body without the layer that pools its outputs."""
UNUSED = "unused"
"""The key under which lrc notes, in files that it writes, the tensors that the source lacked."""
MOST = 0.5
"""The share of a module's tensors from which on another network's checkpoint is suspected."""


def check_lacking(model: nn.Module, source: Source, lacking: Collection[str]) -> None:
    """Raises InputError where it is plain without a run that the files are not the module's.

    Args:
        model: the module.
        source: the checkpoint.
        lacking: the names of the module's parameters and buffers that no file holds.
    """
    state = model.state_dict(keep_vars=True)
    known = set(source.record.get(UNUSED, ()))
    if not lacking or known.issuperset(lacking):
        return
    whole = [name for name in lacking if name in state and not state[name].is_floating_point()]
    is_other = len(lacking) > MOST * len(state)
    if whole or is_other or source.record or fitting_class(model, source):
        raise lacks(model, source, lacking)


def lacks(
    model: nn.Module, source: Source, lacking: Collection[str], *, why: str = ""
) -> InputError:
    """Returns the refusal of a checkpoint that lacks tensors, with the way out.

    Args:
        model: the module.
        source: the checkpoint.
        lacking: the names of the module's parameters and buffers that no file holds.
        why: what else is known.
    """
    prefixes = _prefixes(source, lacking)
    if prefixes:
        names = " or ".join(repr(prefix) for prefix in prefixes)
        return InputError(
            f"{source.path}: the files have tensors of {type(model).__name__} under names that"
            f" begin with {names}, such as {prefixes[0]}{next(iter(lacking))}{why}",
            f"save the network's own state dict, or rename the tensors that begin with {names}",
        )
    if not hasattr(model, "base_model_prefix"):
        cause = f"{source.path}: the files lack {some_of(lacking)} of {type(model).__name__}{why}"
        return InputError(
            cause,
            "check that every weight file is there, or let the factory build the module without it",
        )
    name = fitting_class(model, source)
    remedy = (
        f'write "architectures": ["{name}"] into config.json: the files hold all of this class'
        if name
        else "check that every weight file is there and that config.json names the right class, or"
        " set model.factory to a function that builds the network without it"
    )
    heads = ("lm_head.weight", "embed_out.weight", "decoder.weight")
    if any(key.endswith(heads) for key in lacking):
        remedy += '; or "tie_word_embeddings": true, if the head is the embedding\'s table'
    cause = f"{source.path} lacks {some_of(lacking)} of {type(model).__name__}{why}"
    return InputError(cause, remedy)


def _prefixes(source: Source, lacking: Collection[str]) -> list[str]:
    """Returns the beginnings of names under which the files have most of what is lacking."""
    wanted = next(iter(lacking))
    ends = (key.removesuffix(wanted) for key in source.tensors if key.endswith(f".{wanted}"))
    return [
        begin
        for begin in dict.fromkeys(ends)
        if 2 * sum(begin + name in source.tensors for name in lacking) > len(lacking)
    ]


def fill_with_nan(model: nn.Module, lacking: Collection[str]) -> None:
    """Fills what the files lack with NaN, so that no number depends on it unseen."""
    state = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for name in lacking:
            state[name].fill_(torch.nan)


def unfilled(network: nn.Module, lacking: Collection[str]) -> Iterator[Tensor]:
    """Yields the tensors of these names, also where they are read through a parametrization."""
    for name in lacking:
        parent, _, leaf = name.rpartition(".")
        part: Any = network.get_submodule(parent)
        parametrized = getattr(part, "parametrizations", {})
        yield parametrized[leaf].original if leaf in parametrized else getattr(part, leaf)


def takes_no_pooler(model: nn.Module) -> bool:
    """Returns whether the module's class can be built without the layer that pools its outputs."""
    return POOLER in inspect.signature(type(model).__init__).parameters


def fitting_class(model: Any, source: Source) -> str | None:
    """Returns the transformers class of the model's family whose tensors the files hold, or None.

    Of several classes, the class that uses most of the files' tensors is taken.
    """
    import transformers

    module = sys.modules[type(model).__module__]
    used: dict[str, int] = {}
    for name in sorted(vars(module)):
        kind = getattr(transformers, name, None)
        if not isinstance(kind, type) or kind is not vars(module)[name] or kind is type(model):
            continue
        if issubclass(kind, transformers.PreTrainedModel):
            used[name] = _tensors_used(kind, source)
    best = max(used, key=lambda name: used[name], default="")
    return best if used.get(best) else None


def _tensors_used(kind: Any, source: Source) -> int:
    """Returns how many of the files' tensors a class uses; 0 where the files lack one of its."""
    options: list[Mapping[str, bool]] = [{}]
    if POOLER in inspect.signature(kind.__init__).parameters:
        options.append({POOLER: False})
    try:  # a class may want other keys in config.json, and may then fail in any way
        config = kind.config_class.from_pretrained(source.path, local_files_only=True)
        with torch.device("meta"):
            models = [kind(config, **option) for option in options]
    except Exception:
        return 0
    return max(_num_used(model, source) for model in models)


def _num_used(model: Any, source: Source) -> int:
    names = set(module_names(model, source.tensors).values())
    ties = getattr(model, "all_tied_weights_keys", {})
    for key, other in ties.items():
        if names & {key, other}:
            names |= {key, other}
    return len(names) if names.issuperset(model.state_dict()) else 0
