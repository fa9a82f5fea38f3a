"""Files that transformers and tokenizers read by themselves are looked at first, within bounds.

They believe what they read: a pipe holds them, and deep JSON ends the process.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from lrc_cli.checkpoint.foreign import explain_file
from lrc_cli.errors import InputError
from lrc_cli.reading import JSON_BYTES, check_regular, check_size, read_json, read_utf8

MODEL_FILES = ("generation_config.json", "adapter_config.json")
"""The files that are read with a network, beside config.json and the weights."""
TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja")
PROCESSOR_FILES = (
    *("preprocessor_config.json", "processor_config.json", "image_processor_config.json"),
    *("video_preprocessor_config.json", "feature_extractor_config.json"),
)
"""The files that are read with an image processor or a feature extractor."""
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "*.model", "*.spm", "*.tiktoken", "*.codes"),
    *TEMPLATES,
)
"""The files that are read with a tokenizer."""
MOST_IN_TEMPLATE = 1_000_000
"""The most bytes of a chat template."""


def check_read_by_others(directory: Path, patterns: Iterable[str]) -> None:
    """Checks the files that are there.

    Args:
        patterns: names, and globs of names.

    Raises:
        InputError: a file is no regular file, is too large, or is .json and holds no JSON object
            that lrc would read.
    """
    for pattern in patterns:
        for file in _found(directory, pattern):
            check_regular(file)
            if file.suffix == ".json":
                _check_json(file)
            elif file.suffix == ".jinja":
                read_utf8(file, MOST_IN_TEMPLATE)
            else:
                check_size(file, JSON_BYTES)


def _found(directory: Path, pattern: str) -> list[Path]:
    """Returns what a pattern stands for, with links that lead nowhere."""
    if "*" in pattern:
        return sorted(directory.glob(pattern))
    return [directory / pattern] if os.path.lexists(directory / pattern) else []


def _check_json(file: Path) -> None:
    check_size(file, JSON_BYTES)
    try:
        read_json(file)
    except InputError as error:
        raise (explain_file(file) or error) from error
