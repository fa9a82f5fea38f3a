"""The tokenizer and the image and audio processors of a checkpoint are opened here."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lrc_cli.checkpoint.foreign import explain_file
from lrc_cli.checkpoint.read_by_others import (
    PROCESSOR_FILES,
    TOKENIZER_FILES,
    check_read_by_others,
)
from lrc_cli.checkpoint.source import Source
from lrc_cli.data.decoder import Decoder, find_decoder, takes
from lrc_cli.errors import InputError, LrcError
from lrc_cli.runtime.strangers import contained
from lrc_cli.text import named

SIGNS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "tokenizer.model",
    "vocab.json",
)
"""Files of which one at least is there if there is a tokenizer."""


PACKAGES = re.compile(
    r"\b(sentencepiece|tiktoken|protobuf|sacremoses|fugashi|ipadic|unidic|rjieba|pythainlp)\b", re.I
)
"""The packages without which transformers cannot open some tokenizers."""


@dataclass(frozen=True, kw_only=True)
class Processors:
    """The processors that make texts, images and recordings inputs of one network."""

    tokenizer: Any = None
    """The checkpoint's own tokenizer, or None."""
    decoder: Decoder | None = None
    """The decoder, where the network is an encoder-decoder."""
    takes: frozenset[str] = frozenset()
    """The names of the network's inputs."""
    path: Path | None = None
    """The transformers directory with the processors of images and audio, or None."""
    trust_remote_code: bool = False

    def images(self) -> Any:
        """The checkpoint's image processor.

        Raises:
            InputError: there is no image processor, or a package is missing.
        """
        from transformers import AutoImageProcessor

        return self._open("images", AutoImageProcessor.from_pretrained)

    def audio(self) -> Any:
        """The checkpoint's feature extractor for recordings. Raises InputError as `images` does."""
        from transformers import AutoFeatureExtractor

        return self._open("audio", AutoFeatureExtractor.from_pretrained)

    def _open(self, what: str, open_: Callable[..., Any]) -> Any:
        names = ("preprocessor_config.json", "processor_config.json")
        if self.path is None or not any(os.path.lexists(self.path / name) for name in names):
            raise InputError(
                f"{self.path or 'the checkpoint'}: has no processor for {what}",
                f"put its {names[0]} beside the weights, or give model inputs as .npz",
            )
        try:
            check_read_by_others(self.path, PROCESSOR_FILES)
            with contained():
                return open_(
                    self.path, trust_remote_code=self.trust_remote_code, local_files_only=True
                )
        except LrcError:
            raise
        except Exception as error:  # whatever a processor's own code raises
            raise InputError(
                f"{self.path}: the processor for {what} cannot be opened ({named(error)[:150]})",
                "give data of the kind that the model takes, or restore the processor's files",
            ) from error


def open_processors(
    source: Source, module: nn.Module, *, trust_remote_code: bool = False
) -> Processors:
    """The processors of a checkpoint, for its module.

    Raises:
        InputError: the tokenizer cannot be opened, or one of its files is not read.
    """
    return Processors(
        tokenizer=open_tokenizer(source, trust_remote_code=trust_remote_code),
        decoder=find_decoder(module),
        takes=takes(module),
        path=source.path if source.config is not None else None,
        trust_remote_code=trust_remote_code,
    )


def open_tokenizer(source: Source, *, trust_remote_code: bool = False) -> Any:
    """The checkpoint's own tokenizer, or None where the checkpoint has none."""
    if source.config is None:
        return None
    if not any(os.path.lexists(source.path / name) for name in SIGNS):
        return None
    from transformers import AutoTokenizer

    check_read_by_others(source.path, TOKENIZER_FILES)
    try:
        with contained():
            return AutoTokenizer.from_pretrained(
                source.path, trust_remote_code=trust_remote_code, local_files_only=True
            )
    except Exception as error:  # the package tokenizers raises bare exceptions
        pointers = (explain_file(source.path / name) for name in SIGNS)
        known = next((pointer for pointer in pointers if pointer is not None), None)
        if known is not None:
            raise known from error
        package = PACKAGES.search(str(error))
        raise InputError(
            f"{source.path}: the tokenizer cannot be opened ({named(error)})",
            f"pip install {package[0]}, or restore its files" if package else "restore its files",
        ) from error
