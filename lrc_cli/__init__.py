"""Low-rank compression of neural-network checkpoints, fitted to real activations."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "compress", "load"]


def __getattr__(name: str) -> Any:
    # Lazy, so that `lrc --help` does not import torch.
    if name == "load":
        from lrc_cli.network.loading import load

        return load
    if name == "compress":
        from lrc_cli.job.library import compress

        return compress
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
