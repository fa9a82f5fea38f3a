"""A command makes these settings before the libraries that it needs are used."""

import os


def bound_caches() -> None:
    """Keeps oneDNN's memory from growing with the depth; must run before torch is imported.

    oneDNN keeps compiled products of the last 1024 shapes, and every low-rank layer has a shape of
    its own. A block, which is what runs again and again, has far fewer shapes. The same limit holds
    for two caches: oneDNN's own and the cache of torch's binding.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "32")


def calm_transformers() -> None:
    """Silences transformers' progress bars and advice: our own output says what matters."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
