"""A copy is opened by what its path is: dense, lrc's, a GGUF file, or quantised by others."""

from pathlib import Path

from lrc_cli.certify.gguf_side import open_gguf
from lrc_cli.certify.quantised_side import method_of, open_quantised
from lrc_cli.certify.sides import Side, open_side
from lrc_cli.checkpoint.gguf import SUFFIX
from lrc_cli.config.certify import Checkpoint


def open_copy(checkpoint: Checkpoint, original: Side) -> Side:
    """Opens the copy.

    Args:
        checkpoint: the section `other` of the config.
        original: the original, which a GGUF file takes its names and its config from.

    Raises:
        InputError: the copy cannot be opened, or is none of this original.
    """
    path = Path(checkpoint.path)
    if path.suffix == SUFFIX and path.is_file():
        return open_gguf(path, original)
    method = method_of(path) if checkpoint.factory is None and path.is_dir() else None
    if method is not None:
        return open_quantised(path, method, original)
    return open_side(checkpoint, factorised=True)
