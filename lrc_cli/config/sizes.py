"""One config becomes several jobs here, which differ in their size and their output."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lrc_cli.config import Config, load_config


def load_configs(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    output: str | None = None,
    sizes: Sequence[float] = (),
) -> list[Config]:
    """The config of a file, or one for each of `sizes`, whose outputs are called DIR-SIZE.

    Args:
        overrides: assignments "key.sub=value"; see `load_config`.
        output: the directory to write in place of `output.path`; None: `output.path`.
        sizes: values of `compression.size`; empty: the config's own target.

    Raises:
        InputError: see `load_config`.
    """
    if not sizes:
        return [_loaded(path, overrides, output)]
    return [_of_size(path, overrides, output, f"{size:.12g}") for size in sizes]


def _of_size(path: Path, overrides: Sequence[str], output: str | None, size: str) -> Config:
    config = _loaded(path, [*overrides, f"compression.size={size}"], output)
    directory = f"{Path(config.output.path)}-{size}"
    return replace(config, output=replace(config.output, path=directory))


def _loaded(path: Path, overrides: Sequence[str], output: str | None) -> Config:
    config = load_config(path, overrides)
    if output is None:
        return config
    return replace(config, output=replace(config.output, path=output))
