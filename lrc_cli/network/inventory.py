"""This module lists what a checkpoint holds and what would be compressed, for `lrc inspect`."""

from pathlib import Path
from typing import Any

from lrc_cli.checkpoint.source import open_source
from lrc_cli.config import Compression
from lrc_cli.network.candidates.find import find_layers
from lrc_cli.network.factories import ask_for_factory
from lrc_cli.network.opening import open_module


def inspect_checkpoint(
    path: Path,
    *,
    factory: str | None = None,
    trust_remote_code: bool = False,
    state_dict: str | None = None,
) -> dict[str, Any]:
    """Lists the layers that the default config would compress, and all other tensors with a reason.

    Args:
        path: a dense checkpoint.
        factory: the function that builds the module of a checkpoint that is not transformers'.
        trust_remote_code: whether code that comes with the checkpoint may run.
        state_dict: the state dict in a file with several, see `open_source`.

    Raises:
        InputError: the checkpoint cannot be opened.
    """
    source = open_source(path, state_dict=state_dict)
    if factory is None and source.config is None:
        raise ask_for_factory(path)
    module, source = open_module(source, factory=factory, trust_remote_code=trust_remote_code)
    layers, skipped = find_layers(module, source, Compression(size=0.8))
    total = source.num_bytes
    return {
        "checkpoint": str(path),
        "architecture": type(module).__name__,
        "files": [file.name for file in source.files],
        "notes": source.notes,
        "bytes": total,
        "compressible_bytes": sum(layer.num_bytes for layer in layers),
        "layers": [
            {
                "name": layer.name,
                "kind": layer.kind,
                "shape": list(layer.shape),
                "dtype": str(layer.dtype).removeprefix("torch."),
                "bytes": layer.num_bytes,
            }
            for layer in layers
        ],
        "skipped": [
            {"name": s.name, "reason": s.reason, "bytes": s.num_bytes, "share": s.num_bytes / total}
            for s in skipped
        ],
    }
