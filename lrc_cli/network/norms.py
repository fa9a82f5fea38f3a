"""A network's norms are found here: modules that scale what passes through, channel by channel."""

from collections.abc import Iterable

from torch import nn

from lrc_cli.network.disk_names import stored_names


def norms_by_key(model: nn.Module, keys: Iterable[str]) -> dict[str, str]:
    """Returns {disk key: name of the parameter} of every tensor of the model's norms.

    A norm is a module whose class is called so and whose parameters are vectors, such as
    `LayerNorm`, `BatchNorm2d` or `LlamaRMSNorm`. Parameters that the files lack are left out.

    Args:
        model: the module as it was built, before `make_network`.
        keys: the names of the checkpoint's tensors.
    """
    stored = stored_names(model, keys)
    return {
        stored[id(parameter)]: f"{place}.{name}" if place else name
        for place, part in model.named_modules()
        if _is_norm(part)
        for name, parameter in part.named_parameters(recurse=False)
        if id(parameter) in stored
    }


def _is_norm(part: nn.Module) -> bool:
    own = list(part.parameters())
    is_called_so = "norm" in type(part).__name__.lower()
    return is_called_so and all(x.ndim == 1 and x.is_floating_point() for x in own)
