"""Checkpoints on disk: `source` opens one, `writer` writes one, `manifest` pins one."""
