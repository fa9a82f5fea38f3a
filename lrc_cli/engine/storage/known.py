"""Every storage is found here by its name."""

from lrc_cli.engine.storage.choose import AUTO
from lrc_cli.engine.storage.dense import DENSE_STORAGE
from lrc_cli.engine.storage.factors import FACTORS
from lrc_cli.engine.storage.interpolative import INTERPOLATIVE
from lrc_cli.engine.storage.storage import Storage

STORAGES: dict[str, Storage] = {
    storage.name: storage for storage in (AUTO, DENSE_STORAGE, FACTORS, INTERPOLATIVE)
}
"""The values of `compression.storage` (config/compression.py), and dense."""
