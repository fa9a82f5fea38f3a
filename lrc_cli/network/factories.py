"""A factory is a user's function that builds a checkpoint's module; factories are imported here."""

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from lrc_cli.errors import InputError, LrcError
from lrc_cli.runtime.strangers import contained
from lrc_cli.text import named

Factory = Callable[[], nn.Module]


def resolve_factory(factory: Factory | str) -> Factory:
    """Returns a function that calls the factory and checks the result.

    A name "package.module:function" is imported at once. The working directory is searched last, so
    a script beside the config is found.

    Raises:
        InputError: the factory cannot be imported. The returned function raises InputError where
            the factory fails or returns no `nn.Module`.
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
            with contained():
                model = function()
        except LrcError:
            raise
        except Exception as error:  # the user's code may raise anything
            raise InputError(
                f"factory {name} failed: {named(error)}",
                "it is called without arguments"
                if isinstance(error, TypeError)
                else "mend it: it must build the module by itself",
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
        with contained():
            return getattr(importlib.import_module(module_name), attribute)
    except LrcError:
        raise
    except Exception as error:  # the user's module may raise anything
        raise InputError(
            f"factory {name} cannot be imported: {named(error)}",
            "check the name, and that its package is installed or in the working directory"
            if isinstance(error, ImportError | AttributeError)
            else "mend its module",
        ) from error


def source_file(factory: str) -> Path | None:
    """Returns the file that defines "package.module:function", or None if the code is not Python.

    Raises:
        InputError: the factory cannot be imported.
    """
    function = inspect.unwrap(_import(factory))
    module = sys.modules[factory.partition(":")[0]]
    try:
        file = inspect.getsourcefile(inspect.getmodule(function) or module)
    except TypeError:  # a module that is built in
        return None
    return Path(file) if file else None


def beside(path: Path) -> str | None:
    """Returns what to do instead of giving a factory, from what lies beside the weights."""
    folder = path.parent if path.is_file() else path
    if folder != path and (folder / "config.json").is_file():
        return f"give its directory, {folder}, which has a config.json"
    if (folder / "params.json").is_file():
        return "convert it to transformers' format first, or set model.factory (--factory)"
    return None


def ask_for_factory(path: Path, recorded: str | None = None) -> InputError:
    """Returns the error of a command that needs --factory for the checkpoint `path`.

    Args:
        path: the checkpoint.
        recorded: the factory that the checkpoint was compressed with, if known.
    """
    name = recorded or "PACKAGE.MODULE:FUNCTION"
    return InputError(
        f"{path}: not a transformers directory (it has no config.json)",
        beside(path) or f"give --factory {name}, the function that builds the module",
    )
