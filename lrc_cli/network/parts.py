"""The parts of a network are found by name, for as long as the network's own code keeps them."""

from torch import nn

from lrc_cli.errors import RunError


def part_of(module: nn.Module, name: str) -> nn.Module:
    """Returns the submodule of this name; "" is the module itself.

    Raises:
        RunError: the module has no such part any more.
    """
    try:
        return module.get_submodule(name)
    except AttributeError as error:
        raise RunError(
            f"the network {type(module).__name__} has no module {name} any more",
            "its forward must keep all of its modules in every pass",
        ) from error
