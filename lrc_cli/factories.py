"""Functions that build the module of a checkpoint that is not transformers'."""

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from lrc_cli.errors import InputError

Factory = Callable[[], nn.Module]


def resolve_factory(factory: Factory | str) -> Factory:
    """A function that builds a module, checked; "package.module:function" is imported.

    The working directory is searched last, so that a script beside the config is found.

    Raises:
        InputError: if it cannot be imported or returns no `nn.Module`.
    """
    name, function = str(factory), factory
    if isinstance(function, str):
        function = _import(function)
    if not callable(function):
        raise InputError(
            f"factory {name} is not callable", "name a function that builds the module"
        )

    def build() -> nn.Module:
        try:
            model = function()
        except TypeError as error:
            raise InputError(
                f"factory {name} failed: {one_line(error)}", "it is called without arguments"
            ) from error
        if not isinstance(model, nn.Module):
            raise InputError(
                f"factory {name} returned {type(model).__name__}", "return a torch.nn.Module"
            )
        return model

    return build


def _import(name: str) -> Any:
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise InputError(f"factory {name} has no colon", "write it as package.module:function")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"factory {name} cannot be imported: {one_line(error)}",
            "check the name, and that its package is installed or in the working directory",
        ) from error


def one_line(error: BaseException) -> str:
    """An error's text on one line."""
    return " ".join(str(error).split())[:500]
