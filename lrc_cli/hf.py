"""`import lrc_cli.hf` lets transformers load factorised checkpoints; the address does not move."""

from lrc_cli.network.transformers_plugin import LrcConfig, LrcQuantizer

__all__ = ["LrcConfig", "LrcQuantizer"]
