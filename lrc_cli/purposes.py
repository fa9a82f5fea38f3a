"""What blocks a config asks for, and the tokenizer that texts are cut with."""

from pathlib import Path
from typing import Any

from lrc_cli.calibration import Purpose
from lrc_cli.checkpoint.source import Source
from lrc_cli.config import Calibration, Certification, Config
from lrc_cli.errors import InputError
from lrc_cli.factories import named

CALIBRATION, CERTIFICATION = "calibration", "certification"
HELD_BACK = "held back"


def open_tokenizer(source: Source, *, trust_remote_code: bool = False) -> Any:
    """The checkpoint's own tokenizer, or None where it has none."""
    if source.config is None:
        return None
    names = (
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
        "tokenizer.model",
        "vocab.json",
    )
    if not any((source.path / name).exists() for name in names):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            source.path, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:  # tokenizers raises bare ones
        raise InputError(
            f"{source.path}: the tokenizer cannot be opened ({named(error)})", "restore its files"
        ) from error


def purposes_of(config: Config) -> list[Purpose]:
    """What blocks the config asks for, in the order in which purposes take them."""
    calibration = config.calibration
    purposes = [_purpose(CALIBRATION, calibration, calibration)]
    if config.certification is not None:
        purposes.append(_purpose(CERTIFICATION, config.certification, calibration))
    if config.evaluation is None:
        held_back = Purpose(
            name=HELD_BACK,
            path=Path(calibration.path),
            sequence_length=calibration.sequence_length,
            num_sequences=64,
            required=False,
            text_field=calibration.text_field,
        )
        return [*purposes, held_back]
    return [*purposes, *(_purpose(text.name, text, calibration) for text in config.evaluation)]


def _purpose(name: str, section: Any, calibration: Calibration) -> Purpose:
    own_field = calibration.text_field if isinstance(section, Certification) else section.text_field
    return Purpose(
        name=name,
        path=Path(section.path or calibration.path),
        part=section.part or (0.0, 1.0),
        sequence_length=section.sequence_length or calibration.sequence_length,
        num_sequences=section.num_sequences,
        required=not section.num_sequences_is_default,
        text_field=own_field,
        own_draw=name == CERTIFICATION,
    )
